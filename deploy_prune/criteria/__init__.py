"""Criteria score units, one small file each.

Others may be added by the entry-point group "deploy_prune.criteria": a `Criterion`, that is a function from
`Evidence` to {group name: scores (units,)}, larger meaning more important, and whether it is data-free.
"""

from __future__ import annotations

from functools import cache
from importlib.metadata import entry_points

from ..errors import InputError
from .activation import activation, activation_weight
from .base import Criterion, Evidence, Scores
from .fisher import PAPER_BATCH_ROWS, fisher, fisher_batch
from .magnitude import MAGNITUDES
from .obs import obs, reconstruction
from .random import random
from .taylor import head_sensitivity, snip, taylor

__all__ = ["PAPER_BATCH_ROWS", "Criterion", "Evidence", "Scores", "criteria", "fisher", "get_criterion"]


@cache
def criteria() -> dict[str, Criterion]:
    """Map each criterion's name to the criterion."""
    found = {
        "obs": Criterion(obs, gradient_moments=True),
        "reconstruction": Criterion(reconstruction),
        "fisher": Criterion(fisher),
        "fisher-batch": Criterion(fisher_batch),
        "taylor": Criterion(taylor),
        "head-sensitivity": Criterion(head_sensitivity),
        "snip": Criterion(snip),
        "activation": Criterion(activation),
        "activation-weight": Criterion(activation_weight),
        **{name: Criterion(score, data_free=True) for name, score in MAGNITUDES.items()},
        "random": Criterion(random, data_free=True),
    }
    return found | {point.name: point.load() for point in entry_points(group="deploy_prune.criteria")}


def get_criterion(name: str) -> Criterion:
    """Return a criterion by name. Raises InputError for an unknown one."""
    if name not in criteria():
        raise InputError(f"Unknown criterion '{name}'.", hint=f"Available: {', '.join(sorted(criteria()))}.")
    return criteria()[name]
