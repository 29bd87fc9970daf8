"""Cut units out for real: smaller Linears inside the stock class, scales folded into output columns."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .archs import arch_of
from .masking import Updates
from .modeling_sliced import resize
from .units import SlicePlan, UnitGroup


def slice_spec(model: nn.Module, groups: Sequence[UnitGroup], plan: SlicePlan) -> dict[str, Any]:
    """Return what config.json must say so that the sliced model can be rebuilt from the stock class."""
    return {
        "plan_hash": plan.hash,
        "select_heads": arch_of(model).select_heads,
        "drop_pooler": getattr(model, "pooler", True) is None,
        "groups": [
            {
                "name": g.name,
                "kind": g.kind,
                "total": g.size,
                "width": g.width,
                "kept": list(plan[g.name].kept),
                "producers": list(g.producers),
                "consumer": g.consumer,
                "core": g.core,
            }
            for g in groups
        ],
    }


def slice_model(
    model: nn.Module,
    groups: Sequence[UnitGroup],
    plan: SlicePlan,
    updates: Updates | None = None,
) -> nn.Module:
    """Return a smaller copy of the dense model, of the same class, equal to the masked one.

    Kept units' scales are multiplied into the columns of the output projection and nowhere else;
    `updates` replaces refitted projections. A sub-layer without units becomes its bias.
    """
    sliced = copy.deepcopy(model)
    spec = slice_spec(model, groups, plan)
    state = sliced_state(model, groups, plan, updates)
    resize(sliced, spec)
    sliced.load_state_dict(state, strict=True)
    sliced.config.deploy_prune = spec  # type: ignore[union-attr]
    return sliced.eval()


def sliced_state(
    model: nn.Module,
    groups: Sequence[UnitGroup],
    plan: SlicePlan,
    updates: Updates | None = None,
) -> dict[str, Tensor]:
    """Return the sliced model's state dict, cut from the dense one."""
    state = dict(model.state_dict())
    for g in groups:
        part = plan[g.name]
        rows = torch.tensor(g.columns(part.kept), dtype=torch.long)
        weight, bias = state.pop(f"{g.consumer}.weight"), state.pop(f"{g.consumer}.bias")
        scales = torch.tensor(part.scales, dtype=torch.float64).repeat_interleave(g.width)
        cut = weight[:, rows.to(weight.device)]
        new_weight = (cut.double() * scales.to(weight.device)).to(weight.dtype)
        if updates and g.name in updates:
            new_weight = updates[g.name].weight.to(weight)
            bias = updates[g.name].bias.to(bias)
        for path in g.producers:
            for name in ("weight", "bias"):
                if f"{path}.{name}" in state:
                    tensor = state.pop(f"{path}.{name}")
                    if part.count:
                        state[f"{path}.{name}"] = tensor[rows.to(tensor.device)]
        if part.count:
            state[f"{g.consumer}.weight"], state[f"{g.consumer}.bias"] = new_weight, bias
        else:
            state[f"{g.stand_in}.bias"] = bias
    return state
