"""Fixed chunks of rows: the same rows and the same padding, whatever the device or process count."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import parallel
from .heads import Head
from .tasks.base import Row

CHUNK_ROWS = 32


@dataclass
class Batch:
    """Hold one padded chunk: inputs (B, T) or (B, C, H, W), and each row's index in the original order.

    `mask` (B, T) is 1 where the model's tokens are real and 0 on padding. Labels may be None. `number` counts the
    chunks of all processes.
    """

    inputs: dict[str, Tensor]
    mask: Tensor
    labels: Tensor | None
    index: list[int]
    number: int = 0

    def to(self, device: torch.device) -> Batch:
        labels = None if self.labels is None else self.labels.to(device)
        inputs = {k: v.to(device) for k, v in self.inputs.items()}
        return Batch(inputs, self.mask.to(device), labels, self.index, self.number)


class Batches:
    """Iterate over rows in chunks of `CHUNK_ROWS`, longest first so that memory peaks at once."""

    def __init__(self, rows: Sequence[Row], head: Head, pad_id: int, chunk_rows: int = CHUNK_ROWS) -> None:
        self.rows, self.head, self.pad_id = rows, head, pad_id
        order = np.argsort([-r.length for r in rows], kind="stable")
        self.chunks = [order[i : i + chunk_rows].tolist() for i in range(0, len(order), chunk_rows)]

    def __len__(self) -> int:
        return len(self.chunks)

    def __iter__(self) -> Iterator[Batch]:
        for number, chunk in enumerate(self.chunks):
            yield self.collate(chunk, number)

    def shared(self) -> Iterator[Batch]:
        """Yield the chunks that are this process's, section by section; alone these are all."""
        for number in parallel.own(len(self.chunks)):
            yield self.collate(self.chunks[number], number)

    def collate(self, chunk: list[int], number: int = 0) -> Batch:
        rows = [self.rows[i] for i in chunk]
        length = max(r.length for r in rows)
        mask = np.zeros((len(rows), length), dtype=np.int64)
        for i, r in enumerate(rows):
            mask[i, : r.length] = 1
        inputs = {name: torch.from_numpy(self._stack(rows, name, length)) for name in rows[0].features}
        labels: list[Any] = [r.label for r in rows]
        known = None if any(label is None for label in labels) else self.head.collate_labels(labels, length)
        return Batch(inputs, inputs.get("attention_mask", torch.from_numpy(mask)), known, chunk, number)

    def _stack(self, rows: Sequence[Row], name: str, length: int) -> np.ndarray:
        if rows[0].tokens is not None:  # images are all of one size
            return np.stack([r.features[name] for r in rows])
        array = np.full((len(rows), length), self.pad_id if name == "input_ids" else 0, dtype=np.int64)
        for i, r in enumerate(rows):
            array[i, : r.length] = r.features[name]
        return array
