"""What a search chooses from: for every group, the counts it may keep, what each is worth and what it costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..costs import Limit
from ..units import ChannelGroup, Units

Scores = Mapping[str, np.ndarray]  # group name -> importance of each unit (units,)


@dataclass(frozen=True)
class Minimum:
    """Say which counts a layer may keep: at least so many units (0 = the sub-layer may go), in aligned widths.

    `align` asks that the kept columns of a sub-layer are a multiple of it; the full size is always allowed.
    Groups that are `left_out` keep nothing. A group of channels keeps at least `channels` of them, as a share of its
    own size, and never none of a residual stream.
    """

    heads: int = 1
    neurons: int = 1
    align: int = 1
    left_out: frozenset[str] = frozenset()
    channels: float = 0.0

    def counts(self, group: Units) -> np.ndarray:
        """Return the allowed counts of a group, ascending."""
        if group.name in self.left_out:
            return np.zeros(1, dtype=np.int64)
        least = min(self.heads if group.kind == "head" else self.neurons, group.size)
        if isinstance(group, ChannelGroup):
            least = max(least, round(self.channels * group.size), int(group.coupled))
        counts = np.arange(least, group.size + 1)
        return counts[(counts * group.width % self.align == 0) | (counts == group.size)]


@dataclass(frozen=True)
class Ranking:
    """Order a group's units, best first, and say what keeping the first n is worth: value (size + 1,)."""

    order: np.ndarray
    value: np.ndarray


def rank_units(scores: np.ndarray) -> Ranking:
    """Rank units by falling score, ties by the lower index; values add up."""
    scores = np.asarray(scores, dtype=np.float64)
    order = np.argsort(-scores, kind="stable")
    return Ranking(order, np.concatenate([[0.0], np.cumsum(scores[order])]))


@dataclass(frozen=True)
class Choices:
    """Hold one group's K options: counts (K,), their values (K,) and costs (limits, K)."""

    name: str
    counts: np.ndarray
    values: np.ndarray
    costs: np.ndarray

    @classmethod
    def of(cls, group: Units, value: np.ndarray, limits: Sequence[Limit], minimum: Minimum) -> Choices:
        counts = minimum.counts(group)
        tables: list[Any] = [x.table for x in limits]  # additive ones
        costs = np.stack([np.asarray(table.groups[group.name], dtype=np.float64)[counts] for table in tables])
        return cls(group.name, counts, value[counts], costs)


def spent(choices: Sequence[Choices], picked: Sequence[int]) -> np.ndarray:
    """Return what a plan (an option per group) costs (limits,), without what cannot be cut."""
    return np.sum([c.costs[:, k] for c, k in zip(choices, picked, strict=True)], axis=0)


def improve(choices: Sequence[Choices], picked: Sequence[int], room: np.ndarray) -> list[int]:
    """Exchange one group's option at a time for the one that gains most within the limits (limits,)."""
    picked = list(picked)
    left = room - spent(choices, picked)
    while True:
        gains = []
        for g, c in enumerate(choices):
            fits = (c.costs - c.costs[:, picked[g], None] <= left[:, None]).all(0)
            gain = np.where(fits, c.values - c.values[picked[g]], -np.inf)
            gains.append((float(gain.max()), -g, int(np.argmax(gain))))
        best, g, k = max(gains)
        if best <= 0:
            return picked
        left = left - (choices[-g].costs[:, k] - choices[-g].costs[:, picked[-g]])
        picked[-g] = k


def fill(choices: Sequence[Choices], chosen: dict[str, int], room: np.ndarray) -> dict[str, int]:
    """Raise the counts of `chosen`, group by group, as far as what is left of the limits (limits,) allows.

    What is worth nothing may stay where there is room for it.
    """
    filled = dict(chosen)
    for c in choices:
        at = int(np.searchsorted(c.counts, filled[c.name]))
        extra = c.costs - c.costs[:, at : at + 1]
        fits = np.flatnonzero((extra <= room[:, None]).all(0) & (c.values >= c.values[at]))
        best = int(fits[-1]) if len(fits) else at
        if best > at:
            room = room - extra[:, best]
            filled[c.name] = int(c.counts[best])
    return filled
