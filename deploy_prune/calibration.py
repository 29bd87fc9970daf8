"""One streaming pass over the calibration rows: the gradient of each sample's loss to every unit's mask."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from . import parallel
from .batches import Batch, Batches
from .errors import InputError
from .heads import Head
from .progress import Progress
from .tasks.base import Row
from .units import UnitGroup


@dataclass
class CalibrationStats:
    """Hold what the pass yields per group, rows in the order they were given.

    `gradients` (N, units) fp32 are those of the masks. `saliency` (N, longest row) fp32 is, for every token,
    the squared norm of the loss's gradient at the sub-layer's output; 0 on padding. `activation_squares`
    (units,) fp64 sums the squares of a unit's activations over unpadded tokens, `gradient_moments` (d, d) fp64
    g g^T of the gradient at the sub-layer's output, where it was asked for.
    """

    gradients: dict[str, Tensor]
    saliency: dict[str, Tensor]
    activation_squares: dict[str, Tensor]
    gradient_moments: dict[str, Tensor]
    tokens: Tensor  # () unpadded tokens seen
    mean_length: float
    mean_loss: Tensor  # ()
    sample_hash: str
    label_free: bool

    def batch_gradients(self, name: str, batch_rows: int) -> Tensor:
        """Return the gradients of the mean loss of consecutive mini-batches (N / batch_rows, units)."""
        g = self.gradients[name]
        parts = [chunk.double().mean(0) for chunk in g.split(batch_rows)]
        return torch.stack(parts).to(g.dtype)


def calibrate(
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
    """Return d loss_n / d mask_u at mask = 1 for every sample n and unit u, in one pass.

    The mask stands at the output projections' inputs, one row of it per sample, so a single backward
    pass yields per-sample gradients. `label_free` draws the labels from the model's own predictions.
    `forward_dtype` bf16/fp16 runs forward and backward under autocast; the statistics stay fp32. The processes of a
    team take a part of the batches each, and all get the whole (`parallel`).

    Raises InputError for missing labels and for NaN or Inf in the gradients.
    Source: Kwon et al. 2022, section 3.1 (the mask gradients behind its equation 6).
    """
    device = next(model.parameters()).device
    batches = Batches(rows, head, pad_id)
    total = len(parallel.own(len(batches)))
    gradients = {g.name: torch.zeros(len(rows), g.size, device=device) for g in groups}
    longest = max(r.length for r in rows)
    seen = {g.name: GroupSums(g, len(rows), longest, device, gradient_moments) for g in groups}
    tokens, loss_sum = parallel.SectionSum((), device), parallel.SectionSum((), device)
    with frozen(model):
        for done, batch in enumerate(batches.shared()):
            batch = batch.to(device)
            size, section = len(batch.index), batch.number % parallel.sections()
            index = torch.tensor(batch.index, device=device)
            with ExitStack() as stack:
                masks = {g.name: torch.ones(size, g.size, device=device, requires_grad=True) for g in groups}
                for g in groups:
                    consumer, sums = model.get_submodule(g.consumer), seen[g.name]
                    before = mask_hook(masks[g.name], g.width, sums, section, batch.mask)
                    stack.callback(consumer.register_forward_pre_hook(before).remove)
                    stack.callback(consumer.register_forward_hook(gradient_hook(sums, section, index)).remove)
                stack.enter_context(torch.enable_grad())
                autocast = forward_dtype != torch.float32
                with torch.autocast(device.type, dtype=forward_dtype if autocast else None, enabled=autocast):
                    outputs = head.outputs(model, batch.inputs)
                outputs = {k: v.float() for k, v in outputs.items()}
                loss = losses(head, outputs, batch, label_free, seed)
                grads = torch.autograd.grad(loss.sum(), [masks[g.name] for g in groups])
            for g, grad in zip(groups, grads, strict=True):
                gradients[g.name].index_copy_(0, index, grad.float())
            loss_sum.add(section, loss.detach().double().sum())
            tokens.add(section, batch.mask.sum())
            progress((done + 1) / total)
    return CalibrationStats(
        gradients={name: parallel.fill(rows_of) for name, rows_of in gradients.items()},
        saliency={name: parallel.fill(sums.saliency) for name, sums in seen.items()},
        activation_squares={name: sums.squares.total() for name, sums in seen.items()},
        gradient_moments={name: sums.moments.total() for name, sums in seen.items() if sums.moments is not None},
        tokens=tokens.total().long(),
        mean_length=float(np.mean([r.length for r in rows])),
        mean_loss=loss_sum.total() / len(rows),
        sample_hash=hash_rows(rows),
        label_free=label_free,
    )


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Let gradients flow to masks and hidden states alone, not to the parameters."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    for p in trainable:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in trainable:
            p.requires_grad_(True)


def losses(head: Head, outputs: Mapping[str, Tensor], batch: Batch, label_free: bool, seed: int) -> Tensor:
    """Return each row's loss (B,), towards its label or one that is drawn from the outputs. Raises InputError."""
    if label_free:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + batch.number)
        labels = head.draw_labels({k: v.detach() for k, v in outputs.items()}, batch.mask, generator)
    elif batch.labels is None:
        raise InputError("Some calibration rows have no label.", hint="Use label-free calibration.")
    else:
        labels = batch.labels
    return head.loss(outputs, labels, batch.mask)


