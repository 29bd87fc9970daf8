"""Feed any batch to a model of one fixed shape: rows are padded, dealt out over runs, and put together again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from ..errors import InputError
from .base import Arrays, Runner, TensorSpec

_SPANS = ("start_logits", "end_logits")  # (B, T): one number a token, as no other output of two axes


def fixed_feeds(feeds: Mapping[str, np.ndarray], shape: tuple[int, int], pad_id: int) -> Iterator[Arrays]:
    """Yield the rows of feeds (B, T) in batches of exactly `shape`, padded where they are fewer or shorter.

    Images (B, C, H, W) are of one size: only their number is filled up. Raises InputError when T is longer than the
    shape.
    """
    batch, length = shape
    (rows, tokens), images = (a := next(iter(feeds.values()))).shape[:2], a.ndim == 4
    if tokens > length and not images:
        raise InputError(f"Rows of {tokens} tokens do not fit into {length}.", hint="Truncate them, or export longer.")
    for start in range(0, rows, batch):
        chunk = {}
        for name, array in feeds.items():
            size = (batch, *array.shape[1:]) if images else shape
            out = np.full(size, pad_id if name == "input_ids" else 0, array.dtype)
            part = array[start : start + batch]
            out[: len(part), :tokens] = part
            if name == "attention_mask":
                out[len(part) :, 0] = 1  # a row without any token is none that a model ever saw
            chunk[name] = out
        yield chunk


def _freed(shape: tuple[int | str, ...]) -> tuple[int | str, ...]:
    return ("batch", "sequence") if len(shape) == 2 else ("batch", *shape[1:])


class FixedShape(Runner):
    """Let a runner of one shape take any batch of rows that are not longer."""

    def __init__(self, runner: Runner, shape: tuple[int, int], pad_id: int) -> None:
        self.runner, self.shape, self.pad_id = runner, shape, pad_id

    def _activate(self) -> None:
        self.runner.__enter__()
        self.provider, self.output_names = self.runner.provider, self.runner.output_names
        self.inputs = tuple(TensorSpec(s.name, s.dtype, _freed(s.shape)) for s in self.runner.inputs)

    def _infer(self, feeds: Arrays) -> Arrays:
        rows, tokens = next(iter(feeds.values())).shape[:2]
        parts = [self.runner.infer(f) for f in fixed_feeds(feeds, self.shape, self.pad_id)]
        found = {name: np.concatenate([p[name] for p in parts])[:rows] for name in self.output_names}
        return {n: a[:, :tokens] if n in _SPANS or a.ndim > 2 else a for n, a in found.items()}

    def _deactivate(self) -> None:
        self.runner.__exit__(None, None, None)
