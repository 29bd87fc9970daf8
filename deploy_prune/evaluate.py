"""Quality and fidelity of the three variants on the task's evaluation splits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from .bundle import Bundle
from .errors import VerdictError
from .fidelity import fidelity
from .golden import golden_cases, random_rows
from .heads import Head
from .kept import pack_outputs, unpack_outputs
from .offload import Rotation, settle
from .predict import predict
from .progress import Progress
from .resume import Resume, hash_inputs, hash_state
from .signature import Signature
from .tasks.base import Row, RowOutput, Split, TaskData
from .variants import Variants


def evaluate(
    bundle: Bundle,
    variants: Variants,
    data: TaskData | None,
    head: Head,
    device: torch.device,
    progress: Progress,
    keep: Resume | None = None,
    *,
    offload: bool = False,
) -> dict[str, Any]:
    """Measure quality and fidelity, check that sliced equals virtual, store golden cases; return the record.

    Without data the models are compared on random inputs and quality stays null. `keep` has the outputs that a killed
    run had computed; they are scored anew. With `offload` one layer is on the device at a time.
    Raises VerdictError when the sliced model differs from the masked one by more than rounding.
    """
    keep = keep or Resume()
    manifest = bundle.manifest
    pad_id = int(manifest.model["pad_id"])
    signature = Signature.of_manifest(manifest.model)
    splits: dict[str, Split | None] = dict(data.evals) if data else {"random inputs": None}
    record: dict[str, Any] = {}
    for number, (split_name, split) in enumerate(splits.items()):
        rows = split.rows() if split else random_rows(variants.dense, signature, pad_id)
        of = [split_name, *_identity(variants, rows)] if keep.folder else []
        outputs = {}
        for position, (name, model) in enumerate(variants.items().items()):
            share = Share(progress, number * 3 + position, 3 * len(splits))
            outputs[name] = keep.stage(
                f"evaluate {name}",
                of,
                record,
                partial(_outputs, model, head, rows, device, pad_id, share, offload),
                pack_outputs,
                unpack_outputs,
            )
        _check_equal(outputs["virtual"], outputs["sliced"], variants.surgery.tolerance)
        quality = {name: _quality(data, split, out, outputs["dense"]) for name, out in outputs.items()}
        if number:
            for name, entry in quality.items():
                manifest.quality[name].setdefault("splits", {})[split_name] = entry
            continue
        manifest.quality = quality
        manifest.fidelity = _fidelity(head, outputs) if split else {"kl": None, "agreement": None, "virtual": {}}
        manifest.fidelity |= {"n": len(rows), "split": split_name}
        for case in golden_cases(variants.items(), head, rows, pad_id):
            bundle.add_golden(case)
        record["rows"] = len(rows)
    return record


def _outputs(
    model: nn.Module,
    head: Head,
    rows: Sequence[Row],
    device: torch.device,
    pad_id: int,
    progress: Progress,
    offload: bool,
) -> list[RowOutput]:
    if offload:
        settle(model, device)
    else:
        model.to(device)
    with Rotation(model).turning() if offload else nullcontext():
        found = predict(model, head, rows, pad_id=pad_id, progress=progress)
    model.cpu()
    return found


def _identity(variants: Variants, rows: Sequence[Row]) -> list[Any]:
    """Return what tells the outputs of these models on these rows from others of the same run."""
    return [hash_state(variants.sliced.state_dict()), variants.plan.to_dict(), hash_inputs(rows)]


class Share:
    """Map the progress 0..1 of one of several equal parts to the whole's."""

    def __init__(self, progress: Progress, part: int, parts: int) -> None:
        self.progress, self.part, self.parts = progress, part, parts

    def __call__(self, share: float) -> None:
        self.progress((self.part + share) / self.parts)


def _fidelity(head: Head, outputs: Mapping[str, Sequence[RowOutput]]) -> dict[str, Any]:
    return {
        **fidelity(head.kind, outputs["dense"], outputs["sliced"]),
        "virtual": fidelity(head.kind, outputs["dense"], outputs["virtual"]),
        "sliced_to_virtual": fidelity(head.kind, outputs["virtual"], outputs["sliced"]),
    }


def _quality(
    data: TaskData | None, split: Split | None, outputs: Sequence[RowOutput], dense: Sequence[RowOutput]
) -> dict[str, Any]:
    """Return one quality entry: the primary metric, and all of them under "all"."""
    if data is None or split is None or not (split.labelled or data.head == "embedding"):
        return {"metric": None, "value": None, "n": len(split) if split else 0}
    scores = split.score(outputs, dense)
    name = data.metric if data.metric in scores else next(iter(scores))
    return {"metric": name, "value": scores[name], "n": len(split), "all": dict(scores)}


def _check_equal(virtual: Sequence[RowOutput], sliced: Sequence[RowOutput], tolerance: float) -> None:
    """Raise VerdictError unless the sliced model equals the masked one to rounding error."""
    worst = max(float(np.abs(a[n] - b[n]).max()) for a, b in zip(virtual, sliced, strict=True) for n in a)
    scale = max(1.0, max(float(np.abs(a[n]).max()) for a in virtual for n in a))
    if worst > tolerance * scale:
        raise VerdictError(
            f"The sliced model differs from the masked one by {worst:.2e} (allowed: {tolerance * scale:.0e}).",
            hint="This is a bug in the architecture's adapter: please report it with the model's config.json.",
        )
