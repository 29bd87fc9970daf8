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


def scatter(model: nn.Module, groups: Sequence[UnitGroup], plan: SlicePlan, state: Mapping[str, Tensor]) -> nn.Module:
    """Return a copy of the dense model that holds a sliced model's tensors, each where it was cut from.

    Producers' rows and consumers' columns go to the kept units, all other tensors are copied; cut units keep the
    dense weights. Masked by a plan whose scales are 1 (`SlicePlan.folded`), it is the sliced model's function.
    """
    whole = copy.deepcopy(model)
    dense, rest = whole.state_dict(), dict(state)
    for g in groups:
        kept = torch.tensor(g.columns(plan[g.name].kept), dtype=torch.long)
        if not len(kept):
            rest[f"{g.consumer}.bias"] = rest.pop(f"{g.stand_in}.bias")
            continue
        for axis, paths in ((0, g.producers), (1, (g.consumer,))):
            for name in (f"{path}.{part}" for path in paths for part in ("weight", "bias")):
                if name in rest and rest[name].shape != dense[name].shape:
                    cut, target = rest.pop(name), dense[name]
                    target.index_copy_(axis, kept.to(target.device), cut.to(target))
    for name, tensor in rest.items():
        dense[name].copy_(tensor)
    return whole


def _multiply(module: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (args[0] * module.unit_mask, *args[1:])
