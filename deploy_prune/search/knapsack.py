"""One limit: the multiple-choice knapsack, solved exactly by dynamic programming within Lagrangian bounds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..costs import Limit
from .choices import Choices, fill, improve, spent

TOLERANCE = 1e-9  # relative: a better plan than the one returned is better by less than this
MAX_STATES = 50_000  # per group; beyond it the tolerance grows tenfold, and is returned


def solve_knapsack(
    choices: Sequence[Choices], limits: Sequence[Limit], tolerance: float = TOLERANCE
) -> tuple[dict[str, int], float]:
    """Return one count per group, of the greatest total value within the limit, and the relative tolerance.

    Partial plans are extended group by group; those that cost more and are worth no more than another are
    dropped, and so are those whose bound sum_g max_k (v - lambda c) + lambda B, less what their options fall
    short of the maximum, stays below a plan already found. Feasibility of the minimum must have been checked.
    Source: Kellerer, Pferschy, Pisinger 2004, Knapsack Problems, chapter 11.
    """
    (limit,) = limits
    found = lagrangian(choices, limit.room)
    open_gap = (found.bound - found.value) / max(abs(found.value), 1e-30)
    picked = found.options  # once the tolerance has grown to its own gap
    while tolerance < open_gap:
        better = _programme(choices, limit.room, found, tolerance)
        if better is not None:
            picked = better
            break
        tolerance *= 10
    counts = {c.name: int(c.counts[k]) for c, k in zip(choices, picked, strict=True)}
    return fill(choices, counts, limit.room - spent(choices, picked)), min(tolerance, open_gap)


@dataclass
class Lagrangian:
    """Hold a multiplier, the upper bound it gives, and a feasible plan (an option per group) with its value."""

    multiplier: float
    bound: float
    options: list[int]
    value: float


def lagrangian(choices: Sequence[Choices], room: float) -> Lagrangian:
    """Minimise the dual by bisection; the plan comes from its feasible side, improved greedily."""

    def best(multiplier: float) -> list[int]:  # the cheapest of equals
        return [int(np.argmax(c.values - multiplier * c.costs[0])) for c in choices]

    def fits(picked: list[int]) -> bool:
        return float(spent(choices, picked)[0]) <= room

    low, high = 0.0, 0.0
    cheapest = [int(np.argmin(c.costs[0])) for c in choices]
    while not fits(best(high)) and best(high) != cheapest:
        high = max(4 * high, 1e-30)
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (low, middle) if fits(best(middle)) else (middle, high)
    options = best(high) if fits(best(high)) else cheapest
    options = improve(choices, options, np.array([room]))
    value = sum(float(c.values[k]) for c, k in zip(choices, options, strict=True))
    bound = high * room + sum(float((c.values - high * c.costs[0]).max()) for c in choices)
    return Lagrangian(high, max(bound, value), options, value)


def _programme(choices: Sequence[Choices], room: float, found: Lagrangian, tolerance: float) -> list[int] | None:
    """Return the best option per group, or None when there are too many partial plans."""
    floor = found.value + tolerance * abs(found.value)  # only better plans are looked for
    cheapest_rest = np.cumsum([0.0, *(float(c.costs.min()) for c in choices[::-1])])[::-1]
    cost, value, bound = np.zeros(1), np.zeros(1), np.array([found.bound])
    trail: list[tuple[np.ndarray, np.ndarray]] = []
    for g, choice in enumerate(choices):
        v, c = choice.values, choice.costs[0]
        reduced = v - found.multiplier * c
        short = reduced.max() - reduced
        allowed = np.flatnonzero(found.bound - short >= floor)
        if len(allowed) * len(cost) > 20 * MAX_STATES:
            return None
        new_cost = (cost[:, None] + c[allowed]).ravel()
        new_value = (value[:, None] + v[allowed]).ravel()
        new_bound = (bound[:, None] - short[allowed]).ravel()
        alive = np.flatnonzero((new_cost <= room - cheapest_rest[g + 1]) & (new_bound >= floor))
        order = alive[np.lexsort((-new_value[alive], new_cost[alive]))]
        if not len(order):
            return found.options
        best_so_far = np.maximum.accumulate(new_value[order])
        kept = order[np.concatenate([[True], new_value[order][1:] > best_so_far[:-1]])]
        if len(kept) > MAX_STATES:
            return None
        trail.append((kept // len(allowed), allowed[kept % len(allowed)]))
        cost, value, bound = new_cost[kept], new_value[kept], new_bound[kept]
    state = int(np.argmax(value))
    if value[state] <= found.value:
        return found.options
    options = []
    for parents, picked in reversed(trail):
        options.append(int(picked[state]))
        state = int(parents[state])
    return options[::-1]
