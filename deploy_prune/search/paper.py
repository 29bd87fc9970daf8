"""The paper's greedy search (Kwon et al. 2022, algorithm 1), for FLOPs and for piecewise-linear latency."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..costs import CostTable, Limit
from ..errors import InputError, UnsupportedModelError
from ..units import MaskSet, UnitGroup
from .choices import Minimum, Scores

Unit = tuple[str, int]


def search_paper(groups: Sequence[UnitGroup], scores: Scores, limits: Sequence[Limit], minimum: Minimum) -> MaskSet:
    """Return masks by greedy search: for every number of heads, the rest of the budget goes to neurons.

    The most important units come first, the pair with the largest kept importance wins, ties by the fewer
    heads and the lower index. Latency is read as flat up to a knee and linear beyond it: what lies below the
    knee is free, and kept in every layer. The plan is within the limit by the table itself.

    Raises InputError for several limits or for aligned widths, UnsupportedModelError for layers whose units
    cost unequally. Source: Kwon et al. 2022, section 3.2, algorithm 1 and section 4.3.
    """
    if len(limits) != 1 or limits[0].table.kind not in ("flops", "latency") or minimum.align != 1:
        raise InputError(
            "The paper's search takes one budget, of FLOPs or latency, without aligned widths.",
            hint="Use --search exact.",
        )
    (limit,) = limits
    table: Any = limit.table  # an additive one
    heads = [g for g in groups if g.kind == "head"]
    neurons = [g for g in groups if g.kind == "neuron"]
    head_knee, head_flat, head_cost = _line(heads, table)
    neuron_knee, neuron_flat, neuron_cost = _line(neurons, table)
    head_rank, least_heads = _rank(heads, scores, max(minimum.heads, head_knee))
    neuron_rank, least_neurons = _rank(neurons, scores, max(minimum.neurons, neuron_knee))
    room = limit.room - len(heads) * head_flat - len(neurons) * neuron_flat

    n_heads = np.arange(least_heads, len(head_rank) + 1)
    beyond = n_heads - len(heads) * head_knee
    n_neurons = len(neurons) * neuron_knee + (room - beyond * head_cost) // neuron_cost
    n_neurons = np.minimum(n_neurons, len(neuron_rank)).astype(int)
    feasible = n_neurons >= least_neurons  # a negative count never gets here
    n_heads, n_neurons = n_heads[feasible], n_neurons[feasible]
    if not len(n_heads):  # the line lies above the table
        n_heads, n_neurons = np.array([least_heads]), np.array([least_neurons])
    kept = _cumulative(scores, head_rank)[n_heads] + _cumulative(scores, neuron_rank)[n_neurons]
    best = int(np.argmax(kept))
    return _within(groups, limit, head_rank[: n_heads[best]], neuron_rank[: n_neurons[best]], minimum)


def _within(
    groups: Sequence[UnitGroup], limit: Limit, heads: list[Unit], neurons: list[Unit], minimum: Minimum
) -> MaskSet:
    """Return the masks, less the last neurons and then heads that the table, unlike the line, has no room for."""
    masks = MaskSet({g.name: np.zeros(g.size) for g in groups})
    for name, unit in heads + neurons:
        masks[name][unit] = 1.0
    counts = {g.name: int(masks[g.name].sum()) for g in groups}
    least = {g.name: int(minimum.counts(g)[0]) for g in groups}
    spare = [*heads, *neurons]
    while limit.table.cost(counts) > limit.most:
        name, unit = spare.pop()
        if counts[name] > least[name]:
            masks[name][unit] = 0.0
            counts[name] -= 1
    return masks


def _line(groups: Sequence[UnitGroup], table: CostTable) -> tuple[int, float, float]:
    """Fit a flat part and a slope to the groups' costs: the knee's count, the flat cost, the cost per unit beyond.

    Linear costs from 0, such as FLOPs, give (0, 0, cost of a unit).
    """
    costs = {tuple(np.asarray(table.groups[g.name], dtype=np.float64)) for g in groups}
    if len(costs) != 1:
        raise UnsupportedModelError(
            "The paper's search needs equal unit costs in all layers.",
            hint="This architecture has layers of different widths; use --search exact.",
        )
    y = np.array(costs.pop())
    x = np.arange(len(y))
    if y[0] == 0 and np.array_equal(y, x * y[1]):
        return 0, 0.0, float(y[1])
    best = (np.inf, 0, 0.0, 1.0)
    for knee in range(len(y) - 1):
        ramp = np.maximum(x - knee, 0).astype(np.float64)
        slope, flat = np.polyfit(ramp, y, 1)
        error = float(np.square(flat + slope * ramp - y).sum())
        if slope > 0 and error < best[0] * (1 - 1e-9):
            best = (error, knee, max(float(flat), 0.0), float(slope))
    _, knee, flat, slope = best
    return knee, flat, slope


def _rank(groups: Sequence[UnitGroup], scores: Scores, least: int) -> tuple[list[Unit], int]:
    """Order the units of all groups: each group's best `least` first, then by falling importance."""
    units = [(g.name, int(u)) for g in groups for u in range(g.size)]
    values = np.concatenate([np.asarray(scores[g.name], dtype=np.float64) for g in groups])
    order = np.argsort(-values, kind="stable")
    seen: dict[str, int] = {}
    forced: list[Unit] = []
    free: list[Unit] = []
    for i in order:
        name, unit = units[i]
        seen[name] = seen.get(name, 0) + 1
        (forced if seen[name] <= least else free).append((name, unit))
    return forced + free, len(forced)


def _cumulative(scores: Mapping[str, np.ndarray], rank: list[Unit]) -> np.ndarray:
    values = [float(scores[name][unit]) for name, unit in rank]
    return np.concatenate([[0.0], np.cumsum(values)])
