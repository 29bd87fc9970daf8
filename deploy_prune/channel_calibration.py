"""One pass over the calibration images: mask gradients of channels, and what the loss feels at each layer's output."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from . import parallel
from .archs.conv import ChannelGraph, Layer
from .batches import Batches
from .calibration import CalibrationStats, frozen, losses
from .heads import Head
from .progress import Progress


def calibrate_channels(
    model: nn.Module,
    graph: ChannelGraph,
    head: Head,
    batches: Batches,
    *,
    sample_hash: str = "",
    label_free: bool = False,
    seed: int = 0,
    gradient_moments: bool = False,
    progress: Progress = lambda share: None,
) -> CalibrationStats:
    """Return d loss_n / d mask_c at mask = 1 for every image n and channel c, in one pass.

    The masks stand where the channels are read, one row per image; a group that is read several times has one mask.
    `saliency` (N, positions) and `gradient_moments` (d, d) go by the path of the layer, at its output behind the
    batch norm; a layer that no mask reaches has none. `activation_squares` (channels,) sum over all readers.

    Raises InputError for images without labels.
    Source: Kwon et al. 2022, section 3.1, with channels for heads.
    """
    device = next(model.parameters()).device
    rows, total = len(batches.rows), len(parallel.own(len(batches)))
    gradients = {g.name: torch.zeros(rows, g.size, device=device) for g in graph.groups}
    squares = {g.name: parallel.SectionSum((g.size,), device) for g in graph.groups}
    felt = {x.path: _Felt(x, rows, device, gradient_moments) for x in graph.layers}
    loss_sum = parallel.SectionSum((), device)
    with frozen(model):
        for done, batch in enumerate(batches.shared()):
            batch, section = batch.to(device), batch.number % parallel.sections()
            index = torch.tensor(batch.index, device=device)
            with ExitStack() as stack:
                masks = {
                    g.name: torch.ones(len(index), g.size, device=device, requires_grad=True) for g in graph.groups
                }
                for g in graph.groups:
                    for reader in g.readers:
                        module = model.get_submodule(reader.path)
                        hook = _mask_hook(masks[g.name], reader.spread, squares[g.name], section)
                        stack.callback(module.register_forward_pre_hook(hook).remove)
                for x in graph.layers:
                    module = model.get_submodule(x.norm or x.path)
                    stack.callback(module.register_forward_hook(felt[x.path].hook(index, section)).remove)
                stack.enter_context(torch.enable_grad())
                outputs = head.outputs(model, batch.inputs)
                loss = losses(head, outputs, batch, label_free, seed)
                grads = torch.autograd.grad(loss.sum(), [masks[g.name] for g in graph.groups])
            for g, grad in zip(graph.groups, grads, strict=True):
                gradients[g.name].index_copy_(0, index, grad.float())
            loss_sum.add(section, loss.detach().double().sum())
            progress((done + 1) / total)
    reached = {path: f for path, f in felt.items() if f.saliency is not None}
    return CalibrationStats(
        gradients={name: parallel.fill(found) for name, found in gradients.items()},
        saliency={path: parallel.fill(f.saliency) for path, f in reached.items() if f.saliency is not None},
        activation_squares={name: found.total() for name, found in squares.items()},
        gradient_moments={path: f.moments.total() for path, f in reached.items() if f.moments is not None},
        tokens=torch.tensor(rows, device=device),
        mean_length=1.0,
        mean_loss=loss_sum.total() / rows,
        sample_hash=sample_hash,
        label_free=label_free,
    )


def _mask_hook(mask: Tensor, spread: int, squares: parallel.SectionSum, section: int) -> Callable[..., tuple[Any, ...]]:
    columns = mask if spread == 1 else mask.repeat_interleave(spread, dim=1)

    def hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x = args[0]  # (B, C, H, W), or (B, ..., C * spread) of a Linear
        linear = isinstance(module, nn.Linear)
        axis = x.dim() - 1 if linear else 1
        seen = x.detach().float().square().sum([a for a in range(x.dim()) if a != axis])
        squares.add(section, seen.reshape(-1, spread).sum(1))
        shape = [len(columns), *[1] * (x.dim() - 1)]
        shape[axis] = columns.shape[1]
        return (x * columns.reshape(shape).to(x.dtype), *args[1:])

    return hook


class _Felt:
    """Gather the loss's gradient at one layer's output: its squared norm by position, its second moment by channel."""

    def __init__(self, layer: Layer, rows: int, device: torch.device, moments: bool) -> None:
        self.layer, self.rows, self.device = layer, rows, device
        self.saliency: Tensor | None = None
        self.moments: parallel.SectionSum | None = None
        self.wants_moments = moments

    def hook(self, index: Tensor, section: int) -> Callable[..., None]:
        def look(grad: Tensor) -> None:
            flat = by_position(grad.float())  # (B, T, d)
            if self.saliency is None:
                d = flat.shape[2]
                self.saliency = torch.zeros(self.rows, flat.shape[1], device=self.device)
                if self.wants_moments:
                    self.moments = parallel.SectionSum((d, d), self.device)
            self.saliency[index] = flat.square().sum(-1)
            if self.moments is not None:
                flat = flat.flatten(0, 1)
                self.moments.add(section, flat.T @ flat)

        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            if output.requires_grad:
                output.register_hook(look)

        return hook


def by_position(x: Tensor) -> Tensor:
    """Return a map (B, C, H, W) or features (B, ..., C) as (B, positions, C)."""
    return x.flatten(2).transpose(1, 2) if x.dim() == 4 else x.reshape(len(x), -1, x.shape[-1])
