"""One sweep over the layers, bottom up: refit each output projection on the already compensated model below it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..archs import arch_of, per_layer
from ..batches import Batch, Batches
from ..heads import Head
from ..masking import OutputWeights
from ..progress import Progress
from ..units import SlicePlan, UnitGroup
from .moments import Moments
from .solution import Solution, Solver


@dataclass(frozen=True)
class GroupLog:
    """Record one group's outcome: mean squared error per token before and after, and why it was declined."""

    group: str
    accepted: bool
    residual_before: float
    residual_after: float
    reason: str | None = None


@dataclass
class SweepResult:
    """Hold the new projections, the mask tuning's scales, and the log of every group."""

    updates: dict[str, OutputWeights]
    scales: dict[str, Tensor]
    log: list[GroupLog]


class _Stop(Exception):
    """End a forward pass once everything wanted has been seen."""


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
) -> SweepResult:
    """Compensate a sliced student in place, sub-layer by sub-layer, towards the teacher.

    The target of a projection is the teacher's output plus its residual, less the student's residual:
    y = (W_T h_T + b_T) + r_T - r_S, over unpadded tokens. `saliency` (rows, longest) per group is the
    calibration's; without it every token weighs the same. A declined group keeps its weights and never
    stops the others.
    """
    device = next(student.parameters()).device
    paths = arch_of(student).layer_paths(student)
    layers = per_layer(groups)
    result = SweepResult({}, {}, [])
    feeds = list(batches)
    states_t: list[Tensor] = []
    states_s: list[Tensor] = []
    for depth, (path, layer_groups) in enumerate(zip(paths, layers, strict=True)):
        layer_t, layer_s = teacher.get_submodule(path), student.get_submodule(path)
        targets: dict[str, list[Tensor]] = {g.name: [] for g in layer_groups}
        for number, feed in enumerate(feeds):
            hidden, args, kwargs = _layer_inputs(teacher, paths[0], head, feed.to(device))
            if depth == 0:
                states_t.append(hidden)
                states_s.append(hidden)
            taps = Taps({g.residual: teacher.get_submodule(g.residual) for g in layer_groups})
            taps_out = Taps({g.name: writer(teacher, g) for g in layer_groups})
            with taps, taps_out:
                states_t[number] = _first(layer_t(states_t[number], *args, **kwargs))
            for g in layer_groups:
                targets[g.name].append(taps_out.outputs[g.name] + taps.inputs[g.residual])
        for position, g in enumerate(layer_groups):
            last = depth == len(paths) - 1 and position == len(layer_groups) - 1
            salient = saliency[g.name] if saliency is not None else None
            moments = Moments(plan[g.name].count * g.width, g.hidden, device)
            for number, feed in enumerate(feeds):
                batch = feed.to(device)
                _, args, kwargs = _layer_inputs(teacher, paths[0], head, batch)
                h, residual = _student_inputs(student, layer_s, g, states_s[number], args, kwargs)
                cls_only = solver.cls_only_last and last and head.kind in ("classification", "regression")
                moments.add(
                    h[..., : plan[g.name].count * g.width],
                    targets[g.name][number] - residual,
                    token_weights(batch, cls_only, solver.salient_share, salient),
                )
            _solve(student, g, plan, moments, solver, result)
            targets[g.name].clear()
            progress((depth + (position + 1) / len(layer_groups)) / len(paths))
        if depth < len(paths) - 1:
            for number, feed in enumerate(feeds):
                _, args, kwargs = _layer_inputs(teacher, paths[0], head, feed.to(device))
                states_s[number] = _first(layer_s(states_s[number], *args, **kwargs))
    return result


def writer(model: nn.Module, group: UnitGroup) -> Any:
    """Return the module that writes a sub-layer's output: its projection, or what stands for it when empty."""
    try:
        return model.get_submodule(group.consumer)
    except AttributeError:
        return model.get_submodule(group.core)


class Taps:
    """Record the first input and the output of modules while they run."""

    def __init__(self, modules: dict[str, nn.Module], stop_at: str = "") -> None:
        self.modules, self.stop_at = modules, stop_at
        self.inputs: dict[str, Tensor] = {}
        self.outputs: dict[str, Tensor] = {}

    def __enter__(self) -> Taps:
        self.handles = []
        for name, module in self.modules.items():
            self.handles.append(module.register_forward_pre_hook(self._before(name), with_kwargs=True))
            self.handles.append(module.register_forward_hook(self._after(name)))
        return self

    def __exit__(self, *exc: object) -> None:
        for handle in self.handles:
            handle.remove()

    def _before(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.inputs[name] = next(v for v in (*args, *kwargs.values()) if isinstance(v, Tensor))
            if name == self.stop_at:
                raise _Stop

        return hook

    def _after(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            self.outputs[name] = _first(output)

        return hook


def _student_inputs(
    student: nn.Module, layer: nn.Module, group: UnitGroup, hidden: Tensor, args: Any, kwargs: Any
) -> tuple[Tensor, Tensor]:
    """Run the student's layer up to one projection; return its inputs (B, T, n) and the residual (B, T, d)."""
    taps = Taps({"residual": student.get_submodule(group.residual), "h": writer(student, group)}, stop_at="h")
    with taps:
        try:
            layer(hidden, *args, **kwargs)
        except _Stop:
            return taps.inputs["h"], taps.inputs["residual"]
    raise RuntimeError(f"{group.consumer} did not run")


def _solve(
    student: nn.Module, group: UnitGroup, plan: SlicePlan, moments: Moments, solver: Solver, result: SweepResult
) -> None:
    module = writer(student, group)
    bias = module.bias
    weight = module.weight if plan[group.name].count else bias.new_zeros(group.hidden, 0)
    solution = solver.solve(group, weight, bias, moments)
    entry = _judge(group, solution, moments)
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
    return GroupLog(group.name, reason is None, before, after if reason is None else before, reason)


def _layer_inputs(model: nn.Module, first_layer: str, head: Head, batch: Batch) -> tuple[Tensor, Any, Any]:
    """Run the embeddings; return the first layer's hidden states (B, T, d) and its other arguments."""
    found: list[Any] = []

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.extend((args, kwargs))
        raise _Stop

    handle = model.get_submodule(first_layer).register_forward_pre_hook(hook, with_kwargs=True)
    try:
        head.outputs(model, batch.inputs)
    except _Stop:
        args, kwargs = found
        return args[0], args[1:], kwargs
    finally:
        handle.remove()
    raise RuntimeError(f"{first_layer} did not run")


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


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output
