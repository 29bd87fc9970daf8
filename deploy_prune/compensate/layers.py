"""One sweep over the layers, bottom up: refit each output projection on the already compensated model below it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..archs import per_layer
from ..batches import Batch, Batches
from ..heads import Head
from ..layerwise import DEFAULT_CACHE_BYTES, LayerRunner, StateCache, Stop, Taps
from ..masking import OutputWeights
from ..moments import Moments
from ..progress import Progress
from ..units import SlicePlan, UnitGroup
from .solution import Solution, Solver

HELD_OUT_EVERY = 8  # batches, of which the last is held out; they go from long rows to short ones


@dataclass(frozen=True)
class GroupLog:
    """Record one group's outcome: mean squared error per token before and after, and why it was declined."""

    group: str
    accepted: bool
    residual_before: float
    residual_after: float
    reason: str | None = None
    ridge: float | None = None


@dataclass
class SweepResult:
    """Hold the new projections, the mask tuning's scales, and the log of every group."""

    updates: dict[str, OutputWeights]
    scales: dict[str, Tensor]
    log: list[GroupLog]
    state_bytes: int = 0  # of hidden states kept while it ran


@torch.no_grad()
def sweep(
    student: nn.Module,
    teacher: nn.Module,
    groups: Sequence[UnitGroup],
    plan: SlicePlan,
    head: Head,
    batches: Batches,
    solver: Solver,
    saliency: Mapping[str, Tensor] | None = None,
    progress: Progress = lambda share: None,
    *,
    cache_bytes: int = DEFAULT_CACHE_BYTES,
) -> SweepResult:
    """Compensate a sliced student in place, sub-layer by sub-layer, towards the teacher.

    The target of a projection is the teacher's output plus its residual, less the student's residual:
    y = (W_T h_T + b_T) + r_T - r_S, over unpadded tokens. `saliency` (rows, longest) per group is the
    calibration's; without it every token weighs the same. A declined group keeps its weights and never
    stops the others. At most `cache_bytes` of hidden states are kept.
    """
    device = next(student.parameters()).device
    feeds = list(batches)
    layers = per_layer(groups)
    result = SweepResult({}, {}, [])
    widest = max(len(part) for part in layers)
    with StateCache(feeds, groups[0].hidden, _arrays(groups), device, cache_bytes) as cache:
        result.state_bytes = cache.kept_bytes
        below_t, below_s = (LayerRunner(model, head, feeds, cache) for model in (teacher, student))
        kept_targets = [cache.role() for _ in range(widest)]
        for depth, layer_groups in enumerate(layers):
            for number in range(len(feeds)):
                if cache.holds(number):
                    for role, target in zip(kept_targets, _targets(below_t, number, layer_groups), strict=False):
                        role.put(number, target)
            below_t.step()
            for position, g in enumerate(layer_groups):
                last = depth == len(layers) - 1 and position == len(layer_groups) - 1
                cls_only = solver.cls_only_last and last and head.kind in ("classification", "regression")
                salient = saliency[g.name] if saliency is not None else None
                columns = plan[g.name].count * g.width
                moments = Moments(columns, g.hidden, device)
                held = Moments(columns, g.hidden, device) if solver.holds_out else None
                for number, feed in enumerate(feeds):
                    kept = kept_targets[position].get(number)
                    target = _targets(below_t, number, layer_groups, depth)[position] if kept is None else kept
                    h, residual = _student_inputs(below_s, number, g)
                    weights = token_weights(feed.to(device), cls_only, solver.salient_share, salient)
                    into = held if held is not None and number % HELD_OUT_EVERY == HELD_OUT_EVERY - 1 else moments
                    into.add(h[..., :columns], target - residual, weights)
                _solve(student, g, plan, moments, held, solver, result)
                progress((depth + (position + 1) / len(layer_groups)) / len(layers))
            if depth < len(layers) - 1:
                for number in range(len(feeds)):
                    if cache.holds(number):
                        below_s.run(number)
                below_s.step()
    return result


def state_bytes(groups: Sequence[UnitGroup], batches: Batches, device: torch.device, most_bytes: int) -> int:
    """Return how many bytes of hidden states a sweep will keep."""
    return StateCache(list(batches), groups[0].hidden, _arrays(groups), device, most_bytes).kept_bytes


