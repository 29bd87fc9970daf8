"""No tensor stays on the wrong device: the whole pruning under fake CUDA tensors, on machines without a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fake_cuda import CUDA, fake_cuda, on_cuda
from models_tiny import FAMILIES, heads_of, tiny_model, tiny_rows

from deploy_prune.archs import arch_of
from deploy_prune.batches import Batches
from deploy_prune.calibration import calibrate
from deploy_prune.compensate import GroupLog, MaskTuning, Refit, sweep
from deploy_prune.criteria.obs import eliminate, input_moments
from deploy_prune.errors import InputError, SystemStateError
from deploy_prune.heads import Head
from deploy_prune.masking import mask_model
from deploy_prune.rearrange import swap_round
from deploy_prune.slicing import slice_model
from deploy_prune.stages import resolve_device
from deploy_prune.teacher import Teacher
from deploy_prune.units import MaskSet, SlicePlan


@pytest.fixture
def accept_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip the one step that reads values back: fake tensors have none."""
    judge: Any = lambda group, solution, moments: GroupLog(group.name, True, 0.0, 0.0)  # noqa: E731
    monkeypatch.setattr("deploy_prune.compensate.layers._judge", judge)


@pytest.mark.usefixtures("accept_all")
@pytest.mark.parametrize("kind", ["classification", "regression", "token", "qa", "embedding"])
@pytest.mark.parametrize("family", FAMILIES)
def test_pruning_stays_on_the_device(family: str, kind: Any) -> None:
    if kind not in heads_of(family):
        pytest.skip(f"{family} models have no such head here")
    head = Head(kind)
    rows = tiny_rows(40, kind, family=family)
    model = tiny_model(family, kind, attn_implementation="eager")
    with fake_cuda():
        on_cuda(model)
        groups = arch_of(model).groups(model)
        for label_free in (True,) if kind == "embedding" else (False, True):
            stats = calibrate(model, groups, head, rows, pad_id=1, label_free=label_free, gradient_moments=True)
        kept = (stats.gradients, stats.saliency, stats.activation_squares, stats.gradient_moments)
        assert all(tensor.device == CUDA for part in kept for tensor in part.values())
        feeds = list(Batches(rows, head, 1))
        teacher = Teacher(model, groups, head, feeds)
        moments = input_moments(teacher, 0)
        for g in groups[:2]:
            order, rises = eliminate(
                moments[g.name], model.get_submodule(g.consumer).weight, stats.gradient_moments[g.name], g.width
            )
            assert order.device == rises.device == CUDA
        for name, gradient in stats.gradients.items():
            half = torch.arange(gradient.shape[1], device=CUDA) % 2 == 0
            moved = swap_round(gradient.T @ gradient, half, gradient.shape[1] // 2)
            assert moved.device == CUDA, name
        masks = MaskSet.ones(groups)
        for g in groups:
            masks[g.name][::2] = 0
        masks["L01.heads"][:] = 0
        masks["L02.neurons"][:] = 0
        plan = SlicePlan.from_masks(groups, masks)
        for solver in (Refit(), MaskTuning(solver="exact")):
            student = slice_model(model, groups, plan)
            swept = sweep(student, teacher, groups, plan, head, Batches(rows, head, 1), solver, stats.saliency)
            assert all(p.device == CUDA for p in student.parameters())
            virtual = mask_model(model, groups, plan, swept.updates)
            batch = next(iter(Batches(rows, head, 1))).to(CUDA)
            assert all(v.device == CUDA for v in head.outputs(virtual, batch.inputs).values())


def test_the_fake_device_catches_a_tensor_left_behind() -> None:
    model = tiny_model("bert", attn_implementation="eager")
    with fake_cuda():
        on_cuda(model)
        with pytest.raises(Exception, match="device"):
            model.get_input_embeddings()(torch.ones(1, 4, dtype=torch.long))


def test_devices_are_resolved_or_refused() -> None:
    assert resolve_device("cpu").type == "cpu"
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(InputError, match="toaster"):
        resolve_device("toaster")
    with pytest.raises(SystemStateError, match="cuda:63"):
        resolve_device("cuda:63")
