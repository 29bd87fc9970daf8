"""The paper's three stages as plainly as they can be written, to measure the package against.

Written from Kwon et al. 2022. No straw man: everything is vectorised; batches go from long rows to short
ones; the hidden states that enter a layer are cached, so that no layer runs twice for another one's sake and
no LSMR iteration repeats a forward pass; the samples, batches and threads are those of the package. What the
package does differently is not done here: the tall matrix of the least-squares problem is multiplied as it
is, once forward and once transposed per LSMR iteration.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, lsmr
from torch import Tensor, nn

from deploy_prune.archs import per_layer
from deploy_prune.batches import Batch
from deploy_prune.costs import Budget
from deploy_prune.heads import Head
from deploy_prune.layerwise import LayerRunner, StateCache, Stop, Taps
from deploy_prune.masking import mask_model
from deploy_prune.rearrange import rearrange
from deploy_prune.search import Minimum, search
from deploy_prune.units import MaskSet, SlicePlan, UnitGroup

DAMP = 1.0


@dataclass
class Timing:
    """Hold the seconds of each stage and the multiply-adds that tuning did."""

    seconds: dict[str, float] = field(default_factory=dict)
    lsmr_iterations: int = 0
    tuning_flops: float = 0.0


def run_reference(
    model: nn.Module, groups: Sequence[UnitGroup], head: Head, feeds: Sequence[Batch], keep: float, seq_len: int
) -> tuple[MaskSet, Timing]:
    """Return the tuned masks and what each stage took."""
    timing = Timing()

    started = time.perf_counter()
    gradients = mask_gradients(model, groups, head, feeds)
    timing.seconds["calibrate"] = time.perf_counter() - started

    started = time.perf_counter()
    scores = {name: g.square().sum(0).double().numpy() for name, g in gradients.items()}
    masks, teacher_masks = (
        search(groups, scores, Budget(share).limits(groups, seq_len, 0), Minimum(), method="paper").masks
        for share in (keep, math.sqrt(keep))
    )
    timing.seconds["search"] = time.perf_counter() - started

    started = time.perf_counter()
    masks, teacher_masks = (rearrange(groups, m, gradients)[0] for m in (masks, teacher_masks))
    timing.seconds["rearrange"] = time.perf_counter() - started

    started = time.perf_counter()
    masks = tune(model, groups, head, feeds, masks, teacher_masks, timing)
    timing.seconds["compensate"] = time.perf_counter() - started
    return masks, timing


def mask_gradients(
    model: nn.Module, groups: Sequence[UnitGroup], head: Head, feeds: Sequence[Batch]
) -> dict[str, Tensor]:
    """Return the gradient of each mini-batch's mean loss to the masks (batches, units)."""
    found: dict[str, list[Tensor]] = {g.name: [] for g in groups}
    for p in model.parameters():
        p.requires_grad_(False)
    for batch in feeds:
        masks = {g.name: torch.ones(g.size, requires_grad=True) for g in groups}
        handles = [
            model.get_submodule(g.consumer).register_forward_pre_hook(
                lambda module, args, m=masks[g.name], w=g.width: (args[0] * m.repeat_interleave(w),)
            )
            for g in groups
        ]
        loss = head.loss(head.outputs(model, batch.inputs), batch.labels, batch.inputs["attention_mask"]).mean()  # type: ignore[arg-type]
        for g, grad in zip(groups, torch.autograd.grad(loss, list(masks.values())), strict=True):
            found[g.name].append(grad)
        for handle in handles:
            handle.remove()
    return {name: torch.stack(parts) for name, parts in found.items()}


