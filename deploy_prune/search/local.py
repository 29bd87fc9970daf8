"""Local scope: every group keeps the same share of its units, its own best ones."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .choices import Choices, spent


def solve_local(choices: Sequence[Choices], room: np.ndarray) -> dict[str, int]:
    """Return the counts at the largest common share of each group's units that every limit (limits,) allows.

    The smallest counts must have been found to fit.
    """
    full = [int(c.counts[-1]) for c in choices]
    shares = np.unique(np.concatenate([c.counts / max(n, 1) for c, n in zip(choices, full, strict=True)]))

    def picked(share: float) -> list[int]:
        return [
            max(0, int(np.searchsorted(c.counts, share * n + 1e-9, side="right")) - 1)
            for c, n in zip(choices, full, strict=True)
        ]

    low, high = 0, len(shares) - 1
    while low < high:
        middle = (low + high + 1) // 2
        fits = bool((spent(choices, picked(shares[middle])) <= room).all())
        low, high = (middle, high) if fits else (low, middle - 1)
    return {c.name: int(c.counts[k]) for c, k in zip(choices, picked(shares[low]), strict=True)}
