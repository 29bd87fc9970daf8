"""Time models that are in memory, as a runtime would run them, in turns, each in a process of its own."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from .bundle import VARIANTS, Bundle, Manifest
from .checkpoint import save_sliced
from .config import BenchSettings
from .errors import SystemStateError
from .export import export_bundle
from .golden import golden_cases, random_rows
from .heads import Head
from .runtime_bench.bench import Place, time_subjects
from .runtime_bench.stats import Ratio, ratio_of_medians, summarise_ms
from .runtime_bench.subjects import Subject
from .signature import Signature

FORMAT_OF = {  # what a runtime reads; the others load the checkpoint
    **dict.fromkeys(("ort-cpu", "ort-cuda", "ort-tensorrt"), "onnx"),
    **{name: name for name in ("openvino", "tensorrt", "rtx", "pt2")},
}


@dataclass(frozen=True)
class Candidate:
    """Hold a sliced model (slice by a whole plan for a dense one), its tokenizer or image processor, and its inputs."""

    model: nn.Module
    processor: Any
    signature: Signature


@dataclass
class Stage:
    """Write models as one-variant bundles into a folder, so that any of the runtimes can open them."""

    folder: Path
    head: Head
    runtimes: Sequence[str]

    def write(self, name: str, candidate: Candidate) -> Path:
        """Write a model, exported in fp32 for the runtimes, and return its bundle's folder."""
        bundle = self.bundle(name, candidate)
        if formats := sorted({FORMAT_OF[runtime] for runtime in self.runtimes if runtime in FORMAT_OF}):
            export_bundle(bundle, formats=formats, variants=("sliced",), models={"sliced": candidate.model}).check()
        bundle.commit()
        return bundle.root

    def bundle(self, name: str, candidate: Candidate) -> Bundle:
        """Write a model with what its files are checked by, and return the bundle, not yet committed."""
        model, processor, signature = candidate.model, candidate.processor, candidate.signature
        root = self.folder / name
        root.mkdir(parents=True)
        pad_id = int(getattr(processor, "pad_token_id", None) or 0)
        bundle = Bundle(root, Manifest())
        bundle.manifest.model = {**signature.entry(), "pad_id": pad_id}
        bundle.manifest.task = {"head": self.head.kind, "pooling": self.head.pooling}
        for path in save_sliced(model, processor, root / "sliced"):
            bundle.register(str(path.relative_to(root)))
        for case in golden_cases(
            dict.fromkeys(VARIANTS, model), self.head, random_rows(model, signature, pad_id), pad_id
        ):
            bundle.add_golden(case)
        return bundle


def time_bundles(roots: Mapping[str, Path], place: Place, seconds: float) -> dict[str, list[float]]:
    """Return the rounds' wall times in ns of the sliced model in each bundle, in turns, `seconds` for each.

    Raises SystemStateError when one of them cannot be run.
    """
    subjects = [Subject(name, str(root), "sliced") for name, root in roots.items()]
    timed = time_subjects(subjects, place, BenchSettings(seconds=seconds * len(roots)))
    for failure in timed.failures.values():
        raise SystemStateError(f"{place.runtime} could not run a cut model: {failure.message}") from failure
    return {name: samples.rounds() for name, samples in timed.samples.items()}


def time_models(
    candidates: Mapping[str, Candidate], head: Head, place: Place, seconds: float = 2.0
) -> dict[str, tuple[float, Ratio]]:
    """Return each model's median in ms and its ratio to "dense", which must be among them."""
    with tempfile.TemporaryDirectory(prefix="deploy-prune-time-") as folder:
        stage = Stage(Path(folder), head, [place.runtime])
        samples = time_bundles({name: stage.write(name, c) for name, c in candidates.items()}, place, seconds)
    return {
        name: (summarise_ms(times)["median"], ratio_of_medians(times, samples["dense"]))
        for name, times in samples.items()
    }
