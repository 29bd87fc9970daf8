"""Metrics against numbers worked by hand."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deploy_prune.errors import MissingExtraError
from deploy_prune.tasks import metrics


def test_classification_metrics_by_hand():
    labels, predictions = np.array([1, 1, 1, 0, 0, 0]), np.array([1, 1, 0, 0, 0, 1])
    assert metrics.accuracy(predictions, labels) == pytest.approx(4 / 6)
    assert metrics.f1_of(1)(predictions, labels) == pytest.approx(2 / 3)  # precision 2/3, recall 2/3
    assert metrics.matthews(predictions, labels) == pytest.approx((2 * 2 - 1 * 1) / 9)
    assert metrics.macro_f1(predictions, labels) == pytest.approx(2 / 3)
    assert metrics.f1_of(2)(predictions, labels) == 0


def test_a_missing_library_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.metrics", None)
    with pytest.raises(MissingExtraError, match="scikit-learn") as caught:
        metrics.accuracy(np.zeros(1), np.zeros(1))
    assert caught.value.exit_code == 3


def test_correlations_by_hand():
    x, y = np.array([1.0, 2.0, 3.0, 4.0]), np.array([1.0, 2.0, 4.0, 3.0])
    assert metrics.spearman(x, y) == pytest.approx(1 - 6 * 2 / (4 * 15))
    assert metrics.pearson(x, 2 * x + 1) == pytest.approx(1)
    assert metrics.spearman(np.ones(4), y) == 0  # not defined


def test_squad_by_hand():
    scores = metrics.squad_scores(
        ["the Denver Broncos", "Denver", "in 1999 or so"], [["Denver Broncos"], ["Denver Broncos", "x"], ["1999"]]
    )
    # F1: articles do not count, 1; precision 1, recall 1/2, 2/3; precision 1/4, recall 1, 2/5
    assert scores["f1"] == pytest.approx((1 + 2 / 3 + 2 / 5) / 3)
    assert scores["exact_match"] == pytest.approx(1 / 3)
    assert list(scores) == ["f1", "exact_match"]


def test_squad_2_unanswerable_rows_by_hand():
    predictions = ["", "Paris", "", "blue sky"]
    answers = [[], [], ["London"], ["blue"]]
    # right: nothing said of an unanswerable one, 1; something said, 0; nothing said of an answerable one, 0;
    # "blue sky" for "blue": precision 1/2, recall 1, F1 2/3, no exact match
    scores = metrics.squad_scores(predictions, answers)
    assert scores["f1"] == pytest.approx((1 + 0 + 0 + 2 / 3) / 4)
    assert scores["exact_match"] == pytest.approx(1 / 4)


def test_entity_f1_by_hand():
    labels = [["B-PER", "I-PER", "O", "B-LOC"], ["B-ORG"]]
    predictions = [["B-PER", "I-PER", "O", "B-ORG"], ["B-ORG"]]
    scores = metrics.tag_scores(predictions, labels)  # 2 of 3 entities found, 2 of 3 predicted are right
    assert scores == {"f1": pytest.approx(2 / 3), "accuracy": pytest.approx(4 / 5)}


def brute_recall(outputs, dense, k):
    def near(vectors):
        unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        return [
            set(sorted((j for j in range(len(unit)) if j != i), key=lambda j: -unit[i] @ unit[j])[:k])
            for i in range(len(unit))
        ]

    return np.mean([len(a & b) / k for a, b in zip(near(outputs), near(dense), strict=True)])


@settings(max_examples=30, deadline=None)
@given(st.integers(12, 40), st.integers(0, 2**31))
def test_retrieval_recall_is_that_of_a_plain_loop(n, seed):
    rng = np.random.default_rng(seed)
    dense = rng.normal(size=(n, 5))
    outputs = dense + 0.3 * rng.normal(size=(n, 5))
    assert metrics.retrieval_recall(outputs, dense) == pytest.approx(brute_recall(outputs, dense, 10))
    assert metrics.retrieval_recall(3 * dense, dense) == 1  # the cosine knows no length
    assert metrics.retrieval_recall(dense, dense) == 1


def test_retrieval_recall_in_chunks_and_with_few_rows():
    vectors = np.random.default_rng(0).normal(size=(30, 4))
    whole = metrics._neighbours(vectors, 10)
    assert (metrics._neighbours(vectors, 10, chunk=7) == whole).all()
    assert metrics.retrieval_recall(vectors[:3], vectors[:3]) == 1
