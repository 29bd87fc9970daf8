"""What the stages on convolutional networks must not get wrong: norms with activations, shared weights, steps, fold."""

from __future__ import annotations

from collections import OrderedDict
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from conv_tiny import NormAct, Twice, seen_data, tiny_cnn, tiny_images
from models_tiny import random_masks
from torch import Tensor, nn

from deploy_prune.archs.conv import ChannelGraph, trace_channels
from deploy_prune.batches import Batches
from deploy_prune.calibration import CalibrationStats
from deploy_prune.channel_calibration import calibrate_channels
from deploy_prune.channel_masking import mask_channels, read_projection
from deploy_prune.channel_pruner import ChannelPruner
from deploy_prune.compensate.fold import RIDGE, fold_channels, renorm
from deploy_prune.costs import Budget
from deploy_prune.criteria import get_criterion
from deploy_prune.errors import InputError
from deploy_prune.graph_runner import GraphRunner
from deploy_prune.heads import Head
from deploy_prune.modeling_sliced import Blank, Constant
from deploy_prune.patches import by_position, patches
from deploy_prune.stages import Options
from deploy_prune.tasks.base import Row
from deploy_prune.units import MaskSet, SlicePlan

HEAD = Head("classification")


def rows(count: int, family: str = "basic") -> list[Row]:
    images = tiny_images(family, count).numpy()
    return [Row({"pixel_values": x}, i % 4, tokens=1) for i, x in enumerate(images)]


def chain(held: bool, act: type[nn.Module]) -> nn.Sequential:
    """Return a network whose batch norms hold their activations, or the same one with a module for each."""

    def block(number: int, inputs: int, outputs: int) -> dict[str, nn.Module]:
        conv = {f"conv{number}": nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)}
        if held:
            return {**conv, f"norm{number}": NormAct(outputs, act)}
        return {**conv, f"norm{number}": nn.BatchNorm2d(outputs), f"act{number}": act()}

    torch.manual_seed(0)
    layers = {**block(1, 3, 6), **block(2, 6, 5), **block(3, 5, 4)}
    end = {"pool": nn.AdaptiveAvgPool2d(1), "flat": nn.Flatten(), "fc": nn.Linear(4, 4)}
    return nn.Sequential(OrderedDict({**layers, **end}))


@pytest.mark.parametrize("act", [partial(nn.ReLU, inplace=True), nn.SiLU])
def test_gradients_are_taken_before_an_activation_that_the_norm_holds(act: Any) -> None:
    def statistics(held: bool) -> CalibrationStats:
        model = chain(held, act)
        torch.manual_seed(1)  # of the drawn statistics
        graph = trace_channels(seen_data(model), tiny_images("basic"))
        return calibrate_channels(model, graph, HEAD, Batches(rows(7), HEAD, 0), gradient_moments=True)

    found, wanted = statistics(True), statistics(False)
    assert {"conv2", "conv3", "fc"} <= found.saliency.keys() == wanted.saliency.keys()
    for name in ("gradients", "saliency", "gradient_moments"):
        ours, theirs = getattr(found, name), getattr(wanted, name)
        for key, value in theirs.items():
            assert value.any()
            assert torch.allclose(ours[key], value, rtol=1e-4, atol=1e-9), (name, key)


@pytest.mark.parametrize("compensate", ["refit", "fold+batch-norm"])
@pytest.mark.parametrize("shared", ["run", "module", "weight", "norm"])
def test_what_runs_twice_keeps_its_weights(shared: str, compensate: str) -> None:
    torch.manual_seed(0)
    model = seen_data(Twice(shared))
    pruner = ChannelPruner(model, HEAD, rows(64))
    found = pruner.prune(Budget(0.8), Options(criterion="fisher", compensate=compensate, rearrange="none"))
    assert any(g.count < g.total for g in found.plan.groups)
    assert found.sliced is not None
    kept = ("norm1", "norm2") if shared == "norm" else ("first", "second")
    names = [n for n in model.state_dict() if n.startswith(kept) and (shared != "weight" or n.endswith("weight"))]
    assert len(names) >= 2
    for name in names:
        assert torch.equal(found.sliced.state_dict()[name], model.state_dict()[name]), name
    if compensate == "refit":
        assert {"mid", "fc"} & found.updates.keys(), "what runs once is refitted"
        assert bool({"first", "second"} & found.updates.keys()) == (shared == "norm")


