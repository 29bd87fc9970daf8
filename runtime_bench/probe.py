"""Turn the latencies of uniformly cut models into a table of what every count costs. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ..errors import MissingExtraError
from ..latency_table import KindTable
from .stats import Ratio


class Point(NamedTuple):
    """Name a model whose layers all keep so many heads and neurons."""

    heads: int
    neurons: int


def grid(heads: int, neurons: int, widths: int) -> list[Point]:
    """Return the points to measure: every number of heads with half the neurons, `widths` numbers of neurons with
    half the heads, and the corners. Plans cut both kinds, so each is measured where the other is cut too.
    """
    half = Point(heads // 2, neurons // 2)
    steps = sorted({round(neurons * i / widths) for i in range(widths + 1)} | {half.neurons})
    points = [Point(h, half.neurons) for h in range(heads + 1)] + [Point(half.heads, n) for n in steps]
    corners = [Point(heads, neurons), Point(0, neurons), Point(heads, 0), Point(0, 0)]
    return list(dict.fromkeys(points + corners))


def kind_tables(
    found: Mapping[Point, Ratio], dense_ms: float, layers: int, heads: int, head_width: int, neurons: int
) -> tuple[dict[Any, KindTable], float]:
    """Return the tables of heads and neurons per layer, and the base in ms, that add up to the dense latency.

    A model with h heads and n neurons in every layer saves A(h) + F(n) against the dense one; A and F are the
    least-squares fit to all points. One layer's attention with h heads takes (A(0) - A(h)) / layers, its FFN
    with n neurons (F(0) - F(n)) / layers; both are made monotone by isotonic regression. The base is what is left of
    the dense latency.
    """
    counts = sorted({p.heads for p in found}), sorted({p.neurons for p in found})
    fits = [
        _savings([(p, getattr(r, side)) for p, r in found.items()], counts, dense_ms)
        for side in ("value", "low", "high")
    ]
    tables: dict[Any, KindTable] = {}
    for kind, position, size, width in (("head", 0, heads, head_width), ("neuron", 1, neurons, 1)):
        value, low, high = (_monotone((saved[position][0] - saved[position]) / layers) for saved in fits)
        tables[kind] = KindTable(
            size=size, width=width, counts=counts[position], ms=[0.0, *value[1:]], low_ms=low, high_ms=high
        )
    base = dense_ms - layers * sum(k.ms[-1] for k in tables.values())
    return tables, max(base, 0.0)


def _savings(
    ratios: Sequence[tuple[Point, float]], counts: tuple[list[int], list[int]], dense_ms: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return A and F in ms at the counts, both 0 at the largest."""
    columns = [{c: i for i, c in enumerate(counts[0][:-1])}, {}]
    columns[1] = {c: i + len(columns[0]) for i, c in enumerate(counts[1][:-1])}
    system = np.zeros((len(ratios), len(columns[0]) + len(columns[1])))
    for row, (point, _) in zip(system, ratios, strict=True):
        row[[column[c] for column, c in zip(columns, point, strict=True) if c in column]] = 1.0
    saved = np.linalg.lstsq(system, dense_ms * (1.0 - np.array([ratio for _, ratio in ratios])), rcond=None)[0]
    return np.append(saved[: len(columns[0])], 0.0), np.append(saved[len(columns[0]) :], 0.0)


def _monotone(ms: np.ndarray) -> list[float]:
    try:
        from scipy.optimize import isotonic_regression
    except ImportError as error:
        raise MissingExtraError("scipy", "cpu") from error
    return [float(x) for x in isotonic_regression(np.maximum(ms, 0.0)).x]