def check_finite(stats: CalibrationStats) -> None:
    """Raise InputError, naming the first group, for NaN or Inf, and where no unit's mask changes the loss at all."""
    hint = "Check the checkpoint and the labels, or calibrate in fp32."
    for field, what in _STATISTICS.items():
        for name, values in getattr(stats, field).items():
            if not bool(torch.isfinite(values).all()):
                raise InputError(f"The {what} of {name} hold NaN or Inf.", hint=hint)
    if not bool(torch.isfinite(stats.mean_loss)):
        raise InputError("The calibration rows' mean loss is NaN or Inf.", hint=hint)
    if not any(bool(grad.any()) for grad in stats.gradients.values()):
        raise InputError(
            "All mask gradients are 0: the loss does not depend on any unit, so none can be told from another.",
            hint="Check the checkpoint: is its head trained, and does its output change with its input?",
        )


_STATISTICS = {
    "gradients": "mask gradients",
    "saliency": "gradients at the output",
    "activation_squares": "squared activations",
    "gradient_moments": "gradients' second moments",
}


def sample_indices(total: int, samples: int, seed: int) -> list[int]:
    """Draw min(samples, total) distinct example indices, in random order."""
    rng = np.random.default_rng(seed)
    return [int(i) for i in rng.permutation(total)[:samples]]


def hash_rows(rows: Sequence[Row]) -> str:
    """Return the SHA-256 of the rows' token ids or pixels, in order."""
    digest = hashlib.sha256()
    for r in rows:
        if r.tokens is None:
            digest.update(r.features["input_ids"].astype("<i8").tobytes())
        else:
            digest.update(r.features["pixel_values"].astype("<f4").tobytes())
        digest.update(b"|")
    return digest.hexdigest()


class GroupSums:
    """Gather what one group's hooks see."""

    def __init__(self, group: UnitGroup, rows: int, longest: int, device: torch.device, moments: bool) -> None:
        self.width = group.width
        self.saliency = torch.zeros(rows, longest, device=device)
        self.squares = parallel.SectionSum((group.size,), device)
        self.moments = parallel.SectionSum((group.hidden, group.hidden), device) if moments else None


def mask_hook(
    mask: Tensor, width: int, sums: GroupSums, section: int, attention: Tensor
) -> Callable[..., tuple[Any, ...]]:
    """Return a pre-hook that masks what a projection reads (B, T, units * width), and sums its squares."""
    columns = mask if width == 1 else mask.repeat_interleave(width, dim=1)

    def hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x = args[0]  # (B, T, units * width)
        seen = x.detach() * attention.unsqueeze(-1).to(x.dtype)
        sums.squares.add(section, seen.float().square().sum((0, 1)).reshape(-1, width).sum(1))
        return (x * columns.to(x.dtype)[:, None, :], *args[1:])

    return hook


def gradient_hook(sums: GroupSums, section: int, index: Tensor) -> Callable[..., None]:
    """Look at the gradient (B, T, d) when it comes by; padding, which reaches no loss, has none."""

    def look(grad: Tensor) -> None:
        grad = grad.float()
        sums.saliency[index, : grad.shape[1]] = grad.square().sum(-1)
        if sums.moments is not None:
            flat = grad.flatten(0, 1)
            sums.moments.add(section, flat.T @ flat)

    def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        output.register_hook(look)

    return hook