def lively(family: str) -> nn.Module:
    """Return a network of which a lone channel is not dead behind its activation."""
    model = tiny_cnn(family)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.constant_(module.bias, 2.0)
    return model


@pytest.mark.parametrize(
    ("family", "few", "criterion"),
    [
        ("basic", 1, "obs"),
        ("basic", 0, "obs"),
        ("mobilenet", 1, "fisher"),
        ("squeeze", 1, "obs"),
        ("squeeze", 0, "magnitude-l2-out"),
        ("windows", 1, "obs"),
    ],
)
def test_a_step_may_leave_one_channel_or_none(family: str, few: int, criterion: str) -> None:
    """Every second group keeps so few, and one channel is left of every residual stream, which never goes."""
    pruner = ChannelPruner(lively(family), HEAD, rows(12, family), residual=True)
    masks = MaskSet.ones(pruner.groups)
    for number, g in enumerate(pruner.groups):
        if g.coupled:
            masks[g.name][1:] = 0
        elif number % 2 == 0 and (few or pruner.graph.layers[-1].reads != g.name):
            masks[g.name][few:] = 0
    plan = SlicePlan.from_masks(pruner.groups, masks)
    assert min(g.count for g in plan.groups) == few
    options = Options(criterion=criterion, compensate="none", rearrange="none")
    scores, loss = pruner.rescore(plan, None, {}, options, lambda share: None)
    assert np.isfinite(loss)
    assert {name: len(values) for name, values in scores.items()} == {g.name: g.size for g in pruner.groups}
    for name, values in scores.items():
        assert np.isfinite(values).all()
        assert not values[masks[name] == 0].any()
    assert sum(values.any() for values in scores.values()) >= 2, "what is left is scored"


def test_a_step_that_leaves_nothing_says_so() -> None:
    pruner = ChannelPruner(tiny_cnn("lenet"), HEAD, rows(12, "lenet"))
    masks = MaskSet.ones(pruner.groups)
    masks["conv2"][:] = 0
    plan = SlicePlan.from_masks(pruner.groups, masks)
    with pytest.raises(InputError, match="does not depend on any unit"):
        pruner.rescore(plan, None, {}, Options(criterion="fisher", compensate="none"), lambda share: None)


def test_steps_score_what_masks_leave() -> None:
    """The sliced network is the masked one: so are the gradients of what is left, and with them the scores."""
    pruner = ChannelPruner(lively("basic"), HEAD, rows(24), residual=True)
    masks = random_masks(pruner.groups, 0, scales=False, empty=False)
    for g in pruner.groups:
        if g.coupled:
            masks[g.name][1:] = 0.0
            masks[g.name][0] = 1.0
    plan = SlicePlan.from_masks(pruner.groups, masks)
    options = Options(criterion="fisher", compensate="none", rearrange="none")
    scores, _ = pruner.rescore(plan, None, {}, options, lambda share: None)
    virtual = mask_channels(pruner.model, pruner.graph, plan)
    stats = calibrate_channels(virtual, pruner.graph, HEAD, pruner.batches)
    wanted = get_criterion("fisher")(pruner.evidence(virtual, options, stats))
    for name, values in scores.items():
        assert values == pytest.approx(wanted[name] * (masks[name] != 0), rel=1e-3, abs=1e-9), name


def cut_plan(graph: ChannelGraph) -> SlicePlan:
    """Return a plan that cuts every third channel."""
    masks = MaskSet.ones(graph.groups)
    for g in graph.groups:
        masks[g.name][::3] = 0
    return SlicePlan.from_masks(graph.groups, masks)


