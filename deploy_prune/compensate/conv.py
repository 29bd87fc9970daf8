"""One sweep over a convolutional network, in the order it runs: refit each layer on those refitted before it."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..archs.conv import ChannelGraph, Layer
from ..channel_masking import read_projection, write_projection
from ..graph_runner import DEFAULT_CACHE_BYTES, GraphRunner
from ..masking import OutputWeights
from ..moments import Moments, MomentSums
from ..parallel import ordered
from ..patches import by_position, is_convolution, patches, some_positions
from ..progress import Progress
from ..units import Reader, SlicePlan
from .layers import HELD_OUT_EVERY, GroupLog, SweepResult
from .solution import Solution, Solver


@torch.no_grad()
def sweep_channels(
    model: nn.Module,
    graph: ChannelGraph,
    plan: SlicePlan,
    feeds: Sequence[Tensor],
    index: Sequence[Sequence[int]],
    solver: Solver,
    saliency: Mapping[str, Tensor] | None = None,
    *,
    numbers: Sequence[int] | None = None,
    teacher: nn.Module | None = None,
    only_cut: bool = False,
    progress: Progress = lambda share: None,
    cache_bytes: int = DEFAULT_CACHE_BYTES,
) -> SweepResult:
    """Refit a pruned copy of a dense model layer by layer towards it; the updates go by the layers' paths.

    A layer is a convolution or Linear with the batch norm behind it. Its target is the dense model's output, plus what
    is added to it there, less what is added to it here: y = z_T + r_T - r_S. All layers from the first cut on are
    refitted, since what they read has changed; `only_cut` leaves it at those that lost inputs. `feeds` are batches of
    images, `index` their rows in `saliency` (rows, positions), by which a part of the positions' weight is dealt out,
    `numbers` those of the batches among all processes' (default: 0, 1, ...).
    The pruned copy keeps the dense shapes: its cut channels are computed and read by nothing. `teacher` is followed in
    the dense model's place; it has the same shapes.
    """
    student = ignoring(model, graph, plan)
    teacher_runs = GraphRunner(teacher or model, graph.program, feeds, cache_bytes // 2)
    student_runs = GraphRunner(student, graph.program, feeds, cache_bytes // 2)
    numbers = range(len(feeds)) if numbers is None else numbers
    result = SweepResult({}, {}, [])
    todo = refittable(graph, plan, only_cut)
    for number, layer in enumerate(todo):
        teacher_runs.advance(layer.node)
        student_runs.advance(layer.node)
        site = Site(student, graph, plan, layer)
        fit, held = site.moments(), site.moments() if solver.holds_out else None
        for batch, counted in ordered(numbers):
            y, *r_t = teacher_runs.values(batch, [n for n in (layer.output, layer.partner) if n])
            x, *r_s = student_runs.values(batch, [n for n in (layer.source, layer.partner) if n])
            y = by_position(site.module, y + r_t[0] - r_s[0] if layer.partner else y, len(feeds[batch]))[..., site.rows]
            felt = (saliency or {}).get(layer.path)
            weights = position_weights(
                y, None if felt is None else felt[torch.tensor(index[batch])], solver.salient_share
            )
            at = some_positions(y.shape[1], counted)
            out = held is not None and counted % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
            h = site.patches(x, len(y), at)
            (held if out and held is not None else fit).add(h, y[:, at], weights[:, at], counted)
        site.solve(solver, fit.total(), None if held is None else held.total(), result)
        progress((number + 1) / len(todo))
    result.state_bytes = teacher_runs.kept_bytes + student_runs.kept_bytes
    return result


def ignoring(model: nn.Module, graph: ChannelGraph, plan: SlicePlan) -> nn.Module:
    """Return a copy of the dense model whose readers give cut channels no weight, and kept ones their scale."""
    student = copy.deepcopy(model)
    masks = plan.masks()
    for g in graph.groups:
        for reader in g.readers:
            weight: Any = student.get_parameter(f"{reader.path}.weight")
            scale = torch.as_tensor(masks[g.name]).repeat_interleave(reader.width).to(weight)
            with torch.no_grad():
                weight.copy_((weight.flatten(1) * scale).reshape(weight.shape))
    return student


def refittable(graph: ChannelGraph, plan: SlicePlan, only_cut: bool) -> list[Layer]:
    """Return the layers that can and need to be refitted, in the order they run.

    One whose weight is used again stays as it is: fitted to its first run, it would be wrong in the others.
    """
    cut = {g.name for g in graph.groups if plan[g.name].count < g.size}
    empty = {g.name for g in graph.groups if not plan[g.name].count}
    found, begun = [], False
    for layer in graph.layers:
        begun = begun or layer.reads in cut
        if layer.grouped or layer.shared or layer.writes in empty:
            continue
        if not (layer.reads in cut or (begun and not only_cut)):
            continue
        found.append(layer)
    return found


class Site:
    """Hold one layer of the student: its kept outputs (`rows`) and the columns of the inputs that it still reads."""

    def __init__(self, student: nn.Module, graph: ChannelGraph, plan: SlicePlan, layer: Layer) -> None:
        self.student, self.layer, self.keeps = student, layer, graph.keeps(plan)
        self.module: Any = student.get_submodule(layer.path)
        self.device = next(student.parameters()).device
        rows = self.keeps.get(layer.writes, tuple(range(layer.outputs)))
        read = self.keeps.get(layer.reads, tuple(range(layer.inputs)))
        self.rows = torch.tensor(rows, device=self.device)
        self.read = torch.tensor(read, dtype=torch.long, device=self.device)
        columns = Reader(layer.path, layer.spread, layer.taps).columns(read)
        self.columns = torch.tensor(columns, dtype=torch.long, device=self.device)
        self.shifts = bool(layer.norm) or self.module.bias is not None

    def moments(self) -> MomentSums:
        return MomentSums(len(self.columns), len(self.rows), self.device)

    def patches(self, x: Tensor, rows: int, at: Tensor) -> Tensor:
        """Return what the layer reads of `rows` images at some positions (rows, positions, columns)."""
        if is_convolution(self.module):
            return patches(self.module, x[:, self.read], rows, at)
        return patches(self.module, x, rows, at)[..., self.columns]

    def solve(self, solver: Solver, fit: Moments, held: Moments | None, result: SweepResult) -> None:
        """Refit the layer, write the result into the student and note it."""
        old = read_projection(self.student, self.layer)
        weight, bias = old.weight[self.rows][:, self.columns], old.bias[self.rows]
        parts = [fit] if held is None else [fit, held]
        if not self.shifts:
            parts = [p.uncentred() for p in parts]
        width = Reader(self.layer.path, self.layer.spread, self.layer.taps)
        solution = solver.solve(width, weight, bias, *parts)  # type: ignore[arg-type]
        entry = judge(self.layer.path, solution, fit if held is None else fit + held)
        result.log.append(entry)
        if entry.accepted:
            self.write(OutputWeights(solution.weight, solution.bias), old)
            result.updates[self.layer.path] = OutputWeights(solution.weight.float(), solution.bias.float())

    def write(self, new: OutputWeights, old: OutputWeights) -> None:
        weight, bias = old.weight.clone(), old.bias.clone()
        weight[self.rows[:, None], self.columns] = new.weight.to(weight)
        bias[self.rows] = new.bias.to(bias)
        write_projection(self.student, self.layer, OutputWeights(weight, bias))


def judge(path: str, solution: Solution, moments: Moments) -> GroupLog:
    """Accept or decline a proposal; here alone the host waits for the device."""
    reason = solution.decline_reason()
    count = max(float(moments.count), 1.0)
    before, after = float(solution.before) / count, float(solution.after) / count
    ridge = None if solution.ridge is None else float(solution.ridge)
    return GroupLog(path, reason is None, before, after if reason is None else before, reason, ridge)


def position_weights(y: Tensor, saliency: Tensor | None, share: float) -> Tensor:
    """Return the weight of every position (B, positions), whose mean over an image is 1."""
    even = y.new_ones(y.shape[:2])
    if saliency is None or share == 0:
        return even
    found = saliency.to(y)
    mean = found.mean(1, keepdim=True)
    found = torch.where(mean > 0, found / mean.clamp(min=torch.finfo(found.dtype).tiny), even)
    return (1 - share) * even + share * found
