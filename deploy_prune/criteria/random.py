"""A control: units in no order at all."""

from __future__ import annotations

import numpy as np

from .base import Evidence, Scores


def random(evidence: Evidence) -> Scores:
    """Return uniform random numbers (units,), the same for the same seed."""
    rng = np.random.default_rng(evidence.seed)
    return {g.name: rng.random(g.size) for g in evidence.groups}
