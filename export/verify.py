"""Run a bundle's files where they are, against its golden outputs."""

from __future__ import annotations

from ..bundle import Bundle
from ..errors import MissingExtraError, SystemStateError, VerdictError
from ..runtimes.fixed import FixedShape
from .parity import check_parity
from .registry import Skipped, available_exporters
from .room import Exported, kind_of


def verify_bundle(bundle: Bundle) -> Exported:
    """Compare every artifact that can run on this machine with the golden outputs; the caller commits the bundle.

    Parity that was not run is completed. What differs is listed as a failure and keeps its entry.
    """
    result, golden = Exported(), bundle.golden()
    exporters, head = available_exporters(), bundle.manifest.task["head"]
    for artifact in bundle.manifest.artifacts:
        kind = kind_of(artifact)
        if artifact.format not in exporters:
            result.skipped.append(Skipped(artifact.format, artifact.precision, "no exporter of this format is here"))
            continue
        runner = exporters[artifact.format].runner(artifact, bundle.path(artifact.path))
        if isinstance(runner, str):
            result.skipped.append(Skipped(artifact.format, artifact.precision, runner))
            continue
        cases = golden
        if kind.shape is not None:
            runner = FixedShape(runner, kind.shape, int(bundle.manifest.model.get("pad_id", 0)))
            cases = [c for c in golden if c.inputs["input_ids"].shape[1] <= kind.shape[1]]
        try:
            with runner:
                found = check_parity(runner, cases, artifact.variant, head=head, precision=kind.precision)
        except (MissingExtraError, SystemStateError) as error:
            result.skipped.append(Skipped(artifact.format, artifact.precision, error.message))
            continue
        except VerdictError as error:
            result.failures[f"{artifact.variant} {kind.label}"] = error
            continue
        if found.status == "passed":
            artifact.parity = found
        result.artifacts.append(artifact)
    return result
