"""Swap kept and cut units inside each group by the block-diagonal Fisher, at fixed counts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from .units import MaskSet, UnitGroup


def rearrange(
    groups: Sequence[UnitGroup], masks: MaskSet, gradients: Mapping[str, Tensor]
) -> tuple[MaskSet, dict[str, tuple[float, float]]]:
    """Return masks with the same counts and no larger objective, and each group's objective before and after.

    `gradients` are the mask gradients (N, units) of samples or of mini-batches. The objective is
    (1 - m)^T F (1 - m) = sum_n (sum of the cut units' g_n)^2 with F the group's block of the Fisher.
    One greedy round visits every cut unit and exchanges it with the best unit to cut in its place.

    Source: Kwon et al. 2022, section 3.3, equation 12.
    """
    new = MaskSet({name: mask.copy() for name, mask in masks.items()})
    objectives = {}
    for g in groups:
        cut = masks[g.name] == 0
        if cut.all() or not cut.any():
            continue
        grads = gradients[g.name].double()
        fisher = grads.T @ grads  # (units, units)
        start = torch.from_numpy(cut).to(fisher.device)
        end = swap_round(fisher, start, int(cut.sum()))
        objectives[g.name] = (_objective(fisher, start), _objective(fisher, end))
        new[g.name] = 1.0 - end.cpu().numpy().astype(np.float64)
    return new, objectives


def swap_round(fisher: Tensor, cut: Tensor, count: int) -> Tensor:
    """Do one greedy round on a boolean (units,) with `count` cut units; never raises its objective.

    Runs without a single device-to-host copy inside the loop.
    """
    units = fisher.shape[0]
    diagonal = fisher.diagonal()
    state = cut.to(fisher.dtype)  # 1 where cut
    sums = fisher @ state  # (units,): sum of F over the cut units
    order = torch.argsort(cut.to(torch.int8), descending=True, stable=True)  # cut units, ascending
    index = torch.arange(units, device=fisher.device)
    for position in range(count):
        unit = order[position : position + 1]  # (1,), kept as a tensor
        is_unit = index == unit
        state = torch.where(is_unit, 0.0, state)
        sums = sums - fisher.index_select(0, unit).squeeze(0)
        cost = 2 * sums + diagonal  # change of the objective when each unit joins the cut ones
        cost = torch.where(state > 0, torch.inf, cost)
        best = torch.argmin(cost).reshape(1)
        best = torch.where(cost.index_select(0, best) < cost.index_select(0, unit), best, unit)
        state = torch.where(index == best, 1.0, state)
        sums = sums + fisher.index_select(0, best).squeeze(0)
    return state > 0


def _objective(fisher: Tensor, cut: Tensor) -> float:
    x = cut.to(fisher.dtype)
    return float(x @ fisher @ x)
