"""Choose which units stay under a budget: the paper's search (Kwon et al. 2022, algorithm 1)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from .costs import Budget, encoder_flops, unit_flops
from .errors import InfeasibleBudgetError, UnsupportedModelError
from .units import MaskSet, UnitGroup

Scores = Mapping[str, np.ndarray]  # group name -> importance of each unit (units,)


def search_flops(
    groups: Sequence[UnitGroup],
    scores: Scores,
    budget: Budget,
    *,
    min_heads: int = 1,
    min_neurons: int = 1,
) -> MaskSet:
    """Return the 0/1 masks that keep the most importance within the FLOPs budget.

    For every number of heads, the rest of the budget goes to neurons, the most important first; the
    pair with the largest kept importance wins, ties by the fewer heads and the lower index. Each
    layer keeps at least `min_heads` and `min_neurons` (0 allows a whole sub-layer to go).

    Raises InfeasibleBudgetError, with the smallest reachable share, when the minimum exceeds it.
    Source: Kwon et al. 2022, section 3.2, algorithm 1.
    """
    heads = [g for g in groups if g.kind == "head"]
    neurons = [g for g in groups if g.kind == "neuron"]
    head_cost, neuron_cost = (_uniform_cost(part, budget.seq_len) for part in (heads, neurons))
    head_rank, least_heads = _rank(heads, scores, min_heads)
    neuron_rank, least_neurons = _rank(neurons, scores, min_neurons)
    limit = budget.limit(groups)

    smallest = least_heads * head_cost + least_neurons * neuron_cost
    if smallest > limit:
        dense = encoder_flops(groups, budget.seq_len)
        share = float(np.ceil(1e4 * smallest / dense) / 1e4)
        raise InfeasibleBudgetError(
            f"keep_flops {budget.keep:g} is infeasible: with at least {min_heads} head(s) and {min_neurons}"
            f" neuron(s) per layer the smallest reachable is {share:.4f}.",
            smallest=share,
            hint="Ask for more, or allow empty sub-layers with --min-heads 0 --min-neurons 0.",
        )

    n_heads = np.arange(least_heads, len(head_rank) + 1)
    n_neurons = np.minimum((limit - n_heads * head_cost) // neuron_cost, len(neuron_rank))
    feasible = n_neurons >= least_neurons  # a negative count never gets here
    n_heads, n_neurons = n_heads[feasible], n_neurons[feasible]
    kept = _cumulative(heads, scores, head_rank)[n_heads] + _cumulative(neurons, scores, neuron_rank)[n_neurons]
    best = int(np.argmax(kept))

    masks = MaskSet({g.name: np.zeros(g.size) for g in groups})
    for name, unit in head_rank[: n_heads[best]] + neuron_rank[: n_neurons[best]]:
        masks[name][unit] = 1.0
    return masks


def _uniform_cost(groups: Sequence[UnitGroup], seq_len: int) -> int:
    costs = {unit_flops(g, seq_len) for g in groups}
    if len(costs) != 1:
        raise UnsupportedModelError(
            f"The paper's search needs equal unit costs in all layers, found {sorted(costs)}.",
            hint="This architecture has layers of different widths.",
        )
    return costs.pop()


def _rank(groups: Sequence[UnitGroup], scores: Scores, least: int) -> tuple[list[tuple[str, int]], int]:
    """Order the units of all groups: each group's best `least` first, then by falling importance."""
    units = [(g.name, int(u)) for g in groups for u in range(g.size)]
    values = np.concatenate([np.asarray(scores[g.name], dtype=np.float64) for g in groups])
    order = np.argsort(-values, kind="stable")
    seen: dict[str, int] = {}
    forced: list[tuple[str, int]] = []
    free: list[tuple[str, int]] = []
    for i in order:
        name, unit = units[i]
        seen[name] = seen.get(name, 0) + 1
        (forced if seen[name] <= least else free).append((name, unit))
    return forced + free, len(forced)


def _cumulative(groups: Sequence[UnitGroup], scores: Scores, rank: list[tuple[str, int]]) -> np.ndarray:
    values = [float(scores[name][unit]) for name, unit in rank]
    return np.concatenate([[0.0], np.cumsum(values)])
