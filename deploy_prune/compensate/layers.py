"""One sweep over the layers, bottom up: refit each output projection on the already compensated model below it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..archs import per_layer
from ..batches import Batch, Batches
from ..heads import Head
from ..layerwise import LayerRunner, Replay, StateCache, Stop, Taps
from ..masking import OutputWeights
from ..moments import Moments, MomentSums
from ..progress import Progress
from ..teacher import STUDENT_ARRAYS, Look, Teacher, gain_of, writer
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
    teacher: Teacher,
    groups: Sequence[UnitGroup],
    plan: SlicePlan,
    head: Head,
    batches: Batches,
    solver: Solver,
    saliency: Mapping[str, Tensor] | None = None,
    progress: Progress = lambda share: None,
) -> SweepResult:
    """Compensate a sliced student in place, sub-layer by sub-layer, towards the teacher.

    The target of a projection is the teacher's output plus its residual, less the student's residual:
    y = (W_T h_T + b_T) + r_T - r_S, over unpadded tokens; where a gain follows the projection, both outputs are
    those behind it. A parallel solver is fitted on the teacher's own
    inputs h_T instead, at the units kept. `saliency` (rows, longest) per group is the calibration's; without it
    every token weighs the same. A declined group keeps its weights and never stops the others.
    """
    feeds = list(batches.shared())
    layers = per_layer(groups)
    result = SweepResult({}, {}, [])
    kept_on = teacher.cache.kept_on
    cache = StateCache(feeds, groups[0].hidden, STUDENT_ARRAYS, teacher.device, teacher.spare_bytes, kept_on)
    result.state_bytes = teacher.cache.kept_bytes + cache.kept_bytes
    below = Student(student, head, feeds, cache)
    for depth, layer_groups in enumerate(layers):
        sums = {}
        below.layer(depth)  # on the device from here on, also where it is not run
        for g in layer_groups:
            last = g is layers[-1][-1] and head.kind in ("classification", "regression")
            text = "input_ids" in feeds[0].inputs  # image models may read other tokens than the first
            cls_only = solver.cls_only_last and last and text
            salient = saliency[g.name].to(below.device) if saliency is not None else None
            sums[g.name] = _Sums(g, plan, solver, feeds, cls_only, salient, gain_of(student, g), below.device)
        teacher.visit(depth, _adder(sums) if solver.parallel else None)
        for position, g in enumerate(layer_groups):
            part = sums.pop(g.name)
            if not solver.parallel:
                for number in range(len(feeds)):
                    h, residual = below.watch(number, g, len(part.columns))
                    part.add(number, h, teacher.target(number, g) - residual)
            _solve(student, g, plan, part, solver, result, kept_on)
            progress((depth + (position + 1) / len(layer_groups)) / len(layers))
        if depth < len(layers) - 1 and not solver.parallel:
            for number in range(len(feeds)):
                if cache.holds(number):
                    below.run(number)
            below.step()
    below.rotation.release()
    return result


class _Sums:
    """Gather one group's moments, every eighth batch apart where the solver holds some out."""

    def __init__(
        self,
        group: UnitGroup,
        plan: SlicePlan,
        solver: Solver,
        feeds: Sequence[Batch],
        cls_only: bool,
        salient: Tensor | None,
        gain: Tensor,
        device: torch.device,
    ) -> None:
        self.columns = torch.tensor(group.columns(plan[group.name].kept), dtype=torch.long, device=device)
        self.feeds, self.cls_only, self.salient, self.share = feeds, cls_only, salient, solver.salient_share
        self.gain, self.device = gain, device
        self.fit = MomentSums(len(self.columns), group.hidden, device)
        self.held = MomentSums(len(self.columns), group.hidden, device) if solver.holds_out else None

    def add(self, number: int, h: Tensor, y: Tensor) -> None:
        """Add a batch's inputs (B, T, n) and targets (B, T, d)."""
        batch = self.feeds[number].to(self.device)
        weights = token_weights(batch, self.cls_only, self.share, self.salient)
        out = self.held is not None and batch.number % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
        (self.held if out and self.held is not None else self.fit).add(h, y, weights, batch.number)


def _adder(sums: Mapping[str, _Sums]) -> Look:
    """Return what adds the teacher's own inputs and outputs of a layer, at the kept units."""

    def look(number: int, inputs: dict[str, Tensor], outputs: dict[str, Tensor]) -> None:
        for name, part in sums.items():
            part.add(number, inputs[name][..., part.columns], outputs[name] * part.gain)

    return look


class Student(LayerRunner):
    """Run the student's layers; a layer's attention is computed once and replayed for the sub-layer behind it."""

    def __init__(self, model: nn.Module, head: Head, feeds: Sequence[Batch], cache: StateCache) -> None:
        super().__init__(model, head, feeds, cache)
        self.cores = cache.role()
        self.known: tuple[UnitGroup, int] | None = None  # whose projection's inputs are kept, and how many columns

    def watch(self, number: int, group: UnitGroup, columns: int) -> tuple[Tensor, Tensor]:
        """Run the layer up to one projection; return its inputs (B, T, columns) and the residual (B, T, d)."""
        hidden, args, kwargs = self.inputs(number)
        modules = {"residual": self.model.get_submodule(group.residual), "h": writer(self.model, group)}
        with self._replay(number, group), Taps(modules, stop_at="h") as taps, suppress(Stop):
            self.layer(self.depth)(hidden, *args, **kwargs)
        h = taps.inputs["h"][..., :columns]
        if group.core and 0 < columns <= group.hidden:
            self.cores.put(number, h)
            self.known = group, columns
        return h, taps.inputs["residual"]

    def run(self, number: int) -> None:
        with self._replay(number):
            super().run(number)

    def step(self) -> None:
        self.known = None
        super().step()

    def _replay(self, number: int, watched: UnitGroup | None = None) -> Any:
        kept = self.cores.get(number) if self.known and self.known[0] is not watched else None
        if kept is None or self.known is None:
            return nullcontext()
        group, columns = self.known
        return Replay(self.model, group, kept[..., :columns])


def _solve(
    student: nn.Module,
    group: UnitGroup,
    plan: SlicePlan,
    sums: _Sums,
    solver: Solver,
    result: SweepResult,
    kept_on: torch.device,
) -> None:
    module, moments = writer(student, group), sums.fit.total()
    held = None if sums.held is None else sums.held.total()
    bias = module.bias
    weight = module.weight if plan[group.name].count else bias.new_zeros(group.hidden, 0)
    gain = sums.gain  # the fit is of what reaches the residual stream
    solution = solver.solve(group, weight * gain.reshape(-1, 1), bias * gain, moments, held)
    entry = _judge(group, solution, moments if held is None else moments + held)
    result.log.append(entry)
    if not entry.accepted:
        return
    solution.weight = torch.where(gain.reshape(-1, 1) != 0, solution.weight / gain.reshape(-1, 1), weight)
    solution.bias = torch.where(gain != 0, solution.bias / gain, bias)
    if plan[group.name].count:
        module.weight.copy_(solution.weight)
    module.bias.copy_(solution.bias)
    if solution.scales is not None:
        result.scales[group.name] = solution.scales
    else:
        result.updates[group.name] = OutputWeights(
            solution.weight.to(kept_on, copy=True), solution.bias.to(kept_on, copy=True)
        )


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
    mask = batch.mask
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
