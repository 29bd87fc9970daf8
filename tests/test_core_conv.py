"""Channels as units: masked == sliced, exact costs, refusals, save and reload."""

from __future__ import annotations

import itertools
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from conv_tiny import FAMILIES, Bottleneck, NormAct, ResNet, SameConv, Twice, seen_data, tiny_cnn, tiny_images
from models_tiny import random_masks
from torch import nn

from deploy_prune.archs.conv import ChannelGraph, trace_channels
from deploy_prune.channel_costs import channel_flops, channel_params, counts_of
from deploy_prune.channel_masking import mask_channels
from deploy_prune.channel_slicing import prove, slice_channels
from deploy_prune.checkpoint import load_sliced, save_sliced
from deploy_prune.costs import Limit, ProductTable
from deploy_prune.errors import BundleError, InfeasibleBudgetError, InputError, UnsupportedModelError
from deploy_prune.masking import OutputWeights
from deploy_prune.module_checkpoint import load_module, save_module
from deploy_prune.runtime_bench.flops import count_torch
from deploy_prune.search import Minimum, search
from deploy_prune.units import ChannelGroup, MaskSet, SlicePlan


def traced(family: str, seed: int = 0, residual: bool = True) -> tuple[nn.Module, ChannelGraph]:
    model = tiny_cnn(family, seed)
    return model, trace_channels(model, tiny_images(family), residual=residual)


def ragged(graph: ChannelGraph, seed: int, scales: bool = True) -> SlicePlan:
    masks = random_masks(graph.groups, seed, scales=scales)
    for g in graph.groups:
        if g.coupled and not masks[g.name].any():
            masks[g.name][0] = 1.0
    return SlicePlan.from_masks(graph.groups, masks)


def flops_of(model: nn.Module, family: str) -> int:
    return count_torch(model, {next(iter(_arguments(model))): tiny_images(family, 1)})


def _arguments(model: nn.Module) -> list[str]:
    return ["input"] if isinstance(model, nn.Sequential) else ["x"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("seed", range(6))
def test_sliced_equals_masked(family: str, seed: int) -> None:
    model, graph = traced(family, seed)
    plan = ragged(graph, seed)
    x = tiny_images(family, seed=seed)
    with torch.inference_mode():
        dense, virtual = model(x), mask_channels(model, graph, plan)(x)
        sliced_model = slice_channels(model, graph, plan)
        sliced = sliced_model(x)
    assert type(sliced_model) is type(model)
    assert (sliced - virtual).abs().max() <= 1e-5 * max(1.0, float(virtual.abs().max()))
    assert (dense - virtual).abs().max() > 1e-4, "the masks changed nothing"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("seed", range(6))
def test_costs_are_those_of_the_sliced_model(family: str, seed: int) -> None:
    model, graph = traced(family, seed)
    plan = ragged(graph, seed)
    sliced = slice_channels(model, graph, plan)
    params = sum(p.numel() for p in model.parameters())
    flops, sizes = channel_flops(graph), channel_params(graph, params)
    assert (flops.dense, sizes.dense) == (flops_of(model, family), params)
    counts = counts_of(graph.groups, plan)
    assert flops.cost(counts) == flops_of(sliced, family)
    assert sizes.cost(counts) == sum(p.numel() for p in sliced.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_refitted_sliced_equals_masked(family: str) -> None:
    model, graph = traced(family)
    plan = ragged(graph, 1, scales=False)
    keeps, generator = graph.keeps(plan), torch.Generator().manual_seed(0)
    updates = {}
    for layer in graph.layers:
        if layer.reads and keeps.get(layer.writes) != () and (layer.norm or layer.bias):
            rows = len(keeps.get(layer.writes, range(layer.outputs)))
            columns = len(keeps[layer.reads]) * layer.width
            updates[layer.path] = OutputWeights(
                torch.randn(rows, columns, generator=generator) / 6, torch.randn(rows, generator=generator)
            )
    x = tiny_images(family)
    with torch.inference_mode():
        virtual = mask_channels(model, graph, plan, updates)(x)
        sliced = slice_channels(model, graph, plan, updates)(x)
    assert (virtual - sliced).abs().max() <= 1e-5 * max(1.0, float(virtual.abs().max()))


@pytest.mark.parametrize("family", FAMILIES)
def test_whole_plan_changes_nothing(family: str) -> None:
    model, graph = traced(family)
    whole = slice_channels(model, graph, SlicePlan.from_masks(graph.groups, MaskSet.ones(graph.groups)))
    x = tiny_images(family)
    with torch.inference_mode():
        assert torch.equal(whole(x), model(x))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_group_of_these_is_proved(family: str) -> None:
    model, graph = traced(family)
    assert prove(model, graph, tiny_images(family)) is graph


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("seed", range(2))
def test_reload_is_bit_equal(family: str, seed: int, tmp_path: Path) -> None:
    model, graph = traced(family, seed)
    sliced = slice_channels(model, graph, ragged(graph, seed))
    save_module(sliced, tmp_path, f"conv_tiny.{family}")
    again = load_module(tmp_path, FAMILIES[family][0])
    expected, found = sliced.state_dict(), again.state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[k], found[k]) for k in expected)
    x = tiny_images(family)
    with torch.inference_mode():
        assert torch.equal(sliced(x), again(x))


