"""The virtual model: the dense one with masks at the inputs of its output projections."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .units import SlicePlan, UnitGroup


@dataclass(frozen=True)
class OutputWeights:
    """Hold a refitted output projection: weight (d, kept columns) and bias (d,)."""

    weight: Tensor
    bias: Tensor


Updates = Mapping[str, OutputWeights]  # group name -> what replaces its output projection


def mask_model(
    model: nn.Module,
    groups: Sequence[UnitGroup],
    plan: SlicePlan,
    updates: Updates | None = None,
) -> nn.Module:
    """Return a copy of the dense model in which cut units are multiplied by 0 and kept ones by their scale.

    The work is done by forward pre-hooks on the output projections, so it costs what the dense model
    costs. `updates` replaces the kept columns and the bias of refitted projections.
    """
    virtual = copy.deepcopy(model)
    masks = plan.masks()
    for g in groups:
        consumer: Any = virtual.get_submodule(g.consumer)
        mask = torch.as_tensor(masks[g.name], dtype=consumer.weight.dtype, device=consumer.weight.device)
        consumer.register_buffer("unit_mask", mask.repeat_interleave(g.width), persistent=False)
        consumer.register_forward_pre_hook(_multiply)
        if updates and g.name in updates:
            new = updates[g.name]
            with torch.no_grad():
                columns = g.columns(plan[g.name].kept)
                consumer.weight[:, columns] = new.weight.to(consumer.weight)
                consumer.bias.copy_(new.bias)
    return virtual


def _multiply(module: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (args[0] * module.unit_mask, *args[1:])
