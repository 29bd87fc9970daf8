"""The last step of every way to make a bundle: export, measure and report it in place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from .bundle import VARIANTS, Artifact, Bundle
from .config import BenchSettings, Recipe
from .errors import BundleError
from .progress import Reporter
from .recording import commit
from .signature import Signature
from .stages import Recorder

if TYPE_CHECKING:
    from .export import Evaluation, Exported


def finish(
    bundle: Bundle,
    models: Mapping[str, nn.Module],
    recipe: Recipe,
    recorder: Recorder,
    reporter: Reporter,
    *,
    export: bool,
    bench: bool,
    evaluation: Evaluation | None = None,
    previous: Sequence[Bundle] = (),
) -> Exported:
    """Export, measure and report a bundle in place; the last step of every way to make one."""
    from .export import Exported, Options, export_bundle, plan_kinds
    from .runtime_bench.bench import bench_bundle
    from .runtime_bench.report import write_report

    made = Exported()
    if export:
        with recorder.stage("export") as record, reporter.stage("export") as progress:
            options = Options.of(recipe)
            kinds, _ = plan_kinds(recipe.formats, recipe.precisions, options)
            made = export_bundle(
                bundle,
                formats=recipe.formats,
                precisions=recipe.precisions,
                options=options,
                models=models,
                evaluation=evaluation,
                previous=previous,
                stored=lambda: commit(bundle, recorder),  # a kill leaves what is finished
                progress=Steps(progress, 2 * len(VARIANTS) * len(kinds)),
            )
            record |= {"artifacts": len(made.artifacts), "reused": made.reused, "failures": len(made.failures)}
            _check_graphs(bundle, made.artifacts)
        if made.reused:
            reporter.note(f"Exported before, and taken over: {made.reused} of {len(made.artifacts)} files")
        for line in made.left_out():
            reporter.note(line)
        commit(bundle, recorder)
    if export and bench:
        with recorder.stage("bench") as record, reporter.stage("bench") as progress:
            settings = BenchSettings(runtimes=recipe.runtimes, batches=recipe.batches, seconds=recipe.bench_seconds)
            result = bench_bundle(bundle, settings, progress)
            record["failures"] = len(result["failures"])
    commit(bundle, recorder)
    write_report(bundle)
    bundle.commit()
    return made


def earlier(*folders: Path) -> list[Bundle]:
    """Return the whole bundles among a killed run's and the one to be replaced; what did not change is taken over."""
    found = []
    for folder in folders:
        with suppress(BundleError):
            found.append(Bundle.open(folder))
    return found


def _check_graphs(bundle: Bundle, artifacts: Sequence[Artifact]) -> None:
    """Count the FLOPs of every exported graph node by node; they must be those of the plan."""
    from .runtime_bench.flops import count_onnx

    shapes = Signature.of_manifest(bundle.manifest.model).shapes(1, int(bundle.manifest.budget["seq_len"]))
    for artifact in artifacts:
        if artifact.format == "onnx" and artifact.precision == "fp32" and artifact.shape is None:
            counted = count_onnx(bundle.path(artifact.path), shapes)
            expected = bundle.manifest.counts[artifact.variant]["flops"]
            if counted != expected:
                raise RuntimeError(f"{artifact.path} has {counted} FLOPs, its model {expected}")


class Steps:
    """Turn the names of steps into a finished share."""

    def __init__(self, progress: Any, total: int) -> None:
        self.progress, self.total, self.done = progress, max(total, 1), 0

    def __call__(self, name: str) -> None:
        self.progress(min(self.done / self.total, 1.0))
        self.done += 1
