"""Summarise latency samples: medians, percentiles, and the interval of a ratio. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ..errors import InputError, MissingExtraError

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


def summarise_ms(samples_ns: Sequence[int]) -> dict[str, float]:
    """Return median, mean, p05, p95, min and max of nanosecond samples, in milliseconds."""
    if not samples_ns:
        raise InputError("No samples to summarise.", hint="Give the measurement more time.")
    ms = np.asarray(samples_ns, dtype=np.float64) / 1e6
    low, median, high = np.percentile(ms, [5, 50, 95])
    return {
        "median": float(median),
        "mean": float(ms.mean()),
        "p05": float(low),
        "p95": float(high),
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
