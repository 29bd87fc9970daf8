"""Second moments of an output projection's inputs and targets, summed in float64."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .parallel import SectionSum, sections

PENDING_TOKENS = 4096  # gathered before they are multiplied: small products waste time on the float64 sums


@dataclass
class Moments:
    """Hold the sums over tokens, each by its weight w, that a fit of y (d,) on h (n,) needs, in float64."""

    hh: Tensor  # sum w h h^T (n, n)
    yh: Tensor  # sum w y h^T (d, n)
    h: Tensor  # sum w h (n,)
    y: Tensor  # sum w y (d,)
    yy: Tensor  # sum w |y|^2 ()
    count: Tensor  # sum w ()

    def __add__(self, other: Moments) -> Moments:
        return Moments(**{name: value + getattr(other, name) for name, value in vars(self).items()})

    def uncentred(self) -> Moments:
        """Return the moments by which a fit gets no intercept: those of means that are 0."""
        return replace(self, h=torch.zeros_like(self.h), y=torch.zeros_like(self.y))

    def residual(self, weight: Tensor, bias: Tensor) -> Tensor:
        """Return sum |W h + b - y|^2 for weight (d, n) and bias (d,), as a tensor ()."""
        w, b = weight.double(), bias.double()
        return (
            (w @ self.hh * w).sum()
            - 2 * (w * self.yh).sum()
            + 2 * b @ (w @ self.h - self.y)
            + self.count * (b @ b)
            + self.yy
        )


class MomentSums:
    """Gather moments batch by batch; `total` has those of all processes.

    Products of a few thousand tokens of one section run in fp32, their sums in float64. No shape depends on the data.
    """

    def __init__(self, inputs: int, outputs: int, device: torch.device) -> None:
        shapes: dict[str, tuple[int, ...]] = {
            "hh": (inputs, inputs),
            "yh": (outputs, inputs),
            "h": (inputs,),
            "y": (outputs,),
            "yy": (),
            "count": (),
        }
        self._sums = {name: SectionSum(shape, device) for name, shape in shapes.items()}
        self._pending: list[tuple[Tensor, Tensor, Tensor]] = []
        self._tokens, self._section = 0, 0

    def add(self, h: Tensor, y: Tensor, weight: Tensor, number: int = 0) -> None:
        """Add batch `number`: h (B, T, n), y (B, T, d), weight (B, T) >= 0, 0 on padding."""
        section = number % sections()
        if section != self._section or self._tokens >= PENDING_TOKENS:
            self._settle()
        self._section = section
        root = weight.reshape(-1, 1).to(h.dtype).sqrt()
        self._pending.append((h.flatten(0, -2) * root, y.flatten(0, -2) * root, root))
        self._tokens += len(root)

    def total(self) -> Moments:
        """Return the moments of all batches."""
        self._settle()
        return Moments(**{name: part.total() for name, part in self._sums.items()})

    def _settle(self) -> None:
        if not self._pending:
            return
        h, y, root = (torch.cat(parts) for parts in zip(*self._pending, strict=True))
        self._pending, self._tokens = [], 0
        added = {
            "hh": gram(h),
            "yh": y.T @ h,
            "h": (h * root).double().sum(0),
            "y": (y * root).double().sum(0),
            "yy": y.double().square().sum(),
            "count": root.double().square().sum(),
        }
        for name, value in added.items():
            self._sums[name].add(self._section, value)


def gram(h: Tensor) -> Tensor:
    """Return h^T h (n, n) of h (tokens, n): the blocks on and above the diagonal are multiplied, the others copied."""
    n = h.shape[1]
    block = max(256, -(-n // 8))
    if n <= block:
        return h.T @ h
    found = h.new_empty(n, n)
    for start in range(0, n, block):
        stop = min(start + block, n)
        torch.mm(h[:, start:stop].T, h[:, start:], out=found[start:stop, start:])
        found[stop:, start:stop] = found[start:stop, stop:].T
    return found
