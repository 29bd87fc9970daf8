"""Run a model over rows and hand back each row's outputs without padding."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .batches import Batches
from .errors import InputError
from .heads import Head
from .progress import Progress
from .tasks.base import Row, RowOutput


def predict(
    model: nn.Module,
    head: Head,
    rows: Sequence[Row],
    *,
    pad_id: int = 0,
    progress: Progress = lambda share: None,
) -> list[RowOutput]:
    """Return a torch model's outputs of every row, in the order of the rows.

    Raises InputError when an output is NaN or Inf.
    """
    device = next(model.parameters()).device

    @torch.inference_mode()
    def run(inputs: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
        outputs = head.outputs(model, {name: t.to(device) for name, t in inputs.items()})
        return {name: out.float().cpu().numpy() for name, out in outputs.items()}

    return predict_by(run, head, rows, pad_id=pad_id, progress=progress)


def predict_by(
    run: Callable[[Mapping[str, Tensor]], Mapping[str, np.ndarray]],
    head: Head,
    rows: Sequence[Row],
    *,
    pad_id: int = 0,
    progress: Progress = lambda share: None,
) -> list[RowOutput]:
    """Return the outputs of every row, in the order of the rows, of anything that takes padded batches.

    Raises InputError when an output is NaN or Inf.
    """
    results: list[Any] = [None] * len(rows)
    batches = Batches(rows, head, pad_id)
    for number, batch in enumerate(batches):
        outputs = run(batch.inputs)
        for name, array in outputs.items():
            if not np.isfinite(array).all():
                raise InputError(f"The model's {name} hold NaN or Inf.", hint="Check the checkpoint's weights.")
        per_token = head.kind in ("token", "qa")
        for i, index in enumerate(batch.index):
            stop = rows[index].length
            results[index] = {k: a[i, :stop].copy() if per_token else a[i].copy() for k, a in outputs.items()}
        progress((number + 1) / len(batches))
    return results