@pytest.mark.parametrize("shared", ["module", "weight"])
def test_a_weight_under_two_names_is_stored_and_its_channels_stay(shared: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = seen_data(Twice(shared)), tiny_images("basic")
    graph = prove(model, trace_channels(model, x), x)
    assert [g.name for g in graph.groups] == ["stem"]
    twice = [name for name, why in graph.refused.items() if "used more than once" in why]
    assert len(twice) == 2
    assert "mid" in twice
    sliced = slice_channels(model, graph, ragged(graph, 2))
    for number, saved in enumerate((model, sliced)):
        save_module(saved, tmp_path / str(number), "conv_tiny.Twice", {"shared": shared})
        again = load_module(tmp_path / str(number), allow=("conv_tiny",))
        assert again.get_parameter("first.weight") is again.get_parameter("second.weight")
        expected, found = saved.state_dict(), again.state_dict()
        assert {"first.weight", "second.weight"} <= expected.keys() == found.keys()
        assert all(torch.equal(expected[k], found[k]) for k in expected)


@pytest.mark.parametrize("module", ["torchvision.models", "conv_tiny"])
def test_a_factory_that_fails_is_named_with_what_it_was_given(
    module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = types.ModuleType("torchvision.models")
    fake.get_model = lambda name, weights, **kwargs: FAMILIES["basic"][0](**kwargs)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torchvision", types.ModuleType("torchvision"))
    monkeypatch.setitem(sys.modules, "torchvision.models", fake)
    save_module(tiny_cnn("basic"), tmp_path, f"{module}.basic", {"clases": 4})
    with pytest.raises(BundleError, match=rf"{module}\.basic\(clases=4\) fails: TypeError: .*clases"):
        load_module(tmp_path, allow=("conv_tiny",))


def test_a_folder_runs_no_code_unasked(tmp_path: Path) -> None:
    model, graph = traced("vgg")
    save_module(slice_channels(model, graph, ragged(graph, 0)), tmp_path, "conv_tiny.vgg", {"classes": 4})
    with pytest.raises(InputError, match="would run that module's code"):
        load_module(tmp_path)
    assert isinstance(load_module(tmp_path, allow=("conv_tiny",)), nn.Sequential)
    with pytest.raises(BundleError, match="does not hold the weights"):
        load_module(tmp_path, lambda classes: FAMILIES["basic"][0]())
    (tmp_path / "module.json").write_text('{"format": "other"}')
    with pytest.raises(BundleError, match="does not describe"):
        load_module(tmp_path, FAMILIES["vgg"][0])


def test_names_of_torchvision_go_to_its_registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, object] = {}

    def get_model(name: str, **kwargs: object) -> nn.Module:
        asked.update(kwargs, name=name)
        return FAMILIES["basic"][0]()

    fake = types.ModuleType("torchvision.models")
    fake.get_model = get_model  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torchvision", types.ModuleType("torchvision"))
    monkeypatch.setitem(sys.modules, "torchvision.models", fake)
    model, graph = traced("basic")
    save_module(
        slice_channels(model, graph, ragged(graph, 0)), tmp_path, "torchvision.models.resnet18", {"weights": "X"}
    )
    load_module(tmp_path)
    assert asked == {"name": "resnet18", "weights": None}


def test_transformers_resnet_keeps_its_folder(tmp_path: Path) -> None:
    config = transformers.ResNetConfig(
        num_channels=3, embedding_size=8, hidden_sizes=[8, 12], depths=[2, 1], layer_type="basic", num_labels=3
    )
    torch.manual_seed(0)
    model = transformers.ResNetForImageClassification(config).eval()
    x = torch.randn(3, 3, 32, 32)
    graph = prove(model, trace_channels(model, x, residual=True), x)
    assert [g.size for g in graph.groups if not g.coupled] == [8, 8, 12]
    sliced = slice_channels(model, graph, ragged(graph, 3))
    save_sliced(sliced, _NoProcessor(), tmp_path)
    again = load_sliced(tmp_path)
    with torch.inference_mode():
        assert torch.equal(sliced(x).logits, again(x).logits)


@pytest.mark.parametrize("empty", ["0", "2"])
def test_an_activation_may_write_into_what_a_layer_without_inputs_gives(empty: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 5, 1), nn.Hardswish(inplace=True), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(5, 6), nn.Hardswish(inplace=True), nn.Linear(6, 2),
    ).eval()  # fmt: skip
    graph = trace_channels(model, torch.randn(2, 3, 4, 4))
    masks = MaskSet.ones(graph.groups)
    masks[empty][:] = 0.0
    plan = SlicePlan.from_masks(graph.groups, masks)
    sliced, virtual = slice_channels(model, graph, plan), mask_channels(model, graph, plan)
    for count in (3, 1, 1):
        x = torch.randn(count, 3, 4, 4)
        with torch.inference_mode():
            assert torch.allclose(sliced(x), virtual(x), atol=1e-6)


