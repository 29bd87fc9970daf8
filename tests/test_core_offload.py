"""Layers that visit the device one at a time: the same statistics, and never two of them there."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from fake_cuda import CUDA, fake_cuda, on_cuda
from models_tiny import FAMILIES, heads_of, tiny_model, tiny_rows

from deploy_prune import parallel, prune
from deploy_prune.archs import arch_of
from deploy_prune.batches import Batches
from deploy_prune.calibration import CalibrationStats, calibrate
from deploy_prune.compensate import GroupLog, Refit, sweep
from deploy_prune.costs import Budget
from deploy_prune.criteria.obs import input_moments
from deploy_prune.heads import Head
from deploy_prune.layer_calibration import calibrate_by_layers
from deploy_prune.offload import HOME, Rotation, settle
from deploy_prune.slicing import slice_model
from deploy_prune.stages import Options
from deploy_prune.teacher import Teacher
from deploy_prune.units import MaskSet, SlicePlan


def parts_of(stats: CalibrationStats) -> dict[str, dict[str, torch.Tensor]]:
    names = ("gradients", "saliency", "activation_squares", "gradient_moments")
    return {name: getattr(stats, name) for name in names}


@pytest.mark.parametrize("kind", ["classification", "token", "qa", "embedding"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_statistics_are_those_of_whole_passes(family: str, kind: Any) -> None:
    if kind not in heads_of(family):
        pytest.skip(f"{family} models have no such head here")
    model, head, rows = tiny_model(family, kind), Head(kind), tiny_rows(140, kind, family=family)
    groups = arch_of(model).groups(model)
    how: dict[str, Any] = {"pad_id": 1, "label_free": kind == "embedding", "seed": 3, "gradient_moments": True}
    whole, split = (find(model, groups, head, rows, **how) for find in (calibrate, calibrate_by_layers))
    assert float(split.mean_loss) == pytest.approx(float(whole.mean_loss), rel=1e-6)
    assert int(split.tokens) == int(whole.tokens)
    for name, found in parts_of(split).items():
        expected = parts_of(whole)[name]
        assert list(found) == list(expected) == [g.name for g in groups]
        for group, tensor in found.items():
            scale = float(expected[group].abs().max())
            assert scale > 0
            assert torch.allclose(tensor, expected[group], rtol=0, atol=1e-5 * scale), f"{name} {group}"
    assert all(p.requires_grad for p in model.parameters())


@contextmanager
def one_layer_at_a_time(model: Any, seen: set[int]) -> Iterator[None]:
    """Check whenever a layer computes that no other layer of the model is on the device."""
    layers = Rotation(model).layers
    writers = {g.layer: model.get_submodule(g.consumer) for g in arch_of(model).groups(model)}

    def check(number: int) -> Any:
        def hook(*args: Any) -> None:
            there = [n for n, layer in enumerate(layers) if any(p.device == CUDA for p in layer.parameters())]
            assert there == [number]
            seen.add(number)

        return hook

    handles = [module.register_forward_hook(check(number)) for number, module in writers.items()]
    yield
    for handle in handles:
        handle.remove()


def accept(group: Any, solution: Any, moments: Any) -> GroupLog:
    """Stand for the one step that reads values back: fake tensors have none."""
    return GroupLog(group.name, True, 0.0, 0.0)


@pytest.mark.parametrize("family", FAMILIES)
def test_one_layer_is_on_the_device(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deploy_prune.compensate.layers._judge", accept)
    head, rows = Head("classification"), tiny_rows(40, family=family)
    model = tiny_model(family, attn_implementation="eager")
    seen: set[int] = set()
    with fake_cuda():
        on_cuda(model)
        layers = Rotation(model).layers
        for layer in layers:
            on_cuda(layer, HOME)
        assert Rotation(model).moves
        assert {p.device.type for layer in layers for p in layer.parameters()} == {"cpu"}
        groups = arch_of(model).groups(model)
        with one_layer_at_a_time(model, seen):
            stats = calibrate_by_layers(model, groups, head, rows, pad_id=1, gradient_moments=True)
            assert {t.device for part in parts_of(stats).values() for t in part.values()} == {HOME}
            teacher = Teacher(model, groups, head, list(Batches(rows, head, 1)))
            moments = input_moments(teacher, 0)
            assert {t.device for t in moments.values()} == {CUDA}
            assert seen == {0, 1, 2}
            masks = MaskSet.ones(groups)
            for g in groups:
                masks[g.name][::2] = 0
            masks["L01.heads"][:] = 0
            plan = SlicePlan.from_masks(groups, masks)
        for solver in (Refit(), Refit(parallel=True)):
            student = slice_model(model, groups, plan)
            swept = sweep(student, teacher, groups, plan, head, Batches(rows, head, 1), solver, stats.saliency)
            assert {u.weight.device for u in swept.updates.values()} == {HOME}
            assert {p.device.type for layer in Rotation(student).layers for p in layer.parameters()} == {"cpu"}
        seen.clear()
        with one_layer_at_a_time(model, seen), Rotation(model).turning():
            batch = next(iter(Batches(rows, head, 1))).to(CUDA)
            head.outputs(model, batch.inputs)
        assert seen == {0, 1, 2}
        assert {p.device.type for layer in layers for p in layer.parameters()} == {"cpu"}


def test_one_layers_statistics_are_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """What has been found of a layer is off the device when the next one computes."""
    found: list[weakref.ref[torch.Tensor]] = []
    fill, total = parallel.fill, parallel.SectionSum.total

    def remembered(tensor: torch.Tensor) -> torch.Tensor:
        found.append(weakref.ref(tensor))
        return tensor

    monkeypatch.setattr(parallel, "fill", lambda tensor: remembered(fill(tensor)))
    monkeypatch.setattr(parallel.SectionSum, "total", lambda own: remembered(total(own)))
    head, rows, model = Head("classification"), tiny_rows(40), tiny_model("bert", attn_implementation="eager")
    known = []

    def check(*args: Any) -> None:
        known.append(len(found))
        there = [tensor for ref in found if (tensor := ref()) is not None and tensor.device == CUDA]
        assert all(tensor.ndim == 0 for tensor in there), "two layers' statistics: only tokens and loss are of all"

    with fake_cuda():
        on_cuda(model)
        for layer in Rotation(model).layers:
            on_cuda(layer, HOME)
        groups = arch_of(model).groups(model)
        for g in groups:
            model.get_submodule(g.consumer).register_forward_hook(check)
        calibrate_by_layers(model, groups, head, rows, gradient_moments=True)
    of_a_layer = 2 * 4  # two groups' gradients, saliency, squares and moments
    assert sorted(set(known)) == [0, 2, 2 + of_a_layer, 2 + 2 * of_a_layer]
    assert len(found) == 2 + 3 * of_a_layer


def test_the_layers_lie_in_main_memory_and_the_rest_on_the_device() -> None:
    model = tiny_model("bert")
    settle(model, torch.device("meta"))
    places = {name: p.device.type for name, p in model.named_parameters()}
    assert all((place == "cpu") == (".layer." in name) for name, place in places.items())
    assert set(places.values()) == {"cpu", "meta"}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_that_holds_one_layer_finds_nearly_the_same() -> None:
    rows = tiny_rows(140)
    whole = prune(tiny_model("bert").cuda(), rows, Budget(0.6), options=Options(steps=2))
    model = tiny_model("bert")
    settle(model, torch.device("cuda"))
    split = prune(model, rows, Budget(0.6), options=Options(steps=2))
    same = sum(len(set(a.kept) & set(b.kept)) for a, b in zip(whole.plan.groups, split.plan.groups, strict=True))
    assert same >= 0.98 * sum(len(a.kept) for a in whole.plan.groups)