def _arrays(groups: Sequence[UnitGroup]) -> int:
    """Count the arrays of states: the teacher's, the student's, and a target for each group of a layer."""
    return 2 + max(len(part) for part in per_layer(groups))


def _targets(teacher: LayerRunner, number: int, groups: Sequence[UnitGroup], depth: int | None = None) -> list[Tensor]:
    """Return each sub-layer's output plus residual (B, T, d) in the teacher, running one of its layers.

    Without `depth` it is the current layer, and what it gives is kept for the next one.
    """
    residuals = Taps({g.name: teacher.model.get_submodule(g.residual) for g in groups})
    outputs = Taps({g.name: writer(teacher.model, g) for g in groups})
    with residuals, outputs:
        if depth is None:
            teacher.run(number)
        else:
            hidden, args, kwargs = teacher.inputs(number, depth)
            teacher.layer(depth)(hidden, *args, **kwargs)
    return [outputs.outputs[g.name] + residuals.inputs[g.name] for g in groups]


def writer(model: nn.Module, group: UnitGroup) -> Any:
    """Return the module that writes a sub-layer's output: its projection, or what stands for it when empty."""
    try:
        return model.get_submodule(group.consumer)
    except AttributeError:
        return model.get_submodule(group.core)


def _student_inputs(student: LayerRunner, number: int, group: UnitGroup) -> tuple[Tensor, Tensor]:
    """Run the student's layer up to one projection; return its inputs (B, T, n) and the residual (B, T, d)."""
    hidden, args, kwargs = student.inputs(number)
    modules = {"residual": student.model.get_submodule(group.residual), "h": writer(student.model, group)}
    with Taps(modules, stop_at="h") as taps:
        try:
            student.layer(student.depth)(hidden, *args, **kwargs)
        except Stop:
            return taps.inputs["h"], taps.inputs["residual"]
    raise RuntimeError(f"{group.consumer} did not run")


def _solve(
    student: nn.Module,
    group: UnitGroup,
    plan: SlicePlan,
    moments: Moments,
    held: Moments | None,
    solver: Solver,
    result: SweepResult,
) -> None:
    module = writer(student, group)
    bias = module.bias
    weight = module.weight if plan[group.name].count else bias.new_zeros(group.hidden, 0)
    solution = solver.solve(group, weight, bias, moments, held)
    entry = _judge(group, solution, moments if held is None else moments + held)
    result.log.append(entry)
    if not entry.accepted:
        return
    if plan[group.name].count:
        module.weight.copy_(solution.weight)
    module.bias.copy_(solution.bias)
    if solution.scales is not None:
        result.scales[group.name] = solution.scales
    else:
        result.updates[group.name] = OutputWeights(solution.weight.clone(), solution.bias.clone())


def _judge(group: UnitGroup, solution: Solution, moments: Moments) -> GroupLog:
    """Accept or decline a proposal; here alone the host waits for the device."""
    reason = solution.decline_reason()
    tokens = max(float(moments.count), 1.0)
    before, after = float(solution.before) / tokens, float(solution.after) / tokens
    ridge = None if solution.ridge is None else float(solution.ridge)
    return GroupLog(group.name, reason is None, before, after if reason is None else before, reason, ridge)


def token_weights(batch: Batch, cls_only: bool, share: float, saliency: Tensor | None) -> Tensor:
    """Return the weight of every token (B, T), whose mean over a row's unpadded tokens is 1.

    A part `share` of a row's weight is dealt out by saliency, the rest evenly.
    """
    mask = batch.inputs["attention_mask"]
    if cls_only:
        first = torch.zeros_like(mask)
        first[:, 0] = 1
        return first
    if saliency is None or share == 0:
        return mask
    index = torch.tensor(batch.index, device=mask.device)
    found = saliency[index, : mask.shape[1]] * mask
    total = found.sum(1, keepdim=True)
    even = mask / mask.sum(1, keepdim=True)
    found = torch.where(total > 0, found / total.clamp(min=torch.finfo(found.dtype).tiny), even)
    return mask.sum(1, keepdim=True) * ((1 - share) * even + share * found)
