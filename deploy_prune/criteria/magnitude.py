"""Norms of a unit's weights; no data needed."""

from __future__ import annotations

from functools import partial
from typing import Literal

import torch

from .base import Evidence, Scores


def magnitude(evidence: Evidence, side: Literal["in", "out"], order: int) -> Scores:
    """Return the L1 or L2 norm of the weights that produce a unit ("in") or read it ("out") (units,).

    Source: Li et al. 2017, Pruning Filters for Efficient ConvNets (L1); Han et al. 2015 (L2).
    """
    scores = {}
    for g in evidence.groups:
        units = evidence.producing(g) if side == "in" else evidence.reading(g)  # (units, weights)
        scores[g.name] = torch.linalg.vector_norm(units, ord=order, dim=1).numpy()
    return scores


MAGNITUDES = {f"magnitude-l{o}-{s}": partial(magnitude, side=s, order=o) for s in ("in", "out") for o in (1, 2)}
