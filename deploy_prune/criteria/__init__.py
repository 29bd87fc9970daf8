"""Criteria score units from the calibration statistics, one file each.

Others may be added by the entry-point group "deploy_prune.criteria": a callable from
CalibrationStats to {group name: scores (units,)}, larger meaning more important.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib.metadata import entry_points

import numpy as np

from ..calibration import CalibrationStats
from ..errors import InputError
from .fisher import PAPER_BATCH_ROWS, fisher, fisher_batch

Criterion = Callable[[CalibrationStats], dict[str, np.ndarray]]

__all__ = ["PAPER_BATCH_ROWS", "Criterion", "criteria", "fisher", "fisher_batch", "get_criterion"]


@cache
def criteria() -> dict[str, Criterion]:
    """Map each criterion's name to the criterion."""
    found: dict[str, Criterion] = {"fisher": fisher, "fisher-batch": fisher_batch}
    found |= {point.name: point.load() for point in entry_points(group="deploy_prune.criteria")}
    return found


def get_criterion(name: str) -> Criterion:
    """Return a criterion by name. Raises InputError for an unknown one."""
    if name not in criteria():
        raise InputError(f"Unknown criterion '{name}'.", hint=f"Available: {', '.join(sorted(criteria()))}.")
    return criteria()[name]
