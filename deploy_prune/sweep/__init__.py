"""A table of models x tasks x budgets x seeds x methods, computed on the cores of this machine or on a Ray cluster."""

from .run import Sweep, run_sweep
from .settings import Entry, SweepSettings

__all__ = ["Entry", "Sweep", "SweepSettings", "run_sweep"]
