"""Calibration of a model whose layers visit the device one at a time: forward layer by layer, and back again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from . import parallel
from .archs import per_layer
from .batches import Batch, Batches
from .calibration import CalibrationStats, GroupSums, frozen, gradient_hook, hash_rows, losses, mask_hook
from .heads import Head
from .layerwise import LayerRunner, StateCache, first
from .offload import HOME
from .progress import Progress
from .tasks.base import Row
from .units import UnitGroup


def calibrate_by_layers(
    model: nn.Module,
    groups: Sequence[UnitGroup],
    head: Head,
    rows: Sequence[Row],
    *,
    pad_id: int = 0,
    label_free: bool = False,
    seed: int = 0,
    forward_dtype: torch.dtype = torch.float32,
    gradient_moments: bool = False,
    progress: Progress = lambda share: None,
) -> CalibrationStats:
    """Return what `calibrate` does, with one layer's weights, masks and statistics on the device at a time.

    Every layer runs twice: forward over all batches, whose hidden states are kept in main memory or on disk, and once
    more from the top down, where the loss's gradient at a layer's output goes on to its masks and its input.

    Raises InputError as `calibrate`, SystemStateError where the hidden states find no room.
    """
    batches = Batches(rows, head, pad_id)
    calibration = _Calibration(model, groups, head, list(batches.shared()), rows, forward_dtype)
    depths, told = len(calibration.layers), _Steps(progress, 2 * len(calibration.layers) + 1)
    parts: dict[str, dict[str, Tensor]] = {"gradients": {}, "saliency": {}, "squares": {}, "moments": {}}
    with frozen(model):
        for depth in range(depths):
            calibration.forward(depth)
            told()
        tokens, loss = calibration.top(label_free, seed)
        told()
        for depth in reversed(range(depths)):
            found = calibration.backward(depth, gradient_moments)
            for what in parts:  # taken out, so that nothing of this layer's is on the device beside the next one's
                parts[what] = {name: part.to(HOME) for name, part in found.pop(what).items()} | parts[what]
            told()
    calibration.runner.rotation.release()
    return CalibrationStats(
        gradients=parts["gradients"],
        saliency=parts["saliency"],
        activation_squares=parts["squares"],
        gradient_moments=parts["moments"],
        tokens=tokens.to(HOME),
        mean_length=float(np.mean([r.length for r in rows])),
        mean_loss=loss.to(HOME) / len(rows),
        sample_hash=hash_rows(rows),
        label_free=label_free,
    )


class _Calibration:
    """Hold what enters every layer (B, T, d) and leaves the last, from the top down replaced by the loss's gradient."""

    def __init__(
        self,
        model: nn.Module,
        groups: Sequence[UnitGroup],
        head: Head,
        feeds: Sequence[Batch],
        rows: Sequence[Row],
        dtype: torch.dtype,
    ) -> None:
        self.model, self.head, self.feeds, self.layers = model, head, feeds, per_layer(groups)
        self.rows, self.longest = len(rows), max(r.length for r in rows)
        arrays = len(self.layers) + 1
        whole = StateCache(feeds, groups[0].hidden, arrays, next(model.parameters()).device, None, kept_on=HOME)
        self.runner = LayerRunner(model, head, feeds, whole)
        self.device = self.runner.device
        self.states = [self.runner.states, *(whole.role() for _ in self.layers)]
        self.cast = torch.autocast(self.device.type, dtype=dtype, enabled=dtype != torch.float32)
        self.tuples = False  # layers give their hidden states in one

    @torch.no_grad()
    def forward(self, depth: int) -> None:
        """Run one layer on all batches."""
        layer = self.runner.layer(depth)
        for number in range(len(self.feeds)):
            hidden, args, kwargs = self.runner.inputs(number, 0)
            if depth:
                hidden = self._known(depth, number)
            else:
                self.states[0].put(number, hidden)
            with self.cast:
                left = layer(hidden, *args, **kwargs)
            self.tuples = isinstance(left, tuple)
            self.states[depth + 1].put(number, first(left).float())

    def top(self, label_free: bool, seed: int) -> tuple[Tensor, Tensor]:
        """Run what stands above the layers; return the unpadded tokens and the sum of the losses, over all rows."""
        tokens, loss_sum = parallel.SectionSum((), self.device), parallel.SectionSum((), self.device)
        for number, batch in enumerate(self.feeds):
            batch = batch.to(self.device)
            top = self._known(-1, number).requires_grad_()
            with torch.enable_grad(), self._standing_in(top), self.cast:
                outputs = {k: v.float() for k, v in self.head.outputs(self.model, batch.inputs).items()}
                loss = losses(self.head, outputs, batch, label_free, seed)
            (grad,) = torch.autograd.grad(loss.sum(), [top])
            self.states[-1].put(number, grad)
            loss_sum.add(batch.number % parallel.sections(), loss.detach().double().sum())
            tokens.add(batch.number % parallel.sections(), batch.mask.sum())
        return tokens.total().long(), loss_sum.total()

    def backward(self, depth: int, moments: bool) -> dict[str, dict[str, Tensor]]:
        """Run one layer again with masks, and hand the gradient at its output on to them and to its input."""
        layer, groups = self.runner.layer(depth), self.layers[depth]
        seen = {g.name: GroupSums(g, self.rows, self.longest, self.device, moments) for g in groups}
        gradients = {g.name: torch.zeros(self.rows, g.size, device=self.device) for g in groups}
        for number, batch in enumerate(self.feeds):
            batch = batch.to(self.device)
            index, section = torch.tensor(batch.index, device=self.device), batch.number % parallel.sections()
            _, args, kwargs = self.runner.inputs(number, 0)
            hidden = self._known(depth, number).requires_grad_()
            masks = {g.name: torch.ones(len(index), g.size, device=self.device, requires_grad=True) for g in groups}
            with ExitStack() as stack:
                for g in groups:
                    consumer, sums = self.model.get_submodule(g.consumer), seen[g.name]
                    before = mask_hook(masks[g.name], g.width, sums, section, batch.mask)
                    stack.callback(consumer.register_forward_pre_hook(before).remove)
                    stack.callback(consumer.register_forward_hook(gradient_hook(sums, section, index)).remove)
                with torch.enable_grad(), self.cast:
                    left = first(layer(hidden, *args, **kwargs)).float()
                above = self._known(depth + 1, number)
                *grads, below = torch.autograd.grad(left, [*masks.values(), hidden], grad_outputs=above)
            for name, grad in zip(masks, grads, strict=True):
                gradients[name].index_copy_(0, index, grad.float())
            self.states[depth].put(number, below)
        return {
            "gradients": {name: parallel.fill(found) for name, found in gradients.items()},
            "saliency": {name: parallel.fill(sums.saliency) for name, sums in seen.items()},
            "squares": {name: sums.squares.total() for name, sums in seen.items()},
            "moments": {name: sums.moments.total() for name, sums in seen.items() if sums.moments is not None},
        }

    def _known(self, depth: int, number: int) -> Tensor:
        found = self.states[depth].get(number)
        assert found is not None  # every batch has room
        return found

    @contextmanager
    def _standing_in(self, top: Tensor) -> Iterator[None]:
        """Let the layers compute nothing: the last one hands on `top` (B, T, d), in the form that layers give."""
        layers: Sequence[Any] = self.runner.rotation.layers
        for layer in layers:
            layer.forward = lambda hidden, *args, **kwargs: (hidden,) if self.tuples else hidden
        layers[-1].forward = lambda *args, **kwargs: (top,) if self.tuples else top
        try:
            yield
        finally:
            for layer in layers:
                del layer.forward  # the class's own comes back


class _Steps:
    def __init__(self, progress: Progress, total: int) -> None:
        self.progress, self.total, self.done = progress, total, 0

    def __call__(self) -> None:
        self.done += 1
        self.progress(self.done / self.total)
