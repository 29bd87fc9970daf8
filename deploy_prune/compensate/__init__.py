"""Compensation: change what is left so that the pruned model answers like the dense one."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib.metadata import entry_points

from ..errors import InputError
from .layers import GroupLog, SweepResult, sweep
from .mask_tuning import MaskTuning
from .refit import Refit
from .solution import Solver

__all__ = ["GroupLog", "MaskTuning", "Refit", "Solver", "SweepResult", "get_solver", "solvers", "sweep"]


@cache
def solvers() -> dict[str, Callable[[], Solver]]:
    """Map each compensation's name to its factory; "deploy_prune.compensators" adds others."""
    found: dict[str, Callable[[], Solver]] = {
        "refit": Refit,
        "refit-parallel": lambda: Refit(parallel=True),
        "mask-tuning": MaskTuning,
        "mask-tuning-exact": lambda: MaskTuning(solver="exact"),
    }
    return found | {point.name: point.load() for point in entry_points(group="deploy_prune.compensators")}


def get_solver(name: str) -> Solver:
    """Return a solver by name. Raises InputError for an unknown one."""
    if name not in solvers():
        raise InputError(f"Unknown compensation '{name}'.", hint=f"Available: none, {', '.join(sorted(solvers()))}.")
    return solvers()[name]()
