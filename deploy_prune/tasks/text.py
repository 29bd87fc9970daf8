"""Rows of one text or a pair: classification, regression and embedding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..errors import InputError
from .base import HeadKind, RowOutput, TaskData
from .columns import label_column
from .encoding import EncodedSplit
from .labels import class_ids, float_targets, is_generic, model_labels
from .metrics import Metric, retrieval_recall
from .spec import LoadRequest
from .table import Table

RECALL = "recall@10"


class TextSplit(EncodedSplit):
    """Hold texts, one or two per row, and their labels (None where there are none)."""

    def __init__(
        self,
        name: str,
        texts: Sequence[tuple[str, ...]],
        labels: Sequence[Any] | None,
        request: LoadRequest,
        *,
        head: HeadKind,
        metrics: Mapping[str, Metric],
    ) -> None:
        self.name = name
        self.labelled = labels is not None
        self._texts = texts
        self._labels = labels
        self._head = head
        self._metrics = metrics
        super().__init__(request)

    def __len__(self) -> int:
        return len(self._texts)

    def _tokenize(self, indices: Sequence[int]) -> Any:
        columns = [list(column) for column in zip(*(self._texts[i] for i in indices), strict=True)]
        return self._tokenizer(*columns, truncation=True, max_length=self._max_length)

    def _label(self, encoding: Any, row: int, index: int) -> Any:
        return self._labels[index] if self._labels is not None else None

    def score(self, outputs: Sequence[RowOutput], dense: Sequence[RowOutput] | None = None) -> dict[str, float]:
        if self._head == "embedding":
            if dense is None:
                raise InputError("Retrieval recall compares with the dense model's outputs; there are none.")
            new, old = (np.stack([o["embedding"] for o in rows]) for rows in (outputs, dense))
            return {RECALL: retrieval_recall(new, old)}
        if self._labels is None:
            return {}
        logits = np.stack([o["logits"] for o in outputs])  # (N, C)
        predictions = logits[:, 0] if self._head == "regression" else logits.argmax(axis=1)
        labels = np.asarray(self._labels)
        return {name: metric(predictions, labels) for name, metric in self._metrics.items()}

    def texts(self, limit: int) -> list[Any]:
        return [list(texts) for texts in self._texts[:limit]]


def text_task(
    request: LoadRequest,
    tables: Mapping[str, Table],
    columns: tuple[str, ...],
    head: HeadKind,
    metrics: Mapping[str, Metric],
    *,
    canonical: Sequence[str] = (),
    label: str | None = None,
) -> TaskData:
    """Build the task from one table per split; the first is for calibration.

    `label` names the label column (by default found by its usual names); without one the data are
    unlabelled. Raises DataError for missing columns, or labels that the model does not have.
    """
    splits = {}
    for name, table in tables.items():
        texts = list(zip(*(table.texts(column) for column in columns), strict=True))
        labels = None if head == "embedding" else _labels(request, table, head, canonical, label)
        splits[name] = TextSplit(name, texts, labels, request, head=head, metrics=metrics)
    train, *evals = splits.values()
    names = model_labels(request.config) if head == "classification" else []
    metric = RECALL if head == "embedding" else next(iter(metrics)) if evals[0].labelled else None
    return TaskData(
        task=request.task,
        head=head,
        metric=metric,
        train=train,
        evals={split.name: split for split in evals},
        labels=[*canonical] if canonical and is_generic(names) else names,
    )


def _labels(
    request: LoadRequest, table: Table, head: HeadKind, canonical: Sequence[str], label: str | None
) -> list[Any] | None:
    name = label_column(table, request.label_column or (label if label in table.columns else None))
    if name is None:
        return None
    if head == "regression":
        return float_targets(table.columns[name], table.where)
    return class_ids(table.columns[name], table.where, model_labels(request.config), canonical)
