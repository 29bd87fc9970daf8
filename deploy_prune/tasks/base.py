"""What every task gives the pipeline: rows to calibrate on, splits to evaluate, and a score."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

HeadKind = Literal["classification", "regression", "token", "qa", "embedding"]
Modality = Literal["text", "image"]

# One row's model outputs without padding: {"logits": (C,) or (T, C)}, {"start_logits": (T,),
# "end_logits": (T,)} or {"embedding": (d,)}, float32.
RowOutput = dict[str, np.ndarray]


@dataclass
class Row:
    """Hold one row of a text, tokenised and without padding, or of an image.

    `features` maps the model's input names to int64 arrays (T,), or "pixel_values" to float32 (C, H, W), which may
    be decoded each time it is asked for. `label` is an int (classification), a float (regression), an int array
    (T,) with -100 for ignored tokens (token), a (start, end) pair of token positions (qa), or None where there is
    no label. `tokens` says how many tokens the model makes of an image; None for texts.
    """

    features: Mapping[str, np.ndarray]
    label: Any = None
    tokens: int | None = None

    @property
    def length(self) -> int:
        return int(self.features["input_ids"].shape[0]) if self.tokens is None else self.tokens


class Split(ABC):
    """Hold the examples of one split; tokenising, or decoding, happens on demand."""

    name: str  # "train", "validation", "validation_mismatched", ...
    labelled: bool

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of examples (questions, for QA)."""

    @abstractmethod
    def encode(self, indices: Sequence[int]) -> list[Row]:
        """Tokenise the named examples, exactly one row each, in the order given (for calibration)."""

    @abstractmethod
    def rows(self) -> list[Row]:
        """Tokenise the whole split for evaluation (QA may give several rows per example)."""

    @abstractmethod
    def score(self, outputs: Sequence[RowOutput], dense: Sequence[RowOutput] | None = None) -> dict[str, float]:
        """Score the outputs of `rows()`, the primary metric first, each in its own scale (0..1, -1..1).

        `dense` holds the dense model's outputs of the same rows (retrieval recall needs them).
        """

    def texts(self, limit: int) -> list[Any]:
        """Return the first raw examples, for error messages and reports."""
        return []


@dataclass
class TaskData:
    """Hold everything a run needs to know of a task and its data."""

    task: str
    head: HeadKind
    metric: str | None  # primary metric's name; None for unlabelled data
    train: Split
    evals: dict[str, Split]  # the first is the primary one
    labels: list[str] = field(default_factory=list)

    @property
    def evaluation(self) -> Split:
        return next(iter(self.evals.values()))
