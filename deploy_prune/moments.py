"""Second moments of an output projection's inputs and targets, summed in float64."""

from __future__ import annotations

import torch
from torch import Tensor

PENDING_TOKENS = 4096  # gathered before they are multiplied: small products waste time on the float64 sums


def _sum(name: str, shape: str) -> property:
    def get(self: Moments) -> Tensor:
        self._settle()
        return self._sums[name]

    return property(get, doc=f"{shape} over all tokens added so far.")


class Moments:
    """Sum over tokens, each by its weight w, what a least-squares fit of y (d,) on h (n,) needs, in float64.

    Products of a few thousand tokens run in fp32, their sums in float64. No shape depends on the data.
    """

    hh = _sum("hh", "sum w h h^T (n, n)")
    yh = _sum("yh", "sum w y h^T (d, n)")
    h = _sum("h", "sum w h (n,)")
    y = _sum("y", "sum w y (d,)")
    yy = _sum("yy", "sum w |y|^2 ()")
    count = _sum("count", "sum w ()")

    def __init__(self, inputs: int, outputs: int, device: torch.device) -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        self._sums = {
            "hh": zeros(inputs, inputs),
            "yh": zeros(outputs, inputs),
            "h": zeros(inputs),
            "y": zeros(outputs),
            "yy": zeros(),
            "count": zeros(),
        }
        self._pending: list[tuple[Tensor, Tensor, Tensor]] = []
        self._tokens = 0

    def add(self, h: Tensor, y: Tensor, weight: Tensor) -> None:
        """Add one batch: h (B, T, n), y (B, T, d), weight (B, T) >= 0, 0 on padding."""
        root = weight.reshape(-1, 1).to(h.dtype).sqrt()
        self._pending.append((h.flatten(0, -2) * root, y.flatten(0, -2) * root, root))
        self._tokens += len(root)
        if self._tokens >= PENDING_TOKENS:
            self._settle()

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
            self._sums[name] += value

    def __add__(self, other: Moments) -> Moments:
        total = Moments(self.hh.shape[0], self.yh.shape[0], self.hh.device)
        total._sums = {name: getattr(self, name) + getattr(other, name) for name in self._sums}
        return total

    def uncentred(self) -> Moments:
        """Return the moments by which a fit gets no intercept: those of means that are 0."""
        total = Moments(self.hh.shape[0], self.yh.shape[0], self.hh.device)
        total._sums = {name: getattr(self, name) for name in self._sums}
        total._sums |= {"h": torch.zeros_like(self.h), "y": torch.zeros_like(self.y)}
        return total

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