@pytest.mark.parametrize("family", ["lenet", "vgg", "windows"])
def test_the_fold_is_a_ridge_regression_on_the_kept_channels(family: str) -> None:
    model, x = tiny_cnn(family), tiny_images(family, 12)
    graph = trace_channels(model, x)
    plan = cut_plan(graph)
    updates = fold_channels(model, graph, plan, GraphRunner(model, graph.program, [x[:5], x[5:]]))
    read: dict[str, Tensor] = {}
    for g in graph.groups:
        for reader in g.readers:

            def keep(module: nn.Module, args: tuple[Tensor], path: str = reader.path) -> None:
                read[path] = args[0].double()

            model.get_submodule(reader.path).register_forward_pre_hook(keep)
    with torch.no_grad():
        model(x)
    assert updates.keys() == read.keys()
    for g in graph.groups:
        kept = list(plan[g.name].kept)
        for reader in g.readers:
            module: Any = model.get_submodule(reader.path)
            seen = read[reader.path]
            if isinstance(module, nn.Conv2d):
                channels = seen.transpose(0, 1).flatten(1)  # (C, images * positions)
            else:
                channels = seen.reshape(-1, g.size, reader.spread).transpose(0, 1).flatten(1)
            gram = channels @ channels.T
            inner = gram[kept][:, kept]
            inner = inner + RIDGE * inner.diagonal().mean() * torch.eye(len(kept))
            predicts = gram[:, kept] @ torch.linalg.inv(inner)  # (C, kept)
            layer = graph.layer(reader.path)
            stays = list(graph.keeps(plan).get(layer.writes, range(layer.outputs)))
            weight = module.weight.double().detach()
            if layer.norm:
                norm: Any = model.get_submodule(layer.norm)
                slope = norm.weight / (norm.running_var + norm.eps).sqrt()
                weight = weight * slope.double().reshape(-1, *[1] * (weight.dim() - 1))
            weight = weight.reshape(len(weight), g.size, -1)
            wanted = torch.einsum("ocw,ck->okw", weight, predicts).flatten(1)[stays].float()
            assert torch.allclose(updates[reader.path].weight, wanted, rtol=1e-3, atol=1e-4), reader.path
            bias = read_projection(model, layer).bias[stays].float()
            assert torch.equal(updates[reader.path].bias, bias)


def test_the_fold_gives_a_repeated_channel_to_its_twin() -> None:
    model, x = tiny_cnn("basic"), tiny_images("basic", 24)
    block: Any = model.get_submodule("layer1.0")
    norm = block.bn1
    with torch.no_grad():
        for tensor in (block.conv1.weight, norm.weight, norm.bias, norm.running_mean, norm.running_var):
            tensor[1] = tensor[0]
    graph = trace_channels(model, x)
    masks = MaskSet.ones(graph.groups)
    masks["layer1.0.conv1"][1] = 0
    plan = SlicePlan.from_masks(graph.groups, masks)
    updates = fold_channels(model, graph, plan, GraphRunner(model, graph.program, [x]))
    assert updates.keys() == {"layer1.0.conv2"}
    with torch.inference_mode():
        wanted = model(x)
        cut, folded = mask_channels(model, graph, plan)(x), mask_channels(model, graph, plan, updates)(x)
    assert (folded - wanted).norm() < 0.1 * (cut - wanted).norm()


@pytest.mark.parametrize("family", ["vgg", "basic", "mobilenet"])
def test_renewed_batch_norms_normalise_what_the_cut_network_gives(family: str) -> None:
    model, x = tiny_cnn(family), tiny_images(family, 32)
    graph = trace_channels(model, x)
    plan = cut_plan(graph)
    keeps = graph.keeps(plan)

    def errors(virtual: nn.Module) -> list[float]:
        """Return how far each norm's outputs are from the mean and deviation that its own weights say."""
        found: list[float] = []
        for layer in graph.layers:
            if layer.norm:
                kept = list(keeps.get(layer.writes, range(layer.outputs)))
                norm: Any = model.get_submodule(layer.norm)

                def look(module: nn.Module, args: Any, output: Tensor, kept: Any = kept, norm: Any = norm) -> None:
                    flat = output[:, kept].transpose(0, 1).flatten(1)
                    found.append(float((flat.mean(1) - norm.bias[kept]).abs().max()))
                    found.append(float((flat.std(1, correction=0) - norm.weight[kept].abs()).abs().max()))

                virtual.get_submodule(layer.norm).register_forward_hook(look)
        with torch.inference_mode():
            virtual(x)
        return found

    updates = renorm(model, graph, plan, {}, [x])
    assert updates.keys() == {layer.path for layer in graph.layers if layer.norm}
    stale, fresh = errors(mask_channels(model, graph, plan)), errors(mask_channels(model, graph, plan, updates))
    assert len(stale) == len(fresh) == 2 * len(updates)
    assert min(stale) > 0.05
    assert max(fresh) < 0.02


