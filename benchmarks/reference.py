"""The paper's three stages as plainly as they can be written, to measure the package against.

Written from Kwon et al. 2022. No straw man: everything is vectorised; batches go from long rows to short
ones; a layer's inputs are cached, so that no LSMR iteration repeats a forward pass; the samples, batches and
threads are those of the package. What the package does differently is not done here: the tall matrix of the
least-squares problem is multiplied as it is, once forward and once transposed per LSMR iteration.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, lsmr
from torch import Tensor, nn

from deploy_prune.batches import Batch
from deploy_prune.costs import Budget
from deploy_prune.heads import Head
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
    teacher = mask_model(model, groups, SlicePlan.from_masks(groups, teacher_masks))
    for g in groups:
        student = mask_model(model, groups, SlicePlan.from_masks(groups, tuned))
        kept = np.flatnonzero(tuned[g.name])
        columns = torch.tensor(g.columns(kept))
        weight = model.get_submodule(g.consumer).weight[:, columns]  # type: ignore[index]
        inputs, targets = [], []
        for batch in feeds:
            seen = batch.inputs["attention_mask"].bool()
            (_, y_teacher, r_teacher), (h, _, r_student) = (
                _watch(m, g, head, batch, seen, last=g is groups[-1]) for m in (teacher, student)
            )
            inputs.append(h[:, columns])
            bias = model.get_submodule(g.consumer).bias
            targets.append(y_teacher + r_teacher - r_student - bias)  # type: ignore[operator]
        h, y = torch.cat(inputs), torch.cat(targets)  # (tokens, n), (tokens, d)
        scales, iterations = _solve(h, y, weight, g.width)
        timing.lsmr_iterations += iterations
        timing.tuning_flops += 4.0 * iterations * h.numel() * weight.shape[0]
        if np.abs(scales).max() <= 10:
            tuned[g.name][kept] = scales
    return tuned


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


class _Enough(Exception):
    pass


def _watch(
    model: nn.Module, group: UnitGroup, head: Head, batch: Batch, seen: Tensor, last: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return a sub-layer's masked inputs, output and residual at the unpadded tokens (tokens, ...)."""
    kept: dict[str, Tensor] = {}
    consumer, residual = model.get_submodule(group.consumer), model.get_submodule(group.residual)

    def after(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        kept["h"], kept["y"] = args[0], output
        raise _Enough

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        kept["r"] = next(v for v in (*args, *kwargs.values()) if isinstance(v, Tensor))

    handles = [
        residual.register_forward_pre_hook(before, with_kwargs=True),
        consumer.register_forward_hook(after),
    ]
    try:
        head.outputs(model, batch.inputs)
    except _Enough:
        pass
    finally:
        for handle in handles:
            handle.remove()
    if last and head.kind == "classification":
        return tuple(kept[k][:, 0] for k in ("h", "y", "r"))  # type: ignore[return-value]
    return tuple(kept[k][seen] for k in ("h", "y", "r"))  # type: ignore[return-value]
