"""Text tasks on data of the user's own: classification of one text or a pair, regression, embedding."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from .base import HeadKind, TaskData
from .columns import has_pair, text_columns
from .metrics import Metric, accuracy, macro_f1, pearson, spearman
from .source import require_path, split_files
from .spec import LoadRequest, TaskSpec
from .splitting import split_by_content
from .table import Table, read_table
from .text import text_task

CLASSIFICATION: dict[str, Metric] = {"accuracy": accuracy, "macro_f1": macro_f1}
REGRESSION: dict[str, Metric] = {"spearman": spearman, "pearson": pearson}


def load_text(head: HeadKind, pair: bool | None, metrics: dict[str, Metric], request: LoadRequest) -> TaskData:
    """Load a folder with train.* and validation.*, or a single file, which is split by content.

    `pair` says whether rows are pairs; None takes either. Raises DataError for missing files or columns.
    """
    data = require_path(request.data, request.task)
    if data.is_dir():
        train_path, evaluation_path = split_files(data)
        train, evaluation = read_table(train_path), read_table(evaluation_path)
        columns = text_columns(train, request.text_column, pair=pair)
    else:
        whole = read_table(data)
        columns = text_columns(whole, request.text_column, pair=pair)
        keys = list(zip(*(whole.texts(column) for column in columns), strict=True))
        train, evaluation = (whole.select(rows) for rows in split_by_content(keys, str(data)))
    return text_task(request, {"train": train, "validation": evaluation}, columns, head, metrics)


def data_has_pair(data: Path, text_column: str | None = None) -> bool | None:
    """Say whether local data are pairs of texts; None where their columns do not tell.

    Raises DataError when the data cannot be read.
    """
    path = require_path(data, "text-pair")
    if path.is_dir():
        path = split_files(path)[0]
    table: Table = read_table(path)
    return has_pair(table, text_column)


SPECS = [
    TaskSpec("text-classification", "classification", partial(load_text, "classification", False, CLASSIFICATION)),
    TaskSpec("text-pair", "classification", partial(load_text, "classification", True, CLASSIFICATION)),
    TaskSpec("regression", "regression", partial(load_text, "regression", None, REGRESSION)),
    TaskSpec("embedding", "embedding", partial(load_text, "embedding", False, {})),
]