def test_batch_norms_renewed_behind_the_fold_keep_its_weights() -> None:
    """They change each channel's scale and shift alone."""
    model, x = tiny_cnn("vgg"), tiny_images("vgg", 24)
    graph = trace_channels(model, x)
    plan = cut_plan(graph)
    folded = fold_channels(model, graph, plan, GraphRunner(model, graph.program, [x]))
    renewed = renorm(model, graph, plan, folded, [x])
    path = graph.groups[0].readers[0].path
    ratio = renewed[path].weight / folded[path].weight
    assert torch.allclose(ratio, ratio[:, :1].expand_as(ratio), rtol=1e-3)
    assert not torch.allclose(ratio, torch.ones_like(ratio), rtol=1e-2)


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_a_convolution_that_pads_with_other_values_reads_them_once(mode: str) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 5, 3, stride=2, padding=(2, 1), padding_mode=mode)
    model = nn.Sequential(conv, nn.ReLU(), nn.Conv2d(5, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    x = tiny_images("basic")
    graph = trace_channels(model, x)
    layer = graph.layer("0")
    source, output = GraphRunner(model, graph.program, [x]).values(0, [layer.source, layer.output])
    found = patches(conv, source, len(x))  # (B, positions, columns)
    assert found.shape == (len(x), layer.positions, layer.inputs * layer.width)
    wanted = by_position(conv, output, len(x))
    assert torch.allclose(found @ conv.weight.flatten(1).T + conv.bias, wanted, atol=1e-5)


@pytest.mark.parametrize("compensate", ["refit", "fold+batch-norm"])
def test_a_batch_norm_without_weights_takes_a_refit_and_new_statistics(compensate: str) -> None:
    """Its slope stays, and its mean shifts what a convolution without bias gives."""
    model = tiny_cnn("padded")
    pruner = ChannelPruner(model, HEAD, rows(64, "padded"))
    found = pruner.prune(Budget(0.6), Options(criterion="fisher", compensate=compensate, rearrange="none"))
    bare = [x.path for x in pruner.graph.layers if x.norm and not x.bias and not x.grouped]
    assert bare
    assert set(bare) & found.updates.keys()
    assert found.sliced is not None
    x = tiny_images("padded", 6, seed=1)
    with torch.inference_mode():
        virtual, plain = (mask_channels(model, pruner.graph, found.plan, u)(x) for u in (found.updates, {}))
        assert float((found.sliced(x) - virtual).abs().max()) <= 1e-5 * max(1.0, float(virtual.abs().max()))
        wanted = model(x)
        if compensate == "refit":
            assert (virtual - wanted).norm() < (plain - wanted).norm()
    norms = [m for m in found.sliced.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == 4
    assert all(m.weight is None and m.bias is None for m in norms)


def test_stand_ins_show_the_stride_that_mobilenets_of_transformers_pad_by() -> None:
    conv = nn.Conv2d(3, 5, (3, 1), stride=2, padding=(1, 0), dilation=2)
    x = tiny_images("basic")
    for stand_in, channels in ((Blank(conv), 1), (Constant(conv, 4), 4)):
        for name in ("kernel_size", "stride", "padding", "dilation"):
            assert getattr(stand_in, name) == getattr(conv, name)
        assert stand_in(x).shape == (len(x), channels, *conv(x).shape[2:])
