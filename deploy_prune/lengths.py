"""The sequence lengths that a budget holds at: one, or the distribution of the data's own. No torch here."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

QUANTILES = {"min": 0, "p05": 5, "p25": 25, "median": 50, "p75": 75, "p95": 95, "max": 100}


@dataclass(frozen=True)
class Lengths:
    """Hold how many rows run at each length, as ascending pairs (tokens, rows).

    With a `batch` above 1 a length is that of a whole batch, which runs at the length of its longest row. `data` is
    false for the one length of a budget that names it.
    """

    rows: tuple[tuple[int, int], ...]
    batch: int = 1
    data: bool = False

    @classmethod
    def one(cls, seq_len: int) -> Lengths:
        """Return a single length."""
        return cls(((seq_len, 1),))

    @classmethod
    def of_rows(cls, lengths: Sequence[int], batch: int = 1, seed: int = 0) -> Lengths:
        """Return the distribution of rows of these lengths, run in batches of `batch` at the length of the longest.

        The seed draws the order in which rows meet; those that do not fill a last batch are left out. There must be
        `batch` rows at least.
        """
        order = np.random.default_rng(seed).permutation(len(lengths)) if batch > 1 else np.arange(len(lengths))
        whole = np.asarray(lengths)[order[: len(lengths) // batch * batch]].reshape(-1, batch)
        counted = Counter(whole.max(axis=1).tolist())
        return cls(tuple(sorted((tokens, batch * runs) for tokens, runs in counted.items())), batch, data=True)

    @property
    def total(self) -> int:
        """Return the number of rows."""
        return sum(rows for _, rows in self.rows)

    @property
    def mean(self) -> float:
        """Return the mean over the rows, in tokens, padding included."""
        return sum(tokens * rows for tokens, rows in self.rows) / self.total

    @property
    def seq_len(self) -> int:
        """Return the one length that stands for all where there has to be one: the mean, rounded up."""
        return math.ceil(self.mean)

    def entry(self) -> dict[str, Any]:
        """Return what a manifest says: rows, batch, mean and quantiles in tokens, and the whole distribution."""
        tokens, rows = np.array(self.rows).T
        ranked = np.repeat(tokens, rows)
        found = np.percentile(ranked, list(QUANTILES.values()), method="inverted_cdf")
        return {
            "rows": self.total,
            "batch": self.batch,
            "mean": self.mean,
            "quantiles": dict(zip(QUANTILES, map(int, found), strict=True)),
            "counts": [list(pair) for pair in self.rows],
        }

    def samples(self) -> list[int]:
        """Return a few lengths of the distribution, ascending: its smallest, middle, 95% and largest."""
        quantiles = self.entry()["quantiles"]
        return sorted({quantiles[name] for name in ("min", "median", "p95", "max")})


def lengths_line(entry: Mapping[str, Any]) -> str:
    """Say in words what `Lengths.entry` holds."""
    q, batch = entry["quantiles"], entry["batch"]
    rows = f"{entry['rows']:,} rows" + (f" in batches of {batch}, each padded to its longest" if batch > 1 else "")
    return f"the lengths of {rows}: mean {entry['mean']:.1f}, median {q['median']}, 95% {q['p95']}, longest {q['max']}"


def kept_line(kept: Mapping[str, Any]) -> str:
    """Say which share of the FLOPs is kept over all rows, and at single lengths."""
    single = ", ".join(f"{100 * at['share']:.1f}% at {at['tokens']}" for at in kept["at"])
    return f"FLOPs kept: {100 * kept['all']:.1f}% over all of them, {single} tokens"
