"""Costs with products of counts: prices and exchanges, every plan checked against the exact cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..costs import CostTable, Limit, ProductTable
from ..units import Units
from .choices import Minimum

BISECTIONS = 60
SWEEPS = 50  # over the groups at one price; counts settle after a few


@dataclass(frozen=True)
class _Option:
    """Hold a group's allowed counts (K,) and what each is worth (K,)."""

    counts: np.ndarray
    values: np.ndarray


class _Costs:
    """Hold one limit's cost as base + a.n + n.Q.n / 2, and what is allowed."""

    def __init__(self, limit: Limit, names: Sequence[str]) -> None:
        table = limit.table
        if isinstance(table, CostTable):
            raise TypeError("an additive table has no products")
        at = {name: i for i, name in enumerate(names)}
        self.single = np.array([table.single.get(name, 0.0) for name in names])
        self.double = np.zeros((len(names), len(names)))
        for (g, h), b in table.double.items():
            self.double[at[g], at[h]] += b
            self.double[at[h], at[g]] += b
        self.base, self.most = table.base, limit.most

    def total(self, n: np.ndarray) -> float:
        """Return the exact cost of counts (G,)."""
        return float(self.base + self.single @ n + n @ self.double @ n / 2)

    def step(self, n: np.ndarray, g: int, to: np.ndarray) -> np.ndarray:
        """Return the change of the cost when group g goes to other counts (K,)."""
        return (to - n[g]) * (self.single[g] + self.double[g] @ n) + (to - n[g]) ** 2 * self.double[g, g] / 2


def solve_products(
    groups: Sequence[Units], values: Mapping[str, np.ndarray], limits: Sequence[Limit], minimum: Minimum
) -> dict[str, int]:
    """Return one count per group of great total value, the exact cost of all within every limit.

    At a price for cost each group in turn takes its best count at the others' counts, until none changes; the
    price is bisected. Then groups exchange channels, one group's rise paid for by another's fall, while that gains
    value. A heuristic: nothing bounds the distance to the optimum. The smallest counts must have been found to fit.
    """
    options = [_options(g, values[g.name], minimum) for g in groups]
    costs = [_Costs(limit, [g.name for g in groups]) for limit in limits]
    n = _priced(options, costs)
    n = _exchange(options, costs, n)
    return {g.name: int(c) for g, c in zip(groups, n, strict=True)}


def solve_equal_shares(groups: Sequence[Units], limits: Sequence[Limit], minimum: Minimum) -> dict[str, int]:
    """Return the counts at the largest common share of each group that every limit allows."""
    allowed = {g.name: minimum.counts(g) for g in groups}

    def counts(share: float) -> dict[str, int]:
        found = {}
        for g in groups:
            at = np.searchsorted(allowed[g.name], share * g.size + 1e-9, side="right") - 1
            found[g.name] = int(allowed[g.name][max(0, int(at))])
        return found

    shares = np.unique(np.concatenate([allowed[g.name] / g.size for g in groups]))
    fitting = [s for s in shares if all(x.table.cost(counts(float(s))) <= x.most for x in limits)]
    return counts(float(max(fitting, default=0.0)))


def additive(limits: Sequence[Limit]) -> list[Limit] | None:
    """Return the limits with additive tables, or None where counts meet in products."""
    found = []
    for x in limits:
        table = x.table
        if isinstance(table, ProductTable):
            if not table.additive:
                return None
            table = table.around(table.sizes)
        found.append(Limit(table, x.most, x.keep))
    return found


def _options(group: Units, values: np.ndarray, minimum: Minimum) -> _Option:
    counts = minimum.counts(group)
    return _Option(counts.astype(np.float64), values[counts])


def _fits(costs: Sequence[_Costs], n: np.ndarray) -> bool:
    return all(c.total(n) <= c.most for c in costs)


def _priced(options: Sequence[_Option], costs: Sequence[_Costs]) -> np.ndarray:
    """Return the most valuable counts (G,) that fit among those that the bisected prices lead to."""
    smallest = np.array([o.counts[0] for o in options])
    best, low, high = smallest, 0.0, 1.0
    total = sum(float(o.values.max() - o.values.min()) for o in options) or 1.0

    def settled(price: float) -> np.ndarray:
        n = np.array([o.counts[-1] for o in options])
        for _ in range(SWEEPS):
            before = n.copy()
            for g, o in enumerate(options):
                spent = sum(c.step(n, g, o.counts) / c.most for c in costs)
                n[g] = o.counts[int(np.argmax(o.values / total - price * spent))]
            if (n == before).all():
                break
        return n

    while not _fits(costs, settled(high)) and high < 1e12:
        low, high = high, 4 * high
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        n = settled(middle)
        if _fits(costs, n):
            high = middle
            best = max(best, n, key=lambda m: _worth(options, m))
        else:
            low = middle
    return best


def _worth(options: Sequence[_Option], n: np.ndarray) -> float:
    return sum(float(o.values[int(np.searchsorted(o.counts, c))]) for o, c in zip(options, n, strict=True))


def _exchange(options: Sequence[_Option], costs: Sequence[_Costs], n: np.ndarray) -> np.ndarray:
    """Let two groups at a time (or one) change their counts, as long as value is gained within the limits."""
    n = n.copy()
    while True:
        at = [int(np.searchsorted(o.counts, c)) for o, c in zip(options, n, strict=True)]
        gain, move = 0.0, None
        for g, o in enumerate(options):
            for k in {max(at[g] - 1, 0), min(at[g] + 1, len(o.counts) - 1)}:
                first = o.values[k] - o.values[at[g]]
                found = _best_partner(options, costs, n, at, g, k)
                if first + found[0] > gain * (1 + 1e-12) + 1e-15:
                    gain, move = first + found[0], (g, k, *found[1:])
        if move is None:
            return n
        g, k, h, j = move
        n[g] = options[g].counts[k]
        if h >= 0:
            n[h] = options[h].counts[j]


def _best_partner(
    options: Sequence[_Option], costs: Sequence[_Costs], n: np.ndarray, at: Sequence[int], g: int, k: int
) -> tuple[float, int, int]:
    """Return the best change of another group (gain, group or -1, option) beside group g's going to option k."""
    moved = n.copy()
    moved[g] = options[g].counts[k]
    room = [c.most - c.total(moved) for c in costs]
    best = (0.0, -1, 0) if min(room) >= 0 and k != at[g] else (-np.inf, -1, 0)
    for h, o in enumerate(options):
        if h == g:
            continue
        fits = np.ones(len(o.counts), dtype=bool)
        for c, left in zip(costs, room, strict=True):
            fits &= c.step(moved, h, o.counts) <= left
        gains = np.where(fits, o.values - o.values[at[h]], -np.inf)
        j = int(np.argmax(gains))
        if gains[j] > best[0]:
            best = float(gains[j]), h, j
    return best
