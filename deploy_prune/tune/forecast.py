"""Predict a candidate's latency before it is made: the table's share of the dense one, corrected by measurements."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from ..errors import InfeasibleBudgetError
from .space import WHOLE, Choice, Form
from .verdict import Record
from .workbench import Workbench


@dataclass(frozen=True)
class Forecast:
    """Predict from the table and from what has been measured up to now."""

    bench: Workbench
    records: Sequence[Record]

    def dense(self, form: Form) -> Record | None:
        """Return the record of the dense model in a form, measured or failed, None where it was not tried."""
        tried = (r for r in self.records if r["state"] in ("measured", "failed") and r["keep"] == 1)
        return next((r for r in tried if r["form"] == form.name), None)

    def table_ms(self, choice: Choice) -> float | None:
        """Return the table's share of the measured dense latency, None where that one is not known.

        Raises InfeasibleBudgetError where so little cannot be kept.
        """
        dense, share = self.dense(choice.form), self.bench.predicted(choice)
        return share * float(dense["latency"]["median_ms"]) if dense and dense["state"] == "measured" else None

    def ms(self, choice: Choice) -> float | None:
        """Return the predicted latency; pruned candidates of the form correct the table, which was probed in fp32."""
        predicted = self.table_ms(choice)
        return None if predicted is None else predicted * self.correction(choice.form)

    def correction(self, form: Form) -> float:
        """Return by what the pruned candidates of a form were slower than the table says, in the median."""
        pruned = [r for r in self._measured(form) if r["keep"] < 1 and r["table_ms"]]
        return median(r["latency"]["median_ms"] / r["table_ms"] for r in pruned) if pruned else 1.0

    def spread(self, form: Form) -> float:
        """Return how far the upper end was above the median, as a ratio, in the median of a form's measurements."""
        return median(r["latency"]["high_ms"] / r["latency"]["median_ms"] for r in self._measured(form))

    def largest(self, form: Form, target_ms: float) -> int | None:
        """Return the largest percentage below the whole whose upper end is predicted to reach the target, or None."""
        dense = self.dense(form)
        if dense is None or dense["state"] != "measured":
            return None
        within = target_ms / self.spread(form)

        def reached(percent: int, infeasible: bool) -> bool:
            try:
                predicted = self.ms(Choice(percent, self.bench.settings.aligns[0], form))
            except InfeasibleBudgetError:
                return infeasible
            return predicted is not None and predicted <= within

        low, high = self.bench.space.least, WHOLE - 1
        while low < high:  # what cannot be kept is on the side of the small ones
            middle = (low + high + 1) // 2
            low, high = (middle, high) if reached(middle, infeasible=True) else (low, middle - 1)
        return low if reached(low, infeasible=False) else None

    def _measured(self, form: Form) -> list[Record]:
        return [r for r in self.records if r["state"] == "measured" and r["form"] == form.name]
