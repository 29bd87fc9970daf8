"""Turn the latencies of uniformly cut models into a table of what every count costs. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from ..errors import MissingExtraError
from ..latency_table import KindTable
from .stats import Ratio

DRAWS = 400  # of every measured ratio, for the intervals


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
    with n neurons (F(0) - F(n)) / layers; both are made monotone by isotonic regression. Their 95% intervals come
    from fits to ratios drawn anew within their own intervals. The base is what is left of the dense latency.
    """
    saved = _savings(found, dense_ms)
    tables: dict[Any, KindTable] = {}
    for kind, ms, size, width in (("head", saved[0], heads, head_width), ("neuron", saved[1], neurons, 1)):
        costs = {count: (ms[0] - m) / layers for count, m in ms.items()}
        value = _monotone(np.array([c[0] for c in costs.values()]))
        low, high = np.percentile([c[1:] for c in costs.values()], [2.5, 97.5], axis=1)
        tables[kind] = KindTable(
            size=size,
            width=width,
            counts=list(costs),
            ms=[0.0, *value[1:].tolist()],
            low_ms=np.clip(np.minimum(low, value), 0.0, None).tolist(),
            high_ms=np.maximum(high, value).tolist(),
        )
    base = dense_ms - layers * sum(k.ms[-1] for k in tables.values())
    return tables, max(base, 0.0)


def _savings(found: Mapping[Point, Ratio], dense_ms: float) -> tuple[dict[int, np.ndarray], dict[int, np.ndarray]]:
    """Return A and F in ms by count, both 0 at the largest: the fit to the ratios, then to each draw (1 + DRAWS,)."""
    heads, neurons = sorted({p.heads for p in found}), sorted({p.neurons for p in found})
    system = [[p.heads == h for h in heads[:-1]] + [p.neurons == n for n in neurons[:-1]] for p in found]
    values, deviations = np.array([[r.value, (r.high - r.low) / (2 * 1.96)] for r in found.values()]).T[..., None]
    draws = np.random.default_rng(0).normal(values, deviations, (len(found), DRAWS))
    gained = dense_ms * (1.0 - np.hstack([values, draws]))
    fitted = np.linalg.lstsq(np.array(system, dtype=float), gained, rcond=None)[0]
    nothing = np.zeros((1, 1 + DRAWS))
    a, f = (np.vstack([part, nothing]) for part in np.split(fitted, [len(heads) - 1]))
    return dict(zip(heads, a, strict=True)), dict(zip(neurons, f, strict=True))


def _monotone(ms: np.ndarray) -> np.ndarray:
    try:
        from scipy.optimize import isotonic_regression
    except ImportError as error:
        raise MissingExtraError("scipy", "cpu") from error
    return np.asarray(isotonic_regression(np.maximum(ms, 0.0)).x)
