"""The metrics of the tasks, each from a well-kept library and in its own scale (0..1 or -1..1)."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

import numpy as np

from ..errors import MissingExtraError

Metric = Callable[[np.ndarray, np.ndarray], float]  # (predictions (N,), labels (N,)) -> value


def _library(name: str) -> Any:
    """Import a metrics library on first use. Raises MissingExtraError."""
    try:
        return import_module(name)
    except ImportError as error:
        raise MissingExtraError(name.split(".")[0].replace("sklearn", "scikit-learn"), "cpu") from error


def accuracy(predictions: np.ndarray, labels: np.ndarray) -> float:
    return float(_library("sklearn.metrics").accuracy_score(labels, predictions))


def f1_of(positive: int) -> Metric:
    """Return the F1 of one class; 0 when it is neither predicted nor there."""

    def f1(predictions: np.ndarray, labels: np.ndarray) -> float:
        hit = {"pos_label": 1, "zero_division": 0}
        return float(_library("sklearn.metrics").f1_score(labels == positive, predictions == positive, **hit))

    return f1


def macro_f1(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Return the mean F1 over the classes that are predicted or there."""
    return float(_library("sklearn.metrics").f1_score(labels, predictions, average="macro", zero_division=0))


def matthews(predictions: np.ndarray, labels: np.ndarray) -> float:
    return float(_library("sklearn.metrics").matthews_corrcoef(labels, predictions))


def spearman(predictions: np.ndarray, labels: np.ndarray) -> float:
    return _correlation(_library("scipy.stats").spearmanr, predictions, labels)


def pearson(predictions: np.ndarray, labels: np.ndarray) -> float:
    return _correlation(_library("scipy.stats").pearsonr, predictions, labels)


def _correlation(function: Callable, predictions: np.ndarray, labels: np.ndarray) -> float:
    """Return the correlation; 0 for constant predictions or labels, for which it is not defined."""
    if len(labels) < 2 or np.ptp(predictions) == 0 or np.ptp(labels) == 0:
        return 0.0
    return float(function(predictions, labels).statistic)


def retrieval_recall(outputs: np.ndarray, dense: np.ndarray, k: int = 10) -> float:
    """Return the share of each row's k nearest other rows in `dense` (N, d) found again in `outputs`.

    Nearness is the cosine. With k other rows or fewer, all but the farthest count as the nearest.
    """
    k = max(1, min(k, len(dense) - 2))
    found = [
        np.intersect1d(a, b, assume_unique=True).size
        for a, b in zip(_neighbours(outputs, k), _neighbours(dense, k), strict=True)
    ]
    return float(np.mean(found) / k)


def _neighbours(vectors: np.ndarray, k: int, chunk: int = 1024) -> np.ndarray:
    """Return the k nearest other rows of each row (N, k), ties by row number."""
    unit = vectors.astype(np.float64)
    unit /= np.maximum(np.linalg.norm(unit, axis=1, keepdims=True), 1e-12)
    out = np.empty((len(unit), k), dtype=np.int64)
    for start in range(0, len(unit), chunk):
        cosine = unit[start : start + chunk] @ unit.T  # (chunk, N)
        cosine[np.arange(len(cosine)), np.arange(start, start + len(cosine))] = -np.inf
        out[start : start + chunk] = np.argsort(-cosine, axis=1, kind="stable")[:, :k]
    return out


def tag_scores(predictions: Sequence[Sequence[str]], labels: Sequence[Sequence[str]]) -> dict[str, float]:
    """Return seqeval's entity F1 and the share of right tags."""
    seqeval = _library("seqeval.metrics")
    with warnings.catch_warnings():  # seqeval warns of every tag without B- or I-, and of empty classes
        warnings.simplefilter("ignore")
        f1 = float(seqeval.f1_score([*labels], [*predictions], zero_division=0))
    return {"f1": f1, "accuracy": float(seqeval.accuracy_score([*labels], [*predictions]))}


def squad_scores(predictions: Sequence[str], answers: Sequence[Sequence[str]]) -> dict[str, float]:
    """Return the official SQuAD F1 and exact match of predicted answers.

    A question without answers is unanswerable (SQuAD 2.0): only an empty prediction is right, which is
    what comparing with the empty answer gives.
    """
    predicted = [{"id": str(i), "prediction_text": text} for i, text in enumerate(predictions)]
    target = [
        {"id": str(i), "answers": {"text": [*texts] or [""], "answer_start": [0] * max(1, len(texts))}}
        for i, texts in enumerate(answers)
    ]
    value = _library("torchmetrics.functional.text").squad(predicted, target)
    return {"f1": float(value["f1"]) / 100, "exact_match": float(value["exact_match"]) / 100}
