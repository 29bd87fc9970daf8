"""One pass over the calibration images: mask gradients of channels, and what the loss feels at each layer's output."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from . import parallel
from .archs.conv import ChannelGraph, Layer
from .batches import Batches
from .calibration import CalibrationStats, frozen, losses
from .heads import Head
from .patches import by_position, is_convolution
from .progress import Progress

_COMPUTING = (F.conv2d, F.linear, F.batch_norm)  # each has its weight, or running mean, as the second argument


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
    batch norm and before an activation, whichever module holds it; a layer that no mask reaches, or that runs more than
    once, has none. `activation_squares` (channels,) sum over all readers.

    Raises InputError for images without labels.
    Source: Kwon et al. 2022, section 3.1, with channels for heads.
    """
    device = next(model.parameters()).device
    rows, total = len(batches.rows), len(parallel.own(len(batches)))
    gradients = {g.name: torch.zeros(rows, g.size, device=device) for g in graph.groups}
    squares = {g.name: parallel.SectionSum((g.size,), device) for g in graph.groups}
    felt = {x.path: _Felt(model, x, rows, device, gradient_moments) for x in graph.layers if not x.shared}
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
                stack.enter_context(torch.enable_grad())
                with _Outputs({f.key: partial(f.see, index, section) for f in felt.values()}):
                    outputs = head.outputs(model, batch.inputs)
                loss = losses(head, outputs, batch, label_free, seed)
                wanted = [masks[g.name] for g in graph.groups]  # of a cut network some may not reach the loss
                grads: Sequence[Tensor] = [torch.zeros_like(mask) for mask in wanted]
                if loss.requires_grad:
                    grads = torch.autograd.grad(loss.sum(), wanted, allow_unused=True, materialize_grads=True)
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
        x = args[0]  # (B, C, H, W), or (B, ..., C * spread) of a Linear; B may count windows, an image's side by side
        axis = 1 if is_convolution(module) else x.dim() - 1
        seen = x.detach().float().square().sum([a for a in range(x.dim()) if a != axis])
        squares.add(section, seen.reshape(-1, spread).sum(1))
        shape = [len(x), *[1] * (x.dim() - 1)]
        shape[axis] = columns.shape[1]
        each = columns.repeat_interleave(len(x) // len(columns), dim=0)
        return (x * each.reshape(shape).to(x.dtype), *args[1:])

    return hook


class _Outputs(TorchFunctionMode):
    """Show what each layer computes, its batch norm included, to the one of `seen` that its parameter belongs to.

    Functions are watched instead of modules, because a module may hold an activation too: timm's BatchNormAct2d.
    """

    def __init__(self, seen: Mapping[int, Callable[[Tensor], None]]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        if func in _COMPUTING:
            second = args[1] if len(args) > 1 else (kwargs or {}).get("weight")
            see = self.seen.get(id(second))
            if see is not None and output.requires_grad:
                see(output)
        return output


class _Felt:
    """Gather the loss's gradient at one layer's output: its squared norm by position, its second moment by channel."""

    def __init__(self, model: nn.Module, layer: Layer, rows: int, device: torch.device, moments: bool) -> None:
        self.module: Any = model.get_submodule(layer.path)
        norm: Any = model.get_submodule(layer.norm) if layer.norm else None
        self.key = id(self.module.weight if norm is None else norm.running_mean)
        self.rows, self.device = rows, device
        self.saliency: Tensor | None = None
        self.moments: parallel.SectionSum | None = None
        self.wants_moments = moments

    def see(self, index: Tensor, section: int, output: Tensor) -> None:
        """Gather the gradient at an output when it comes; one that never reaches the loss has none, and counts as 0."""
        if self.saliency is None:
            _, positions, d = by_position(self.module, output.detach(), len(index)).shape
            self.saliency = torch.zeros(self.rows, positions, device=self.device)
            if self.wants_moments:
                self.moments = parallel.SectionSum((d, d), self.device)
        output.register_hook(partial(self._look, index, section))

    def _look(self, index: Tensor, section: int, grad: Tensor) -> None:
        flat = by_position(self.module, grad.float(), len(index))  # (B, T, d)
        assert self.saliency is not None
        self.saliency[index] = flat.square().sum(-1)
        if self.moments is not None:
            flat = flat.flatten(0, 1)
            self.moments.add(section, flat.T @ flat)
