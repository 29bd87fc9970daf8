"""Judge what was measured: which limits a candidate keeps, the front, the winner, and why. No torch."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

NEAR_MISSES = 5  # that are told, the nearest first

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Limits:
    """Hold what a candidate must keep to: the latency's upper end in ms, and the loss in points."""

    target_ms: float
    max_loss: float

    def failures(self, record: Record, latency: Record | None = None) -> list[str]:
        """Say in words which limits a measured candidate fails, none if it keeps both; `latency` replaces its own."""
        said = []
        measured = latency or record["latency"]
        low, high = measured["low_ms"], measured["high_ms"]
        if high > self.target_ms:
            span = f"{measured['median_ms']:.3g} ms [{low:.3g}, {high:.3g}]"
            if low <= self.target_ms:
                said.append(f"latency: {span} is within noise of {self.target_ms:g} ms, and its upper end decides")
            else:
                said.append(f"latency: {span} is above {self.target_ms:g} ms")
        if record["loss"] > self.max_loss:
            said.append(f"quality: {points(record['loss'])}, {self.max_loss:g} may be lost")
        return said

    def excess(self, record: Record) -> float:
        """Return how far a candidate is beyond its limits, each relative to itself (a loss of 0 counts as 1 point)."""
        late = record["latency"]["high_ms"] / self.target_ms - 1
        return max(late, 0.0) + max(record["loss"] - self.max_loss, 0.0) / max(self.max_loss, 1.0)


def points(loss: float) -> str:
    """Say what a loss of quality in points is."""
    return f"loses {loss:.2f} points" if loss >= 0 else f"gains {-loss:.2f} points"


def measured(records: Sequence[Record]) -> list[Record]:
    """Return the candidates that were made and measured, each once."""
    return [r for r in records if r["state"] == "measured"]


def order(record: Record) -> tuple[float, float, int]:
    """Sort by the least loss, then by the least latency."""
    return record["loss"], record["latency"]["high_ms"], record["number"]


def front(records: Sequence[Record]) -> list[Record]:
    """Return the candidates than which none is both faster and better, the fastest first."""
    found: list[Record] = []
    for r in sorted(measured(records), key=lambda r: (r["latency"]["median_ms"], *order(r))):
        if not found or r["loss"] < found[-1]["loss"]:
            found.append(r)
    return found


def feasible(records: Sequence[Record], limits: Limits) -> list[Record]:
    """Return the candidates that keep both limits, the best first."""
    return sorted((r for r in measured(records) if not limits.failures(r)), key=order)


def title(record: Record) -> str:
    """Name a candidate: its number, what it keeps, and its form."""
    kept = "dense" if record["keep"] == 1 else f"keep {record['keep']:.2f}, align {record['align']}"
    return f"#{record['number']} ({kept}, {record['form']})"


def why(winner: Record, records: Sequence[Record], limits: Limits, refuted: Collection[int] = ()) -> str:
    """Say why a candidate won over those that keep both limits and were not `refuted` by a second measurement."""
    latency = winner["latency"]
    said = (
        f"{title(winner)} wins: {latency['median_ms']:.3g} ms, upper end {latency['high_ms']:.3g} of at most"
        f" {limits.target_ms:g}; it {points(winner['loss'])}, {limits.max_loss:g} may be lost"
    )
    others = [r for r in feasible(records, limits) if r["number"] not in (winner["number"], *refuted)]
    if not others:
        return f"{said}; no other candidate keeps both limits."
    alone = winner["loss"] < others[0]["loss"]
    least = "it loses least" if alone else "none loses less, and of equals it is the fastest"
    return f"{said}; of {len(others) + 1} candidates within both limits {least}; next comes {title(others[0])}."


def not_made(records: Sequence[Record]) -> list[str]:
    """Say which candidates could not be built or run, and why."""
    return [f"{title(r)}: {r['reason']}" for r in records if r["state"] == "failed"]


def near_misses(records: Sequence[Record], limits: Limits, refuted: Mapping[int, Record]) -> list[str]:
    """Say of the nearest candidates that failed which limit it was; `refuted` holds second measurements that failed."""
    found = []
    for r in sorted(measured(records), key=limits.excess):
        if r["number"] in refuted:
            found.append(f"{title(r)}: measured again, {'; '.join(limits.failures(r, refuted[r['number']]))}")
        elif failed := limits.failures(r):
            found.append(f"{title(r)}: {'; '.join(failed)}")
    return found[:NEAR_MISSES]
