"""What a task is: its name, the head it needs, and how to load its data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .base import HeadKind, Modality, TaskData


@dataclass(frozen=True)
class LoadRequest:
    """Hold what the user gave: `tokenizer` and `config` are transformers objects, `processor` an images.ImageProcessor.

    Text tasks need the tokenizer, image tasks the processor.
    """

    task: str
    tokenizer: Any
    config: Any
    data: Path | None = None
    max_length: int | None = None
    text_column: str | None = None
    label_column: str | None = None
    processor: Any = None


@dataclass(frozen=True)
class TaskSpec:
    """Define a task. Third parties offer one as an entry point of the group "deploy_prune.tasks".

    `labels` are the class names of a task with a fixed set of them, in the order its data count them.
    """

    name: str
    head: HeadKind
    load: Callable[[LoadRequest], TaskData]
    labels: tuple[str, ...] = ()
    modality: Modality = "text"
