"""Decide step by step whether a ratio is above a limit, stopping as soon as that is sure. No torch.

What is observed is one log ratio a session, each from fresh processes. At planned numbers of sessions the mean's
one-sided Student intervals are looked at. The chance of an error is shared out evenly over the looks, so that the sum
bounds it (Bonferroni) whatever the looks have in common; nothing else is assumed than that sessions are independent
and their mean nearly normal.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np

from ..errors import MissingExtraError

Decision = Literal["slower", "within"]
POWER = 0.9  # of what the test is said to see


@dataclass(frozen=True)
class Plan:
    """Say when to look, and how often a look may be wrong.

    `false_alarms` bounds the chance to call "slower" what is exactly at the limit (and so what is below it),
    `misses` the chance to call "within" what is at the limit or above. 0.003 keeps even A/A runs on a machine so
    noisy that the limit lies within the noise at 1 false alarm in 333.
    """

    looks: tuple[int, ...] = (4, 6, 9, 13, 18, 24)
    false_alarms: float = 0.003
    misses: float = 0.02

    @property
    def sessions(self) -> int:
        return self.looks[-1]


@dataclass(frozen=True)
class Estimate:
    """Hold a ratio with its one-sided bounds of one look, and the smallest ratio that a look like it sees."""

    value: float
    low: float
    high: float
    visible: float  # a true ratio that is called "slower" with 90% chance

    def decide(self, limit: float) -> Decision | None:
        """Return what is sure, or None."""
        if self.low > limit:
            return "slower"
        return "within" if self.high < limit else None


def estimate(log_ratios: Sequence[float], limit: float, plan: Plan) -> Estimate:
    """Return the ratio over the sessions so far (2 or more), with the bounds of one look of the plan."""
    n, mean = len(log_ratios), float(np.mean(log_ratios))
    error = float(np.std(log_ratios, ddof=1)) / math.sqrt(n)
    low = _quantile(plan.false_alarms / len(plan.looks), n - 1)
    high = _quantile(plan.misses / len(plan.looks), n - 1)
    return Estimate(
        value=math.exp(mean),
        low=math.exp(mean - low * error),
        high=math.exp(mean + high * error),
        visible=limit * math.exp((low + _quantile(1 - POWER, n - 1)) * error),
    )


def run_plan(log_ratios: Sequence[float], limit: float, plan: Plan) -> tuple[Decision | None, int, Estimate]:
    """Replay a whole plan on given sessions: the decision, the sessions it took, and the last estimate."""
    for look in plan.looks:
        if look > len(log_ratios):
            break
        found, used = estimate(log_ratios[:look], limit, plan), look
        if (decision := found.decide(limit)) is not None:
            return decision, used, found
    return None, used, found


@cache
def _quantile(tail: float, freedom: int) -> float:
    try:
        from scipy.stats import t
    except ImportError as error:
        raise MissingExtraError("scipy", "cpu") from error
    return float(t.isf(tail, freedom))
