"""The stages on convolutional networks: gradients, criteria, compensations, budgets, and what ONNX makes of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conv_tiny import FAMILIES, Bottleneck, ResNet, tiny_cnn, tiny_images
from torch import nn

from deploy_prune.archs.conv import trace_channels
from deploy_prune.batches import Batches
from deploy_prune.channel_calibration import calibrate_channels
from deploy_prune.channel_costs import channel_flops, channel_params, counts_of
from deploy_prune.channel_masking import mask_channels, read_projection, write_projection
from deploy_prune.channel_pruner import ChannelPruner
from deploy_prune.compensate.conv import sweep_channels
from deploy_prune.compensate.refit import Refit
from deploy_prune.costs import Budget
from deploy_prune.criteria import criteria
from deploy_prune.errors import InfeasibleBudgetError, InputError
from deploy_prune.export.onnx import onnx_from_torch
from deploy_prune.graph_runner import GraphRunner
from deploy_prune.heads import Head
from deploy_prune.masking import OutputWeights
from deploy_prune.patches import by_position, patches
from deploy_prune.predict import predict
from deploy_prune.pruner import Pruner, pruner_of
from deploy_prune.runtime_bench.flops import count_onnx, count_torch
from deploy_prune.signature import Signature
from deploy_prune.stages import Options
from deploy_prune.tasks.base import Row
from deploy_prune.units import MaskSet, SlicePlan

HEAD = Head("classification")


def rows(family: str, count: int = 40, seed: int = 0) -> list[Row]:
    images = tiny_images(family, count, seed).numpy()
    labels = np.random.default_rng(seed).integers(4, size=count)
    return [Row({"pixel_values": x}, int(y), tokens=1) for x, y in zip(images, labels, strict=True)]


@pytest.mark.parametrize("family", ["lenet", "basic", "squeeze", "windows"])
def test_mask_gradients_are_those_of_single_images(family: str) -> None:
    model, data = tiny_cnn(family), rows(family, 5)
    graph = trace_channels(model, tiny_images(family), residual=True)
    stats = calibrate_channels(model, graph, HEAD, Batches(data, HEAD, 0), gradient_moments=True)
    masks = MaskSet.ones(graph.groups)
    step = 1e-3

    def loss(masks: MaskSet, row: int) -> float:
        virtual = mask_channels(model.double(), graph, SlicePlan.from_masks(graph.groups, masks))
        x = torch.tensor(data[row].features["pixel_values"]).double()[None]
        with torch.inference_mode():
            found = HEAD.loss(HEAD.outputs(virtual, {"x": x}), torch.tensor([data[row].label]), torch.ones(1, 1))
        return float(found)

    for number, g in enumerate(graph.groups):
        channel, row = number % g.size, number % 5
        for_this = {sign: MaskSet({n: m.copy() for n, m in masks.items()}) for sign in (1, -1)}
        for sign, changed in for_this.items():
            changed[g.name][channel] += sign * step
        expected = (loss(for_this[1], row) - loss(for_this[-1], row)) / (2 * step)
        assert float(stats.gradients[g.name][row, channel]) == pytest.approx(expected, abs=2e-4)
    reached = [x for x in graph.layers if x.path in stats.saliency]
    assert reached
    for x in reached:
        assert stats.saliency[x.path].shape == (5, x.positions)
        total = stats.gradient_moments[x.path].diagonal().sum()
        assert float(total) == pytest.approx(float(stats.saliency[x.path].sum()), rel=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_are_linear_in_their_patches(family: str) -> None:
    model, x = tiny_cnn(family), tiny_images(family)
    graph = trace_channels(model, x)
    runner = GraphRunner(model, graph.program, [x, x[:3]], most_bytes=0)
    kept = GraphRunner(model, graph.program, [x, x[:3]])
    for layer in graph.layers:
        if layer.grouped:
            continue
        for run in (runner, kept):
            run.advance(layer.node)
            source, output = run.values(1, [layer.source, layer.output])
            whole = read_projection(model, layer)
            module = model.get_submodule(layer.path)
            found = patches(module, source, 3).double() @ whole.weight.T + whole.bias
            wanted = by_position(module, output, 3)
            assert wanted.shape == (3, layer.positions, layer.outputs)
            assert (found - wanted).abs().max() <= 1e-4
    assert runner.kept_bytes == 0 < kept.kept_bytes


@pytest.mark.parametrize("family", FAMILIES)
def test_projections_are_written_as_read(family: str) -> None:
    model, x = tiny_cnn(family), tiny_images(family)
    graph = trace_channels(model, x)
    layer = next(y for y in graph.layers if y.reads)
    norm: Any = model.get_submodule(layer.norm) if layer.norm else None
    if norm is not None and norm.weight is not None:
        with torch.no_grad():
            norm.weight[0] = 0.0
    old = read_projection(model, layer)
    generator = torch.Generator().manual_seed(0)
    new = OutputWeights(
        old.weight + torch.randn(old.weight.shape, generator=generator), old.bias + (layer.norm != "" or layer.bias)
    )
    write_projection(model, layer, new)
    found = read_projection(model, layer)
    assert torch.allclose(found.weight, new.weight, atol=1e-5)
    assert torch.allclose(found.bias, new.bias, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("keep", [0.7, 0.4])
def test_pruned_to_budget_and_nearer_by_refit(family: str, keep: float) -> None:
    model, data = tiny_cnn(family), rows(family, 96)
    assert pruner_of(model) is ChannelPruner
    pruner = ChannelPruner(model, HEAD, data, residual=keep < 0.5)
    table = channel_flops(pruner.graph)
    dense = predict(model, HEAD, data)
    before = {k: v.clone() for k, v in model.state_dict().items()}

    def distance(options: Options) -> float:
        found = pruner.prune(Budget(keep), options)
        assert found.sliced is not None
        cost = table.cost(counts_of(pruner.groups, found.plan))
        assert cost == found.limits[0]["reached"] <= keep * table.dense
        name = "input" if isinstance(model, nn.Sequential) else "x"
        assert count_torch(found.sliced, {name: tiny_images(family, 1)}) == cost
        outputs = predict(found.sliced, HEAD, data)
        virtual = predict(mask_channels(model, pruner.graph, found.plan, found.updates), HEAD, data)
        scale = max(1.0, *(float(np.abs(b["logits"]).max()) for b in virtual))
        apart = max(float(np.abs(a["logits"] - b["logits"]).max()) for a, b in zip(outputs, virtual, strict=True))
        assert apart <= 1e-5 * scale
        return float(
            np.mean([np.square(a["logits"] - b["logits"]).mean() for a, b in zip(outputs, dense, strict=True)])
        )

    plain = Options(criterion="fisher", compensate="fold", rearrange="none")
    assert distance(replace(plain, compensate="refit", criterion="fisher")) < distance(plain)
    distance(replace(plain, compensate="batch-norm"))
    distance(replace(plain, compensate="refit-cut"))
    distance(replace(plain, compensate="mask-tuning"))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_what_stays_is_said_and_explains_an_infeasible_budget() -> None:
    grouped = ResNet(lambda i, w, s: Bottleneck(i, w, s, groups=2), (4, 6)).eval()  # type: ignore[arg-type]
    pruner = ChannelPruner(grouped, HEAD, rows("basic"), residual=True)
    (said,) = pruner.graph.staying()
    assert said == "layer1.0.conv1: layer1.0.conv2 is a grouped convolution (and 7 more)"
    with pytest.raises(InfeasibleBudgetError, match=r"--cut-residual.*What stays: layer1\.0\.conv1") as caught:
        pruner.prune(Budget(0.01), Options(label_free=True))
    assert 0.01 < caught.value.smallest < 1


@pytest.mark.parametrize("family", ["lenet", "squeeze"])
def test_every_criterion_scores_channels(family: str) -> None:
    pruner = ChannelPruner(tiny_cnn(family), HEAD, rows(family, 32), residual=True)
    for name in criteria():
        options = Options(criterion=name, compensate="none", rearrange="none")
        found = pruner.prune(Budget(0.6), options)
        assert found.limits[0]["reached"] <= found.limits[0]["limit"]


def test_refit_restores_what_kept_channels_tell() -> None:
    """Where one channel repeats another, cutting it costs nothing after the refit, batch norm in between or not."""
    model, x = tiny_cnn("basic"), tiny_images("basic", 24)
    block = model.get_submodule("layer1.0")
    with torch.no_grad():
        for tensor in (
            block.conv1.weight,
            block.bn1.weight,
            block.bn1.bias,
            block.bn1.running_mean,
            block.bn1.running_var,
        ):
            tensor[1] = tensor[0]  # type: ignore[index]
    graph = trace_channels(model, x)
    masks = MaskSet.ones(graph.groups)
    masks["layer1.0.conv1"][1] = 0
    plan = SlicePlan.from_masks(graph.groups, masks)
    with torch.inference_mode():
        wanted = model(x)
        cut = mask_channels(model, graph, plan)(x)
        swept = sweep_channels(model, graph, plan, [x[:12], x[12:]], [range(12), range(12, 24)], Refit(ridge=1e-9))
        found = mask_channels(model, graph, plan, swept.updates)(x)
    assert (cut - wanted).abs().max() > 1e-2
    assert (found - wanted).abs().max() < 1e-3


def test_several_limits_and_params() -> None:
    model = tiny_cnn("bottleneck")
    pruner = ChannelPruner(model, HEAD, rows("bottleneck", 32), residual=True)
    budget = Budget(keep_flops=0.6, keep_params=0.5, max_bytes=4 * 1000)
    found = pruner.prune(budget, Options(criterion="fisher", compensate="none", rearrange="none"))
    params = channel_params(pruner.graph, sum(p.numel() for p in model.parameters()))
    assert found.sliced is None
    assert params.cost(counts_of(pruner.groups, found.plan)) <= min(0.5 * params.dense, 1000)
    assert all(x["reached"] <= x["limit"] for x in found.limits)


@pytest.mark.parametrize("compensate", ["none", "refit"])
@pytest.mark.parametrize("family", FAMILIES)
def test_steps_score_the_sliced_network_anew(family: str, compensate: str) -> None:
    pruner = ChannelPruner(tiny_cnn(family), HEAD, rows(family, 32), residual=True)
    options = Options(criterion="fisher", compensate=compensate, rearrange="none", steps=3)
    found = pruner.prune(Budget(0.5), options)
    steps = [s for s in found.stages if s["name"].startswith("step")]
    assert [s["kept"][0] for s in steps] == pytest.approx([1 - 0.5 * (1 - (2 / 3) ** 3), 1 - 0.5 * (1 - (1 / 3) ** 3)])
    assert found.limits[0]["reached"] <= found.limits[0]["limit"]
    assert all(np.isfinite(s["mean_loss"]) for s in steps)


def test_what_is_not_there_is_refused() -> None:
    pruner = ChannelPruner(tiny_cnn("vgg"), HEAD, rows("vgg", 32))
    for options in (
        Options(forward_dtype="bf16"),
        Options(compensate="magic"),
        Options(search="paper"),
    ):
        with pytest.raises(InputError):
            pruner.prune(Budget(0.5), options)
    with pytest.raises(InputError, match="latency budget"):
        pruner.prune(Budget(keep_latency=0.5), Options(compensate="none", criterion="random", rearrange="none"))
    assert issubclass(ChannelPruner, Pruner)


@pytest.mark.parametrize("family", FAMILIES)
def test_onnx_of_a_sliced_network(family: str, tmp_path: Path) -> None:
    import onnxruntime

    pruner = ChannelPruner(tiny_cnn(family), HEAD, rows(family, 32))
    masks = MaskSet.ones(pruner.groups)
    masks[pruner.groups[0].name][:] = 0  # none of the first group
    masks[pruner.groups[-1].name][::2] = 0
    from deploy_prune.channel_slicing import slice_channels

    plan = SlicePlan.from_masks(pruner.groups, masks)
    sliced = slice_channels(pruner.model, pruner.graph, plan)
    size = FAMILIES[family][1]
    onnx_from_torch(sliced, HEAD, tmp_path / "m.onnx", input_names=Signature(("pixel_values",), size, 1))
    x = tiny_images(family, 7, seed=3)
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    (found,) = session.run(["logits"], {"pixel_values": x.numpy()})
    with torch.inference_mode():
        assert np.abs(found - sliced(x).numpy()).max() <= 1e-5 * max(1.0, np.abs(found).max())
    counted = count_onnx(tmp_path / "m.onnx", {"pixel_values": (1, *size)})
    assert counted == channel_flops(pruner.graph).cost(counts_of(pruner.groups, plan))
