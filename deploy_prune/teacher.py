"""The model that scores look into and compensation follows: run layer by layer, its targets kept for all budgets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .archs import per_layer
from .batches import Batch
from .heads import Head
from .layerwise import DEFAULT_CACHE_BYTES, LayerRunner, StateCache, States, Taps, room
from .offload import HOME, Rotation
from .parallel import neighbours
from .units import UnitGroup

STUDENT_ARRAYS = 2  # of hidden states that whoever follows keeps: a layer's inputs, and those of its attention's output
Look = Callable[[int, dict[str, Tensor], dict[str, Tensor]], None]


class Teacher:
    """Run a model over batches, one layer after another, and keep what each sub-layer adds up to.

    A target is what a sub-layer and its residual add up to (B, T, d). Those of all layers are kept where they fit into
    `most_bytes` and half of the free room, which the processes of a machine share, so that later scores and budgets
    run nothing again; otherwise those of one layer at a time, and of as many batches as fit.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: Sequence[UnitGroup],
        head: Head,
        feeds: Sequence[Batch],
        most_bytes: int = DEFAULT_CACHE_BYTES,
        *,
        used_again: bool = True,
    ) -> None:
        self.layers = per_layer(groups)
        self.device = next(model.parameters()).device
        where = HOME if Rotation(model).moves else self.device
        self.whole, self.cache, self.spare_bytes = _plan(groups, feeds, self.device, most_bytes, used_again, where)
        self.runner = LayerRunner(model, head, feeds, self.cache)
        self._targets: dict[str, States] = {}
        self._complete = False  # the targets of all layers are there

    @torch.no_grad()
    def visit(self, depth: int, look: Look | None = None) -> None:
        """Run a layer over all batches; one starts at layer 0 and takes each in turn.

        `look(number, inputs, outputs)` sees what enters (B, T, n) and leaves (B, T, d) the layer's output
        projections, by group. Without it nothing runs where the targets are known.
        """
        if look is None and self._complete:
            return
        runner, groups = self.runner, self.layers[depth]
        if depth == 0:
            runner.depth = 0
        if runner.depth != depth:
            raise RuntimeError(f"layer {runner.depth} comes before layer {depth}")
        keeps = not self._complete and (self.whole or look is None)
        roles = self._roles(groups) if keeps else []
        for number in range(len(runner.feeds)):
            if look is None and not self.cache.holds(number):
                continue
            inputs, outputs, targets = self._watch(groups, lambda number=number: runner.run(number))  # type: ignore[misc]
            for role, target in zip(roles, targets, strict=False):
                role.put(number, target)
            if look is not None:
                look(number, inputs, outputs)
        runner.step()
        self._complete = self._complete or (self.whole and keeps and depth == len(self.layers) - 1)

    @torch.no_grad()
    def target(self, number: int, group: UnitGroup) -> Tensor:
        """Return what a sub-layer and its residual add up to (B, T, d) for a batch; its layer has been visited."""
        kept = self._targets[group.name].get(number)
        if kept is not None:
            return kept
        depth = group.layer
        hidden, args, kwargs = self.runner.inputs(number, depth)
        return self._watch([group], lambda: self.runner.layer(depth)(hidden, *args, **kwargs))[2][0]

    def _roles(self, groups: Sequence[UnitGroup]) -> list[States]:
        """Return the arrays for a layer's targets: its own, or those that held the targets of the layer before."""
        free = [] if self.whole else list(self._targets.values())
        if not self.whole:
            self._targets = {}
        for g in groups:
            if g.name not in self._targets:
                self._targets[g.name] = free.pop() if free else self.cache.role()
        return [self._targets[g.name] for g in groups]

    def _watch(
        self, groups: Sequence[UnitGroup], run: Callable[[], Any]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor], list[Tensor]]:
        model = self.runner.model
        residuals = Taps({g.name: model.get_submodule(g.residual) for g in groups})
        writers = Taps({g.name: writer(model, g) for g in groups})
        with residuals, writers:
            run()
        targets = [writers.outputs[g.name] * gain_of(model, g) + residuals.inputs[g.name] for g in groups]
        return writers.inputs, writers.outputs, targets


def gain_of(model: nn.Module, group: UnitGroup) -> Tensor:
    """Return what a sub-layer's output is multiplied by before its residual is added: (d,), or 1."""
    return model.get_parameter(group.gain) if group.gain else torch.ones((), device=next(model.parameters()).device)


def writer(model: nn.Module, group: UnitGroup) -> Any:
    """Return the module that writes a sub-layer's output: its projection, or what stands for it when empty."""
    try:
        return model.get_submodule(group.consumer)
    except AttributeError:
        return model.get_submodule(group.core)


def state_bytes(groups: Sequence[UnitGroup], feeds: Sequence[Batch], device: torch.device, most_bytes: int) -> int:
    """Return how many bytes of hidden states a teacher and one student keep together."""
    _, cache, spare = _plan(groups, feeds, device, most_bytes)
    return cache.kept_bytes + StateCache(feeds, groups[0].hidden, STUDENT_ARRAYS, device, spare).kept_bytes


def _plan(
    groups: Sequence[UnitGroup],
    feeds: Sequence[Batch],
    device: torch.device,
    most_bytes: int,
    used_again: bool = True,
    kept_on: torch.device | None = None,
) -> tuple[bool, StateCache, int]:
    """Return whether the targets of all layers are kept, the teacher's cache, and a student's most bytes."""
    hidden = groups[0].hidden

    def teacher(arrays: int) -> tuple[StateCache, int]:
        share = most_bytes * arrays // (arrays + STUDENT_ARRAYS)
        return StateCache(feeds, hidden, arrays, device, share, kept_on), most_bytes - share

    every, spare = teacher(1 + len(groups))  # its own states, and each group's targets
    if used_again and every.kept_bytes == every.needed_bytes <= room(kept_on or device) // (2 * neighbours()):
        return True, every, spare
    return False, *teacher(1 + max(len(part) for part in per_layer(groups)))
