"""Golden cases: small batches with every variant's outputs, to check any artifact or runtime against."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import nn

from .archs import max_positions
from .batches import Batches
from .bundle import GoldenCase
from .heads import Head
from .signature import PIXELS, Signature
from .tasks.base import Row


def golden_cases(models: Mapping[str, nn.Module], head: Head, rows: Sequence[Row], pad_id: int) -> list[GoldenCase]:
    """Make golden cases of models from evaluation rows: one row, a padded batch, and a batch padded beyond its rows.

    Images are not padded: their cases differ in the number of rows.
    """
    cases = []
    shapes = ((rows[:1], 0), (rows[1:5] or rows[:1], 0), (rows[5:7] or rows[:1], 7))
    for chosen, extra in shapes:
        unlabelled = [Row(r.features, tokens=r.tokens) for r in chosen]
        batch = Batches(unlabelled, head, pad_id).collate(list(range(len(chosen))))
        extra = 0 if PIXELS in batch.inputs else max(0, min(extra, _positions(models) - batch.mask.shape[1]))
        inputs = {
            name: torch.nn.functional.pad(t, (0, extra), value=pad_id if name == "input_ids" else 0)
            for name, t in batch.inputs.items()
        }
        case = GoldenCase({name: t.numpy() for name, t in inputs.items()}, {})
        with torch.inference_mode():
            for name, model in models.items():
                outputs = head.outputs(model, inputs)
                case.outputs[name] = {k: v.float().numpy().copy() for k, v in outputs.items()}
        cases.append(case)
    return cases


def _positions(models: Mapping[str, nn.Module]) -> int:
    return min(max_positions(model) for model in models.values())


def random_rows(model: nn.Module, signature: Signature, pad_id: int) -> list[Row]:
    """Return rows of random tokens of several lengths, or of random pixels, to compare models on without data."""
    rng = np.random.default_rng(0)
    if signature.image:
        pixels = rng.normal(size=(8, *signature.image)).astype(np.float32)
        return [Row({PIXELS: image}, tokens=signature.tokens) for image in pixels]
    vocabulary = int(model.config.vocab_size)  # type: ignore[union-attr, arg-type]
    rows = []
    for length in (9, 17, 6, 12, 5, 8, 11, 16):
        ids = rng.integers(1, vocabulary, length)
        ids[ids == pad_id] = (pad_id + 1) % vocabulary
        ones = {
            "input_ids": ids,
            "attention_mask": np.ones(length, np.int64),
            "token_type_ids": np.zeros(length, np.int64),
        }
        rows.append(Row({name: ones[name].astype(np.int64) for name in signature.inputs}))
    return rows
