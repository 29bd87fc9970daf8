"""What a bundle records of the run that made it: budget, task, model, plan, counts, versions, the sliced checkpoint."""

from __future__ import annotations

import copy
import importlib.metadata
import json
import platform
from typing import Any

from . import __version__
from .bundle import Bundle, Stage
from .checkpoint import Dense, save_sliced
from .costs import encoder_flops
from .disk import disk_errors, write_atomically
from .heads import Head
from .lengths import Lengths
from .stages import PrunedPlan, Recorder
from .tasks.base import TaskData
from .units import MaskSet, SlicePlan
from .variants import Variants, count_variants

VERSIONED = ("torch", "transformers", "onnx", "onnxruntime", "onnxruntime-gpu", "numpy", "scipy", "tokenizers")


def budget_entry(pruned: PrunedPlan) -> dict[str, Any]:
    """Return the budget for the manifest; with several limits, `kind` and `keep` are the first one's."""
    first = pruned.limits[0]
    entry = {"kind": first["kind"], "keep": first["keep"], "seq_len": pruned.seq_len, "limits": pruned.limits}
    if pruned.lengths.data:
        entry |= {"lengths": pruned.lengths.entry(), "kept_flops": _kept_flops(pruned)}
    return entry


def _kept_flops(pruned: PrunedPlan) -> dict[str, Any]:
    """Return the shares of the FLOPs that are kept over the distribution, and at a few lengths of it."""

    def kept(lengths: int | Lengths) -> float:
        return encoder_flops(pruned.groups, lengths, pruned.plan) / encoder_flops(pruned.groups, lengths)

    lengths = sorted({*pruned.lengths.samples(), pruned.seq_len})
    return {"all": kept(pruned.lengths), "at": [{"tokens": n, "share": kept(n)} for n in lengths]}


def task_entry(name: str | None, head: Head, data: TaskData | None) -> dict[str, Any]:
    """Return the task for the manifest."""
    return {
        "name": name,
        "head": head.kind,
        "pooling": head.pooling if head.kind == "embedding" else None,
        "labels": list(data.labels) if data else [],
        "metric": data.metric if data else None,
        "evaluation": {split: len(rows) for split, rows in data.evals.items()} if data else {},
    }


def fill(bundle: Bundle, variants: Variants, dense: Dense, head: Head, name: str) -> None:
    """Fill in the model, the plan and the exact counts."""
    manifest, plan, seq_len = bundle.manifest, variants.plan, int(bundle.manifest.budget["seq_len"])
    manifest.versions = {"deploy_prune": __version__, "python": platform.python_version(), **versions()}
    manifest.model = {
        "name": name,
        "source": dense.source,
        "sha256": dense.sha256,
        "model_type": variants.surgery.name,
        "architecture": type(variants.dense).__name__,
        **dense.signature.entry(),
        "pad_id": dense.pad_id,
    }
    manifest.plan = {
        "hash": plan.hash,
        "layers": plan.layer_counts(),
        "total": SlicePlan.from_masks(variants.surgery.groups, MaskSet.ones(variants.surgery.groups)).layer_counts(),
        "refitted": variants.refitted,
        "recovered": variants.recovered,
    }
    manifest.counts = count_variants(variants, head, seq_len, dense.signature)


def store(bundle: Bundle, variants: Variants, dense: Dense, recorder: Recorder) -> None:
    """Write plan.json and the sliced checkpoint, and commit the staging folder."""
    with disk_errors(bundle.root):
        write_atomically(bundle.root / "plan.json", json.dumps(variants.plan.to_dict(), indent=1) + "\n")
        bundle.register("plan.json")
        for path in save_sliced(copy.copy(variants.sliced), dense.processor, bundle.root / "sliced"):
            bundle.register(str(path.relative_to(bundle.root)))
    commit(bundle, recorder)


def commit(bundle: Bundle, recorder: Recorder) -> None:
    """Write the manifest with the stages so far."""
    bundle.manifest.stages = [Stage.model_validate(r) for r in recorder.records]
    bundle.commit()


def versions() -> dict[str, str]:
    """Return the releases that results depend on."""
    found = {}
    for name in VERSIONED:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
