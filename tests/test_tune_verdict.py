"""The verdict of a tuning: the front, the winner and why, near misses, and how wide a measurement's interval is."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from deploy_prune.tune.verdict import Limits, feasible, front, near_misses, title, why
from deploy_prune.tune.workbench import Latency


def record(number: int, low: float, ms: float, high: float, loss: float, **changes: Any) -> dict[str, Any]:
    """Return a measured trial."""
    latency = {"low_ms": low, "median_ms": ms, "high_ms": high}
    said = {"number": number, "keep": 0.5, "align": 8, "form": "ort-cpu x", "state": "measured", "predicted_ms": None}
    return {**said, "latency": latency, "loss": loss, **changes}


TRIALS = [
    record(0, 9, 10, 11, 0.0, keep=1.0),
    record(1, 4, 4.4, 4.9, 0.5),
    record(2, 4.7, 4.9, 5.2, 0.2),
    record(3, 3, 3.1, 3.2, 1.5),
    record(4, 2, 2.1, 2.2, 0.7),
    record(5, 2, 2.2, 2.4, 0.9),
    {**record(6, 1, 1, 1, 0.0), "state": "repeated"},
    {"number": 7, "keep": 0.9, "align": 1, "form": "ort-cpu x", "state": "discarded", "predicted_ms": 9.0},
]
LIMITS = Limits(5.0, 1.0)


def test_the_front_and_the_winner() -> None:
    assert [r["number"] for r in front(TRIALS)] == [4, 1, 2, 0]
    best = feasible(TRIALS, LIMITS)
    assert [r["number"] for r in best] == [1, 4, 5]
    said = "it loses 0.50 points, 1 may be lost; of 3 candidates within both limits it loses least; next comes #4 ("
    assert said in why(best[0], TRIALS, LIMITS)
    tied = [record(0, 1, 1, 1, -0.5), record(1, 2, 2, 2, -0.5)]
    assert "it gains 0.50 points, 1 may be lost; of 2 candidates" in why(tied[0], tied, LIMITS)
    assert "none loses less, and of equals it is the fastest" in why(tied[0], tied, LIMITS)
    assert why(best[1], TRIALS, LIMITS, {1, 5}).endswith("no other candidate keeps both limits.")
    assert title(TRIALS[0]) == "#0 (dense, ort-cpu x)"


def test_near_misses_name_the_limit_and_the_noise() -> None:
    said = near_misses(TRIALS, LIMITS, {4: {"low_ms": 4, "median_ms": 5.1, "high_ms": 5.2}})
    name = "(keep 0.50, align 8, ort-cpu x)"
    assert said[0].startswith(f"#4 {name}: measured again, latency: 5.1 ms [4, 5.2] is within noise of 5 ms")
    assert said[1] == f"#2 {name}: latency: 4.9 ms [4.7, 5.2] is within noise of 5 ms, and its upper end decides"
    assert said[2].endswith("quality: loses 1.50 points, 1 may be lost")
    assert said[3] == "#0 (dense, ort-cpu x): latency: 10 ms [9, 11] is above 5 ms"


def test_an_interval_is_no_narrower_than_the_noise() -> None:
    own, dense = np.full(20, 4e6), np.full(20, 8e6)
    found = Latency.of_rounds(own, dense, 0.1, None)
    assert (found.low_ms, found.median_ms, found.high_ms, found.dense_ms) == pytest.approx((4 / 1.1, 4.0, 4.4, 8.0))
    assert Latency.of_rounds(own, dense, 2.0, None).low_ms > 0  # whatever the noise
    rng = np.random.default_rng(0)
    wide = Latency.of_rounds(rng.uniform(3e6, 5e6, 30), dense, 0.0, None)
    assert 3 < wide.low_ms < wide.median_ms < wide.high_ms < 5
