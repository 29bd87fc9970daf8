"""Second moments of an output projection's inputs and targets, summed in float64."""

from __future__ import annotations

import torch
from torch import Tensor


class Moments:
    """Sum over tokens, each by its weight w, what a least-squares fit of y (d,) on h (n,) needs, in float64.

    hh (n, n) = sum w h h^T · yh (d, n) = sum w y h^T · h (n,) · y (d,) · yy () = sum w |y|^2 · count () = sum w.
    """

    def __init__(self, inputs: int, outputs: int, device: torch.device) -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        self.hh, self.yh = zeros(inputs, inputs), zeros(outputs, inputs)
        self.h, self.y, self.yy, self.count = zeros(inputs), zeros(outputs), zeros(), zeros()

    def add(self, h: Tensor, y: Tensor, weight: Tensor) -> None:
        """Add one batch: h (B, T, n), y (B, T, d), weight (B, T) >= 0, 0 on padding.

        The products run in fp32, and no shape depends on the data.
        """
        root = weight.reshape(-1, 1).to(h.dtype).sqrt()
        h, y = h.flatten(0, -2) * root, y.flatten(0, -2) * root
        self.hh += (h.T @ h).double()
        self.yh += (y.T @ h).double()
        self.h += (h * root).double().sum(0)
        self.y += (y * root).double().sum(0)
        self.yy += y.double().square().sum()
        self.count += weight.double().sum()

    def __add__(self, other: Moments) -> Moments:
        total = Moments(self.hh.shape[0], self.yh.shape[0], self.hh.device)
        for name in vars(total):
            setattr(total, name, getattr(self, name) + getattr(other, name))
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
