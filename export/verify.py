"""Run a bundle's files where they are, against its golden outputs."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

from ..bundle import Artifact, Bundle
from ..config import ENGINES, PROGRAMS
from ..errors import DeployPruneError, MissingExtraError, SystemStateError, VerdictError
from ..runtimes import Runner, open_runner
from ..runtimes.engine import RTX, TENSORRT, engines_refused
from ..runtimes.fixed import FixedShape
from ..runtimes.torch_program import programs_refused
from .parity import check_parity, golden_within
from .registry import available_exporters
from .room import kind_of


@dataclass
class Verified:
    """Hold what was compared here, what could not be and why, and what differs (by label)."""

    artifacts: list[Artifact] = field(default_factory=list)
    unchecked: list[tuple[Artifact, str]] = field(default_factory=list)
    failures: dict[str, DeployPruneError] = field(default_factory=dict)

    def check(self) -> None:
        """Raise VerdictError, naming every file that differs, unless none does."""
        if self.failures:
            lines = [f"{label}: {error.message}" for label, error in self.failures.items()]
            raise VerdictError("Not what the models compute: " + "; ".join(lines), hint="Export these files again.")


def verify_bundle(bundle: Bundle) -> Verified:
    """Compare every artifact that can run on this machine with the golden outputs; the caller commits the bundle.

    Parity that was not run is completed. What differs keeps its entry. Quality is not measured again.
    """
    result, golden = Verified(), bundle.golden()
    for artifact in bundle.manifest.artifacts:
        runner = _runner(bundle, artifact)
        if isinstance(runner, str):
            result.unchecked.append((artifact, runner))
            continue
        variant, kind = artifact.variant, kind_of(artifact)
        try:
            cases = golden_within(golden, kind.shape, variant, partial(open_runner, bundle, "torch", variant))
            with runner:
                head = bundle.manifest.task["head"]
                found = check_parity(runner, cases, variant, head=head, precision=kind.precision)
        except VerdictError as error:
            result.failures[f"{variant} {kind.label}"] = error
            continue
        except (MissingExtraError, SystemStateError) as error:
            result.unchecked.append((artifact, error.message))
            continue
        if found.status != "passed":
            result.unchecked.append((artifact, found.reason or "there are no golden rows for it"))
            continue
        artifact.parity = found
        result.artifacts.append(artifact)
    return result


def _runner(bundle: Bundle, artifact: Artifact) -> Runner | str:
    """Return a runner that takes golden rows, or why there is none."""
    exporter = available_exporters().get(artifact.format)
    if exporter is None:
        return "no exporter of this format is here"
    runner = exporter.runner(artifact, bundle.path(artifact.path))
    if isinstance(runner, str):
        return runner
    engine = artifact.format in (TENSORRT.format, RTX.format)
    refusal = engines_refused() if engine else programs_refused() if artifact.format == PROGRAMS else ""
    if refusal:
        word = ENGINES if engine else PROGRAMS
        return f"{refusal}; if you trust the bundle, allow it: deploy-prune --allow-code {word} verify ..."
    if artifact.shape is None:
        return runner
    return FixedShape(runner, artifact.shape, int(bundle.manifest.model.get("pad_id", 0)))
