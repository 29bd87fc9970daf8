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
    """Return the points to measure: every number of heads, `widths` numbers of neurons, and the corners."""
    steps = sorted({round(neurons * i / widths) for i in range(widths + 1)})
    points = [Point(h, neurons) for h in range(heads + 1)] + [Point(heads, n) for n in steps] + [Point(0, 0)]
    return list(dict.fromkeys(points))


def kind_tables(
    found: Mapping[Point, Ratio], dense_ms: float, layers: int, heads: int, head_width: int, neurons: int
) -> tuple[dict[Any, KindTable], float]:
    """Return the tables of heads and neurons per layer, and the base in ms, that add up to the dense latency.

    One layer's attention with h heads takes (M(h, all) - M(0, all)) / layers, its FFN with n neurons
    (M(all, n) - M(all, 0)) / layers, M being the whole model's latency with h heads and n neurons in every
    layer; both are made monotone by isotonic regression. The base is what is left of the dense latency.
    """
    h_points = [Point(h, neurons) for h in range(heads + 1)]
    n_points = sorted((p for p in found if p.heads == heads), key=lambda p: p.neurons)
    kinds: dict[Any, KindTable] = {
        "head": _kind(found, h_points, [p.heads for p in h_points], dense_ms / layers, heads, head_width),
        "neuron": _kind(found, n_points, [p.neurons for p in n_points], dense_ms / layers, neurons, 1),
    }
    base = dense_ms - layers * sum(k.ms[-1] for k in kinds.values())
    return kinds, max(base, 0.0)


def _kind(
    found: Mapping[Point, Ratio], points: Sequence[Point], counts: list[int], scale: float, size: int, width: int
) -> KindTable:
    empty = found[points[0]].value

    def smooth(values: list[float]) -> list[float]:
        try:
            from scipy.optimize import isotonic_regression
        except ImportError as error:
            raise MissingExtraError("scipy", "cpu") from error
        raw = np.array([(v - empty) * scale for v in values])
        return [float(x) for x in isotonic_regression(np.maximum(raw, 0.0)).x]

    ms = smooth([found[p].value for p in points])
    return KindTable(
        size=size,
        width=width,
        counts=counts,
        ms=[0.0, *ms[1:]],
        low_ms=smooth([found[p].low for p in points]),
        high_ms=smooth([found[p].high for p in points]),
    )