class Padded(nn.Module):
    """Pads by what it reads of a convolution, as transformers' MobileNets."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv, self.fc = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 5, 3, stride=2), nn.Linear(5, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        edge: int = self.conv.kernel_size[0] - self.conv.stride[0]  # type: ignore[index, operator]
        x = nn.functional.pad(torch.relu(self.stem(x)), (0, edge, 0, edge))
        return self.fc(torch.relu(self.conv(x)).mean((2, 3)))


@pytest.mark.parametrize("empty", ["stem", "conv"])
def test_code_may_read_the_stride_of_a_convolution_that_is_gone(empty: str) -> None:
    torch.manual_seed(0)
    model, x = Padded().eval(), torch.randn(3, 3, 8, 8)
    graph = trace_channels(model, x)
    masks = MaskSet.ones(graph.groups)
    masks[empty][:] = 0.0
    plan = SlicePlan.from_masks(graph.groups, masks)
    with torch.inference_mode():
        virtual = mask_channels(model, graph, plan)(x)
        assert torch.allclose(slice_channels(model, graph, plan)(x), virtual, atol=1e-6)


class _NoProcessor:
    def save_pretrained(self, folder: Path) -> None:
        pass


class Shared(nn.Module):
    """Runs one convolution twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.free, self.fc = nn.Conv2d(6, 5, 1), nn.Linear(5, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(torch.relu(self.conv(torch.relu(self.stem(x)))))
        return self.fc(torch.relu(self.free(x)).mean((2, 3)))


class Fixed(nn.Module):
    """Has a number of channels written into its code."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.fc = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 5, 3), nn.Linear(5 * 16, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(torch.relu(self.conv2(torch.relu(self.conv1(x)))).view(-1, 80))


class Joined(nn.Module):
    """Concatenates two streams, and shows a third to the user."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1), nn.Conv2d(8, 5, 1)
        self.inner, self.last = nn.Conv2d(5, 6, 1), nn.Conv2d(6, 3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.c(torch.cat([self.a(x), self.b(x)], 1)))
        return self.last(torch.relu(self.inner(x)))


def test_refusals_name_the_reason() -> None:
    x = torch.randn(2, 3, 8, 8)
    graph = trace_channels(Shared().eval(), x)
    assert [g.name for g in graph.groups] == ["free"]
    assert "used more than once" in graph.refused["stem"]
    assert "used more than once" in graph.refused["conv"]

    graph = trace_channels(Joined().eval(), x)
    assert [g.name for g in graph.groups] == ["c", "inner"]
    assert "concatenated" in graph.refused["a"]
    assert "the model's output" in graph.refused["last"]

    grouped = ResNet(lambda i, w, s: Bottleneck(i, w, s, groups=2), (4, 6))  # type: ignore[arg-type]
    graph = trace_channels(grouped.eval(), x)
    assert "grouped convolution" in graph.refused["layer1.0.conv1"]
    assert "grouped convolution" in graph.refused["layer1.0.conv2"]

    flat = torch.randn(2, 3, 8, 8)
    model = Fixed().eval()
    graph = prove(model, trace_channels(model, flat), flat)
    assert [g.name for g in graph.groups] == ["conv1"]
    assert "cutting one of them does not work" in graph.refused["conv2"]

    graph = trace_channels(seen_data(Twice("norm")), x)
    assert [g.name for g in graph.groups] == ["stem", "mid"]
    assert "batch norm" in graph.refused["first"]
    assert "used more than once" in graph.refused["first"]
    assert "batch norm that is shared" in graph.refused["second"]

    with pytest.raises(UnsupportedModelError, match="residual stream"):
        trace_channels(nn.Sequential(nn.Conv2d(3, 4, 1), _Residual(), nn.Conv2d(4, 2, 1)).eval(), x)
    with pytest.raises(UnsupportedModelError, match="training mode"):
        trace_channels(Fixed().train(), flat)
    with pytest.raises(UnsupportedModelError, match="cannot be traced"):
        trace_channels(_Branching().eval(), flat)


def test_modules_of_own_classes_keep_what_they_hold() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        SameConv(3, 6, 3), NormAct(6, nn.SiLU), SameConv(6, 6, 3, groups=6), NormAct(6, nn.ReLU6), SameConv(6, 8, 3),
        NormAct(8, nn.Hardswish), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2),
    ).eval()  # fmt: skip
    x = torch.randn(3, 3, 8, 8)
    graph = prove(model, trace_channels(model, x), x)
    assert [g.size for g in graph.groups] == [6, 8], graph.refused
    masks = MaskSet.ones(graph.groups)
    masks[graph.groups[0].name][4:] = 0.0
    plan = SlicePlan.from_masks(graph.groups, masks)
    sliced = slice_channels(model, graph, plan)
    with torch.inference_mode():
        virtual, found = mask_channels(model, graph, plan)(x), sliced(x)
    assert [type(m) for m in sliced] == [type(m) for m in model]
    assert (found - virtual).abs().max() <= 1e-5 * max(1.0, float(virtual.abs().max()))
    masks[graph.groups[0].name][:] = 0.0
    with pytest.raises(InputError, match="is a SameConv, which cannot go"):
        slice_channels(model, graph, SlicePlan.from_masks(graph.groups, masks))


