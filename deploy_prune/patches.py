"""What a convolution reads at each position, as rows of a matrix: it is then a Linear like any other."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

MOST_POSITIONS = 256  # of an image, at which a layer's statistics are taken


def patches(module: Any, x: Tensor) -> Tensor:
    """Return the inputs of a convolution or Linear at every output position, (B, positions, columns).

    Columns stand in the order of the flattened weight (outputs, inputs * kernel elements).
    """
    if not hasattr(module, "kernel_size"):
        return x.reshape(len(x), -1, x.shape[-1])
    if module.padding != "valid" and any(module._reversed_padding_repeated_twice):
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        x = F.pad(x, module._reversed_padding_repeated_twice, mode=mode)
    if module.kernel_size == (1, 1):
        x = x[..., :: module.stride[0], :: module.stride[1]]
        return x.flatten(2).transpose(1, 2)
    columns = F.unfold(x, module.kernel_size, dilation=module.dilation, stride=module.stride)
    return columns.transpose(1, 2)


def some_positions(count: int, seed: int, most: int = MOST_POSITIONS) -> Tensor:
    """Return the positions (at most `most`, ascending) of a map with `count` that statistics are taken at.

    Neighbours say nearly the same: many images at some positions are worth more than few at all of them.
    """
    if count <= most:
        return torch.arange(count)
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:most].sort().values