@torch.no_grad()
def tune(
    model: nn.Module,
    groups: Sequence[UnitGroup],
    head: Head,
    feeds: Sequence[Batch],
    masks: MaskSet,
    teacher_masks: MaskSet,
    timing: Timing,
) -> MaskSet:
    """Tune the masks bottom up by LSMR; both models are masked, hence as slow as the dense one."""
    tuned = MaskSet({name: mask.copy() for name, mask in masks.items()})
    device = next(model.parameters()).device
    cache = StateCache(feeds, groups[0].hidden, 2, device)
    teacher = LayerRunner(_masked(model, groups, teacher_masks), head, feeds, cache)
    student = LayerRunner(_masked(model, groups, tuned), head, feeds, cache)
    for layer in per_layer(groups):
        wanted = _run_teacher(teacher, layer, head)
        for g, targets in zip(layer, wanted, strict=True):
            kept = np.flatnonzero(tuned[g.name])
            columns = torch.tensor(g.columns(kept))
            consumer: Any = student.model.get_submodule(g.consumer)
            inputs, rests = [], []
            for number, target in enumerate(targets):
                h, residual = _run_student(student, number, g, head, last=g is groups[-1])
                inputs.append(h[:, columns])
                rests.append(target - residual - consumer.bias)
            scales, iterations = _solve(torch.cat(inputs), torch.cat(rests), consumer.weight[:, columns], g.width)
            timing.lsmr_iterations += iterations
            timing.tuning_flops += 4.0 * iterations * sum(h.numel() for h in inputs) * g.hidden
            if np.abs(scales).max() <= 10:
                tuned[g.name][kept] = scales
                consumer.unit_mask.copy_(torch.from_numpy(tuned[g.name]).repeat_interleave(g.width))
        for number in range(len(feeds)):
            student.run(number)
        student.step()
    return tuned


def _masked(model: nn.Module, groups: Sequence[UnitGroup], masks: MaskSet) -> nn.Module:
    return mask_model(model, groups, SlicePlan.from_masks(groups, masks))


def _run_teacher(teacher: LayerRunner, layer: Sequence[UnitGroup], head: Head) -> list[list[Tensor]]:
    """Return each sub-layer's output plus residual by batch (tokens, d), running one layer once per batch."""
    residuals = {g.name: teacher.model.get_submodule(g.residual) for g in layer}
    outputs = {g.name: teacher.model.get_submodule(g.consumer) for g in layer}
    wanted: list[list[Tensor]] = [[] for _ in layer]
    final = teacher.depth == len(teacher.paths) - 1
    for number, feed in enumerate(teacher.feeds):
        with Taps(residuals) as before, Taps(outputs) as after:
            teacher.run(number)
        for position, g in enumerate(layer):
            cls = final and g is layer[-1] and head.kind == "classification"
            wanted[position].append(_tokens(after.outputs[g.name] + before.inputs[g.name], feed, cls))
    teacher.step()
    return wanted


def _run_student(student: LayerRunner, number: int, group: UnitGroup, head: Head, last: bool) -> tuple[Tensor, Tensor]:
    """Return a projection's masked inputs (tokens, n) and its residual (tokens, d)."""
    hidden, args, kwargs = student.inputs(number)
    modules = {"r": student.model.get_submodule(group.residual), "h": student.model.get_submodule(group.consumer)}
    with Taps(modules, stop_at="h") as taps, suppress(Stop):
        student.layer(student.depth)(hidden, *args, **kwargs)
    feed, cls = student.feeds[number], last and head.kind == "classification"
    return _tokens(taps.inputs["h"], feed, cls), _tokens(taps.inputs["r"], feed, cls)


def _tokens(states: Tensor, feed: Batch, cls: bool) -> Tensor:
    """Return the unpadded tokens of (B, T, d), or the first of each row."""
    return states[:, 0] if cls else states[feed.inputs["attention_mask"].bool()]


def _solve(h: Tensor, y: Tensor, weight: Tensor, width: int) -> tuple[np.ndarray, int]:
    """Return the scales min |A s - y|^2 + |s - 1|^2, A s = (h * s) W^T, and LSMR's iterations."""
    units = h.shape[1] // width

    def forward(s: np.ndarray) -> np.ndarray:
        scaled = weight * torch.from_numpy(s).float().repeat_interleave(width)
        return (h @ scaled.T).flatten().double().numpy()

    def backward(z: np.ndarray) -> np.ndarray:
        back = torch.from_numpy(z).float().reshape(y.shape) @ weight  # (tokens, n)
        return (back * h).sum(0).reshape(units, width).sum(1).double().numpy()

    operator: Any = LinearOperator((y.numel(), units), matvec=forward, rmatvec=backward, dtype=np.float64)
    rest = y.flatten().double().numpy() - forward(np.ones(units))
    solution = lsmr(operator, rest, damp=DAMP, maxiter=5 * units)
    return 1 + solution[0], int(solution[2])
