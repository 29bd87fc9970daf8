"""Choose which units stay: keep the most importance within the budget's limits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from ..costs import Limit, ProductTable
from ..errors import InfeasibleBudgetError, InputError
from ..units import MaskSet, UnitGroup, Units
from .choices import Choices, Minimum, Scores, rank_units
from .knapsack import solve_knapsack
from .local import solve_local
from .mixed_integer import solve_mixed_integer
from .paper import search_paper
from .products import additive, solve_equal_shares, solve_products

__all__ = ["Minimum", "Scores", "Search", "search", "solve_knapsack", "solve_mixed_integer"]

METHODS = ("exact", "paper")
SCOPES = ("global", "local")


@dataclass(frozen=True)
class Search:
    """Hold the masks that a search chose, the solver's name and how far the optimum can be above (relative)."""

    masks: MaskSet
    solver: str
    gap: float | None = None
    costs: dict[str, float] = field(default_factory=dict)  # of the plan, by kind


def search(
    groups: Sequence[Units],
    scores: Scores,
    limits: Sequence[Limit],
    minimum: Minimum | None = None,
    *,
    method: str = "exact",
    scope: str = "global",
) -> Search:
    """Return the 0/1 masks that keep the most importance within every limit.

    "exact": a multiple-choice knapsack, by dynamic programming for one limit and as a mixed-integer program
    for several. "paper": the greedy search of Kwon et al. 2022 (one limit of FLOPs or latency). With the
    "local" scope units compete in their own group only, and all groups keep the same share. Where counts meet in
    products (convolutions), "exact" is the heuristic of `products`, exact in its costs alone.

    Raises InfeasibleBudgetError, with the smallest reachable, when the minimum exceeds a limit.
    """
    minimum = minimum or Minimum()
    if method not in METHODS:
        raise InputError(f"Unknown search '{method}'.", hint=f"Available: {', '.join(METHODS)}.")
    if scope not in SCOPES:
        raise InputError(f"Unknown scope '{scope}'.", hint=f"Available: {', '.join(SCOPES)}.")
    for limit in limits:
        _check_reachable(groups, limit, minimum)
    if all(limit.most >= limit.table.dense for limit in limits) and not minimum.left_out:
        return Search(MaskSet.ones(groups), "none", 0.0, {x.table.kind: x.table.dense for x in limits})
    if method == "paper" and minimum.left_out:
        raise InputError("The paper's search leaves no whole sub-layers out.", hint="Use --search exact.")
    sums = additive(limits)
    if method == "paper" and (sums is None or any(g.kind == "channel" for g in groups)):
        raise InputError("The paper's search knows heads and neurons only.", hint="Use the exact search.")
    if method == "paper" and scope == "global":
        units = [g for g in groups if isinstance(g, UnitGroup)]
        masks, solver, gap = search_paper(units, scores, limits, minimum), "paper", None
    else:
        ranking = {g.name: rank_units(scores[g.name]) for g in groups}
        if sums is None:
            values = {name: r.value for name, r in ranking.items()}
            local = scope == "local"
            counts = (
                solve_equal_shares(groups, limits, minimum)
                if local
                else solve_products(groups, values, limits, minimum)
            )
            solver, gap = "equal shares" if local else "prices and exchanges", None
        else:
            choices = [Choices.of(g, ranking[g.name].value, sums, minimum) for g in groups]
            counts, solver, gap = _solve(choices, sums, scope)
        masks = MaskSet({g.name: np.zeros(g.size) for g in groups})
        for g in groups:
            masks[g.name][ranking[g.name].order[: counts[g.name]]] = 1.0
    kept = {g.name: int(masks[g.name].sum()) for g in groups}
    return Search(masks, solver, gap, {x.table.kind: x.table.cost(kept) for x in limits})


def _solve(choices: Sequence[Choices], limits: Sequence[Limit], scope: str) -> tuple[dict[str, int], str, float | None]:
    """Return the counts, the solver's name and the gap."""
    if scope == "local":
        return solve_local(choices, np.array([x.room for x in limits])), "equal shares", None
    if len(limits) == 1:
        counts, gap = solve_knapsack(choices, limits)
        return counts, "dynamic programming", gap
    counts, gap = solve_mixed_integer(choices, limits)
    return counts, "mixed integer", gap


NAMES = {"flops": "keep_flops", "params": "keep_params", "bytes": "max_bytes", "latency": "keep_latency"}


def _check_reachable(groups: Sequence[Units], limit: Limit, minimum: Minimum) -> None:
    table = limit.table
    if isinstance(table, ProductTable):
        smallest = table.cost({g.name: int(minimum.counts(g)[0]) for g in groups})
    else:
        smallest = table.base + sum(float(np.asarray(table.groups[g.name])[minimum.counts(g)].min()) for g in groups)
    if smallest <= limit.most:
        return
    if table.kind == "bytes":
        asked, reachable, value = f"{limit.most:,.0f}", f"{smallest:,.0f} bytes", smallest
    else:
        value = float(np.ceil(1e4 * smallest / table.dense) / 1e4)
        asked, reachable = f"{limit.keep:g}", f"{value:.4f}"
    least = f"{minimum.heads} head(s) and {minimum.neurons} neuron(s) per layer"
    hint = "Ask for more, or allow empty sub-layers with --min-heads 0 --min-neurons 0."
    if all(g.kind == "channel" for g in groups):
        least, hint = "the least channels of each group", "Ask for more, or cut residual streams too (--cut-residual)."
    raise InfeasibleBudgetError(
        f"{NAMES[table.kind]} {asked} is infeasible: with at least {least} the smallest reachable is {reachable}.",
        smallest=value,
        hint=hint,
    )
