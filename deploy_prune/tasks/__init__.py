"""Tasks and their data: `load_task` gives rows to calibrate on, splits to evaluate, and scores."""

from __future__ import annotations

from .base import HeadKind, Row, RowOutput, Split, TaskData
from .generic import data_has_pair
from .registry import check_task, infer_task, load_task, task_head, task_names
from .spec import LoadRequest, TaskSpec

__all__ = [
    "HeadKind",
    "LoadRequest",
    "Row",
    "RowOutput",
    "Split",
    "TaskData",
    "TaskSpec",
    "check_task",
    "data_has_pair",
    "infer_task",
    "load_task",
    "task_head",
    "task_names",
]
