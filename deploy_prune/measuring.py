"""Time models that are in memory, as a runtime would run them, side by side in one fresh process."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from .bundle import Bundle, Manifest
from .checkpoint import save_sliced
from .errors import SystemStateError
from .export import export_bundle
from .golden import golden_cases, random_rows
from .heads import Head
from .runtime_bench.isolate import run_isolated
from .runtime_bench.stats import Ratio, ratio_of_medians, summarise_ms
from .units import SlicePlan
from .variants import Variants

FORMAT_OF = {"ort-cpu": "onnx"}  # what a runtime reads; the others load the checkpoint
MIN_ROUNDS = 10
_CELL = "deploy_prune.runtime_bench.cells:time_cell"


@dataclass(frozen=True)
class Shape:
    """Say in which runtime, at which batch and length, and with how many threads models are timed."""

    runtime: str
    batch: int
    seq: int
    threads: int


@dataclass(frozen=True)
class Candidate:
    """Hold a sliced model (slice by a whole plan for a dense one) with its tokenizer and the inputs it takes."""

    model: nn.Module
    tokenizer: Any
    inputs: Sequence[str]


@dataclass
class Stage:
    """Write models as one-variant bundles into a folder, so that any runtime can open them."""

    folder: Path
    head: Head
    runtime: str

    def write(self, name: str, candidate: Candidate) -> Path:
        """Write a model and return its bundle's folder."""
        model, tokenizer, inputs = candidate.model, candidate.tokenizer, candidate.inputs
        root = self.folder / name
        root.mkdir(parents=True)
        pad_id = int(tokenizer.pad_token_id or 0)
        bundle = Bundle(root, Manifest())
        bundle.manifest.model = {"inputs": list(inputs), "pad_id": pad_id}
        bundle.manifest.task = {"head": self.head.kind, "pooling": self.head.pooling}
        for path in save_sliced(model, tokenizer, root / "sliced"):
            bundle.register(str(path.relative_to(root)))
        alone = Variants(model, model, model, (), SlicePlan(()), [])
        for case in golden_cases(alone, self.head, random_rows(model, inputs, pad_id), pad_id):
            bundle.add_golden(case)
        if self.runtime in FORMAT_OF:
            export_bundle(
                bundle, formats=(FORMAT_OF[self.runtime],), variants=("sliced",), models={"sliced": model}
            ).check()
        bundle.commit()
        return root


def time_bundles(roots: Mapping[str, Path], shape: Shape, seconds: float) -> dict[str, list[int]]:
    """Return the wall times in ns of the sliced model in each bundle, interleaved, `seconds` for each.

    Raises SystemStateError when one of them cannot be run.
    """
    answer: dict[str, Any] = run_isolated(
        _CELL,
        {
            "models": {name: {"root": str(root), "variant": "sliced"} for name, root in roots.items()},
            "runtime": shape.runtime,
            "batch": shape.batch,
            "seq": shape.seq,
            "threads": shape.threads,
            "max_seconds": seconds * len(roots),
            "min_rounds": MIN_ROUNDS,
        },
    )
    for failure in answer["failures"].values():
        raise SystemStateError(f"{shape.runtime} could not run a cut model: {failure['reason']}")
    return {name: samples["wall_ns"] for name, samples in answer["samples"].items()}


def time_models(
    candidates: Mapping[str, Candidate], head: Head, shape: Shape, seconds: float = 2.0
) -> dict[str, tuple[float, Ratio]]:
    """Return each model's median in ms and its ratio to "dense", which must be among them."""
    with tempfile.TemporaryDirectory(prefix="deploy-prune-time-") as folder:
        stage = Stage(Path(folder), head, shape.runtime)
        samples = time_bundles({name: stage.write(name, c) for name, c in candidates.items()}, shape, seconds)
    return {
        name: (summarise_ms(times)["median"], ratio_of_medians(times, samples["dense"]))
        for name, times in samples.items()
    }
