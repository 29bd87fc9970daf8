"""Summarise latency samples: medians, percentiles, and the interval of a ratio. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from ..errors import InputError, MissingExtraError

Difference = Literal["faster", "slower", "none"]
RESAMPLES = 2000
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Ratio:
    """Hold a ratio of medians with its bootstrap interval."""

    value: float
    low: float
    high: float

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


def summarise_ms(samples_ns: Sequence[float]) -> dict[str, float]:
    """Return median, mean, p05, p90, p95, p99, min and max of nanosecond samples, in milliseconds."""
    if not samples_ns:
        raise InputError("No samples to summarise.", hint="Give the measurement more time.")
    ms = np.asarray(samples_ns, dtype=np.float64) / 1e6
    p05, median, p90, p95, p99 = (float(p) for p in np.percentile(ms, [5, 50, 90, 95, 99]))
    return {
        "median": median,
        "mean": float(ms.mean()),
        "p05": p05,
        "p90": p90,
        "p95": p95,
        "p99": p99,
        "min": float(ms.min()),
        "max": float(ms.max()),
    }


def ratio_of_medians(numerator: Sequence[float], denominator: Sequence[float], *, seed: int = 0) -> Ratio:
    """Return median(numerator) / median(denominator) of samples taken in pairs, with its interval.

    The interval is the paired percentile bootstrap's (rounds are resampled, so that what slows a whole
    round does not widen it). Raises InputError for fewer than 2 pairs or unequal lengths.
    """
    try:
        from scipy.stats import bootstrap
    except ImportError as error:
        raise MissingExtraError("scipy", "cpu") from error
    if len(numerator) != len(denominator) or len(numerator) < 2:
        raise InputError(f"A ratio needs at least 2 pairs of samples, got {len(numerator)} and {len(denominator)}.")

    def statistic(a: np.ndarray, b: np.ndarray, axis: int = -1) -> Any:
        return np.median(a, axis=axis) / np.median(b, axis=axis)

    pair = (np.asarray(numerator, dtype=np.float64), np.asarray(denominator, dtype=np.float64))
    result = bootstrap(
        pair,
        statistic,
        n_resamples=RESAMPLES,
        confidence_level=CONFIDENCE,
        method="percentile",
        paired=True,
        vectorized=True,
        random_state=seed,
    )
    interval = result.confidence_interval
    return Ratio(float(statistic(*pair)), float(interval.low), float(interval.high))


def half_width(values: Sequence[float]) -> float | None:
    """Return the half width of the mean's 95% t-interval (Student's, over runs), None for a single value."""
    if len(values) < 2:
        return None
    try:
        from scipy.stats import sem, t
    except ImportError as error:
        raise MissingExtraError("scipy", "cpu") from error
    return float(t.ppf((1 + CONFIDENCE) / 2, len(values) - 1) * sem(values))


def median_interval(samples: Sequence[float], *, seed: int = 0) -> Ratio:
    """Return the median of rounds with its percentile bootstrap interval, in the samples' unit.

    Raises InputError for fewer than 2 rounds.
    """
    return ratio_of_medians(samples, [1.0] * len(samples), seed=seed)


def noise_floor(control: Mapping[str, float]) -> float:
    """Return how far from 1 the ratio of a model to itself, in another process, may lie: its interval's farther end."""
    return max(control["high"] - 1.0, 1.0 - control["low"], 0.0)


def tell_difference(ratio: Mapping[str, float], floor: float | None) -> Difference:
    """Say whether a ratio shows a difference: its whole interval lies beyond the noise floor (None: 0)."""
    if ratio["high"] < 1.0 - (floor or 0.0):
        return "faster"
    if ratio["low"] > 1.0 + (floor or 0.0):
        return "slower"
    return "none"