class Blurred(nn.Module):
    """Filters by what is no parameter, and weighs positions by attention."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.fc = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 5, 1), nn.Conv2d(5, 4, 1), nn.Linear(4, 2)
        self.register_buffer("blur", torch.ones(5, 1, 3, 3) / 9)
        self.attend = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.conv2d(torch.relu(self.b(torch.relu(self.a(x)))), self.blur, groups=5)
        x = self.c(x).flatten(2).transpose(1, 2)  # (B, positions, 4)
        return self.fc(self.attend(x, x, x, need_weights=False)[0].mean(1))


def test_products_outside_the_layers_count_whole() -> None:
    torch.manual_seed(0)
    model, x = Blurred().eval(), torch.randn(2, 3, 8, 8)
    graph = prove(model, trace_channels(model, x), x)
    assert [g.name for g in graph.groups] == ["a", "attend.out_proj"], graph.refused
    plan = SlicePlan.from_masks(graph.groups, {g.name: np.arange(g.size) % 2.0 for g in graph.groups})
    for counts, found in ((None, model), (plan, slice_channels(model, graph, plan))):
        assert channel_flops(graph).cost(counts_of(graph.groups, counts)) == count_torch(found, {"x": x[:1]})


class _Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.conv(x)


class _Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x) if x.sum() > 0 else self.conv(-x)


@pytest.mark.parametrize("seed", range(20))
def test_search_is_optimal_on_toys_and_never_over_budget(seed: int) -> None:
    rng = np.random.default_rng(seed)
    sizes = {f"g{i}": int(rng.integers(3, 8)) for i in range(4)}
    groups = [ChannelGroup(name, "channel", i, n, 1, (), (), ()) for i, (name, n) in enumerate(sizes.items())]
    single = {name: float(rng.integers(0, 20)) for name in sizes}
    double = {(f"g{i}", f"g{i + 1}"): float(rng.integers(1, 20)) for i in range(3)}
    limits = [
        Limit.share(ProductTable("flops", sizes, float(rng.integers(0, 50)), single, double), 0.5),
        Limit.share(ProductTable("params", sizes, 10.0, dict.fromkeys(sizes, 1.0), {("g0", "g3"): 2.0}), 0.7),
    ][: 1 + seed % 2]
    scores = {name: rng.random(n) ** 3 for name, n in sizes.items()}
    found = search(groups, scores, limits, Minimum())
    value = sum(float((found.masks[name] * scores[name]).sum()) for name in sizes)
    counts = {name: int(found.masks[name].sum()) for name in sizes}
    assert all(x.table.cost(counts) <= x.most for x in limits)
    assert all(found.costs[x.table.kind] == x.table.cost(counts) for x in limits)
    worth = {name: np.concatenate([[0.0], np.cumsum(np.sort(s)[::-1])]) for name, s in scores.items()}
    best = 0.0
    for picked in itertools.product(*(range(1, n + 1) for n in sizes.values())):
        plan = dict(zip(sizes, picked, strict=True))
        if all(x.table.cost(plan) <= x.most for x in limits):
            best = max(best, sum(worth[name][n] for name, n in plan.items()))
    assert value == pytest.approx(best, rel=1e-9 if len(limits) == 1 else 0.02)


def test_local_scope_and_infeasible_budgets_of_products() -> None:
    _, graph = traced("bottleneck")
    limit = Limit.share(channel_flops(graph), 0.5)
    scores = {g.name: np.ones(g.size) for g in graph.groups}
    found = search(graph.groups, scores, [limit], Minimum(), scope="local")
    assert found.costs["flops"] <= limit.most
    with pytest.raises(InfeasibleBudgetError, match="smallest reachable"):
        search(graph.groups, scores, [Limit.share(channel_flops(graph), 0.001)], Minimum())
    around = channel_flops(graph).around(counts_of(graph.groups, None))
    assert around.dense == channel_flops(graph).dense
