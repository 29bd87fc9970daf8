"""What a convolution reads at each position, as rows of a matrix: it is then a Linear like any other."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

MOST_POSITIONS = 64  # of an image, at which a layer's statistics are taken


def patches(module: Any, x: Tensor, rows: int, at: Tensor | None = None) -> Tensor:
    """Return what a convolution or Linear reads at its output positions (all, or some), (rows, positions, columns).

    Columns stand in the order of the flattened weight (outputs, inputs * kernel elements). `rows` counts the images:
    the model may run parts of them, windows say, as rows of their own, which then lie side by side in `x`.
    """
    if len(x) != rows:
        x = patches(module, x, len(x))
        x = x.reshape(rows, -1, x.shape[-1])
        return x if at is None else x[:, at]
    if not is_convolution(module):
        x = x.reshape(len(x), -1, x.shape[-1])
        return x if at is None else x[:, at]
    (kh, kw), (sh, sw), (dh, dw) = module.kernel_size, module.stride, module.dilation
    if module.padding_mode == "zeros":  # other values torch pads with before the convolution: `x` is padded already
        x = F.pad(x, module._reversed_padding_repeated_twice)
    sizes = zip(x.shape[2:], (dh, dw), (kh, kw), (sh, sw), strict=True)
    height, width = ((n - d * (k - 1) - 1) // s + 1 for n, d, k, s in sizes)
    at = torch.arange(height * width) if at is None else at
    corner = at // width * sh * x.shape[3] + at % width * sw  # of every patch in the flat, padded map
    tap = torch.arange(kh)[:, None] * dh * x.shape[3] + torch.arange(kw) * dw
    index = (tap.reshape(-1, 1) + corner).to(x.device)  # (taps, positions)
    found = x.flatten(2)[:, :, index.flatten()].reshape(*x.shape[:2], *index.shape)  # (B, C, taps, positions)
    return found.permute(0, 3, 1, 2).flatten(2)


def by_position(module: Any, y: Tensor, rows: int) -> Tensor:
    """Return what a convolution (B, C, H, W) or Linear (B, ..., C) gives for `rows` images as (rows, positions, C)."""
    y = y.flatten(2).transpose(1, 2) if is_convolution(module) else y
    return y.reshape(rows, -1, y.shape[-1])


def is_convolution(module: Any) -> bool:
    """Say whether a layer is a convolution, whose channels stand behind the batch's axis; a Linear's stand last."""
    return hasattr(module, "kernel_size")


def some_positions(count: int, seed: int, most: int = MOST_POSITIONS) -> Tensor:
    """Return the positions (at most `most`, ascending) of a map with `count` that statistics are taken at.

    Neighbours say nearly the same: many images at some positions are worth more than few at all of them.
    """
    if count <= most:
        return torch.arange(count)
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:most].sort().values
