"""Find the budget, alignment, precision and file that meet a latency and a quality, by Optuna and real measurements."""

from __future__ import annotations

from .settings import TuneSettings

__all__ = ["TuneSettings"]
