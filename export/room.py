"""Export the variants of a bundle: each file is compared with its model before the bundle gets it."""

from __future__ import annotations

import errno
import hashlib
import importlib.metadata
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..bundle import VARIANTS, Artifact, Bundle, GoldenCase, Parity, Variant
from ..disk import disk_errors, sha256_file
from ..errors import DeployPruneError, InputError, VerdictError
from ..runtimes import Runner
from ..runtimes.fixed import FixedShape
from ..runtimes.torch_runner import TorchRunner
from ..signature import Signature
from .evaluation import Evaluation
from .parity import check_parity, golden_within
from .registry import Feeds, Kind, Options, Skipped, Source, available_exporters, plan_kinds

if TYPE_CHECKING:
    from torch import nn

FULL_BYTES = 1 << 16  # a disk with less room than this is full
RECIPE = 3  # raised when the same options make another file
# Options that only some kinds of file depend on; what a kind itself says is none.
_STATIC_INT8 = ("calibrate_by", "calibration_rows")
_ENGINES = (
    *("profile", "builder_level", "version_compatible", "hardware_compatible", "refit", "strip"),
    "compute_capabilities",
)
_IN_THE_KIND = ("dialects", "schemes", "shape", "aot_inductor", "exporter")


@dataclass
class Exported:
    """List what an export made, what it took over unchanged, what it left out, and what failed."""

    artifacts: list[Artifact] = field(default_factory=list)
    reused: int = 0
    skipped: list[Skipped] = field(default_factory=list)
    failures: dict[str, DeployPruneError] = field(default_factory=dict)  # by label

    def left_out(self) -> list[str]:
        """Return a line for everything that was not exported."""
        lines = [f"skipped {s.format}{f' {s.precision}' if s.precision else ''}: {s.reason}" for s in self.skipped]
        return lines + [f"failed {label}: {error.message}" for label, error in self.failures.items()]

    def check(self) -> None:
        """Raise VerdictError, naming every file that failed, unless all were made."""
        if self.failures:
            lines = [f"{label}: {error.message}" for label, error in self.failures.items()]
            raise VerdictError(
                "Not exported: " + "; ".join(lines),
                hint="These files were not stored; every other one was.",
            ) from next(iter(self.failures.values()))


def export_bundle(
    bundle: Bundle,
    *,
    formats: Sequence[str] = ("onnx",),
    precisions: Sequence[str] = ("fp32",),
    variants: Sequence[Variant] = VARIANTS,
    options: Options | None = None,
    models: Mapping[str, nn.Module] | None = None,
    evaluation: Evaluation | None = None,
    previous: Sequence[Bundle] = (),
    stored: Callable[[], None] = lambda: None,
    progress: Callable[[str], None] | None = None,
) -> Exported:
    """Write each variant in each format and precision; the caller commits the bundle.

    `models` gives loaded variants; the others are loaded from the bundle. `evaluation` gives the rows for
    static int8 and for the quality of lower precisions. Files of the same weights and options are taken
    over from this bundle or from one of `previous`; `stored` is called when a file is in the bundle. A file that
    fails to build or to match its model is left out and listed. Raises InputError for an unknown format or
    precision, MissingExtraError for a format that was named and cannot be built here.
    """
    kinds, skipped = plan_kinds(formats, precisions, options or Options())
    _check_length(bundle, options or Options())
    result = Exported(skipped=skipped)
    if evaluation is None:
        static = [k for k in kinds if k.scheme == "qdq"]
        kinds = [k for k in kinds if k not in static]
        reason = "static int8 (qdq) needs calibration data, and there are none"
        result.skipped += [Skipped(f, "int8", reason) for f in dict.fromkeys(k.format for k in static)]
    if "virtual" in variants:
        lower = dict.fromkeys((k.format, k.precision) for k in kinds if k.precision != "fp32")
        result.skipped += [Skipped(f, p, "the virtual model is a control: fp32 only") for f, p in lower]
    with disk_errors(bundle.root), tempfile.TemporaryDirectory(prefix=".export-", dir=bundle.root) as folder:
        for variant in variants:
            shop = Workshop(
                bundle, variant, Path(folder), options or Options(), models, evaluation, previous, result, progress
            )
            for kind in kinds:
                if variant != "virtual" or kind.precision == "fp32":
                    shop.deliver(kind)
                    stored()
    return result


@dataclass
class Made:
    """Hold one finished file outside the bundle, or the artifact that was taken over."""

    path: Path
    artifact: Artifact
    source: Kind | None = None  # of the file that this one was made from, where that one is kept too


@dataclass
class Workshop:
    """Make the files of one variant; what several of them need is made once."""

    bundle: Bundle
    variant: Variant
    folder: Path
    options: Options
    models: Mapping[str, nn.Module] | None
    evaluation: Evaluation | None
    previous: Sequence[Bundle]
    result: Exported
    progress: Callable[[str], None] | None
    made: dict[Kind, Made] = field(default_factory=dict)
    failed: dict[Kind, DeployPruneError] = field(default_factory=dict)

    def deliver(self, kind: Kind) -> None:
        """Make one kind of file and put it, and the file it names as its source, into the bundle."""
        try:
            made = self.make(kind)
        except DeployPruneError as error:
            self.result.failures[f"{self.variant} {kind.label}"] = error
            return
        if made.source is not None:
            made.artifact.source = self._store(self.make(made.source))
        self._store(made)
        self.result.artifacts.append(made.artifact)

    def make(self, kind: Kind) -> Made:
        """Return the checked file of a kind, from the bundle, from an earlier one, or made now.

        Raises DeployPruneError when it cannot be built or does not compute what its model computes.
        """
        if kind in self.failed:
            raise self.failed[kind]
        if kind not in self.made:
            try:
                self.made[kind] = self._taken_over(kind) or self._built(kind)
            except DeployPruneError as error:
                self.failed[kind] = error
                raise
        return self.made[kind]

    @cached_property
    def source(self) -> Source:
        from ..checkpoint import head_of, load_variant

        given = self.models or {}
        return Source(
            model=given[self.variant] if self.variant in given else load_variant(self.bundle, self.variant),
            head=head_of(self.bundle),
            inputs=Signature.of_manifest(self.bundle.manifest.model),
            metadata=_metadata(self.bundle) | {"deploy_prune.variant": self.variant},
            options=self.options,
            usual_length=int(self.bundle.manifest.budget.get("seq_len", 128)),
            feeds=self._feeds if self.evaluation else None,
            make=lambda kind: self.make(kind).path,
        )

    def _feeds(self) -> Sequence[Feeds]:
        assert self.evaluation is not None
        return self.evaluation.calibration(self.options.calibration_rows, self.options.shape)

    def _built(self, kind: Kind) -> Made:
        exporter = available_exporters()[kind.format]
        place = self.folder / f"{self.variant}-{kind.label}"
        place.mkdir()
        path = place / f"model{exporter.suffix}"
        self._say("export", kind)
        said = self._exported(kind, path)
        source = said.pop("source", None)
        artifact = Artifact(
            variant=self.variant,
            format=kind.format,
            dialect=kind.dialect,
            precision=kind.precision,
            scheme=kind.scheme,
            shape=kind.shape,
            path="",
            sha256="",
            key=self._key(kind),
            parity=Parity(status="not_run"),
            **said,
        )
        runner = exporter.runner(artifact, path)
        if isinstance(runner, str):
            artifact.parity = Parity(status="not_run", reason=runner)
            return Made(path, artifact, source)
        self._say("check", kind)
        with self._shaped(runner, kind) as runner:
            head = self.bundle.manifest.task["head"]
            artifact.parity = check_parity(
                runner, self._golden(kind), self.variant, head=head, precision=kind.precision
            )
            if kind.precision != "fp32" and kind.shape is None and self.evaluation is not None:
                self._say("evaluate", kind)
                artifact.quality = self.evaluation.quality(runner, self.source)
        return Made(path, artifact, source)

    def _exported(self, kind: Kind, path: Path) -> dict[str, Any]:
        """Write the file; what a tool raises is a failed build of this file, not the end of the others."""
        try:
            return dict(available_exporters()[kind.format].export(kind, self.source, path))
        except (DeployPruneError, OSError):
            raise
        except Exception as error:
            if shutil.disk_usage(path.parent).free < FULL_BYTES:  # torch and onnx do not tell a full disk from others
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
            reason = (str(error).strip().splitlines() or ["it gave no reason"])[0]
            raise VerdictError(f"The build failed: {type(error).__name__}: {reason}") from error

    def _shaped(self, runner: Runner, kind: Kind) -> Runner:
        pad_id = int(self.bundle.manifest.model.get("pad_id", 0))
        return FixedShape(runner, kind.shape, pad_id) if kind.shape else runner

    def _golden(self, kind: Kind) -> list[GoldenCase]:
        return golden_within(
            self.bundle.golden(),
            kind.shape,
            self.variant,
            lambda: TorchRunner(self.source.model, self.source.head, self.source.signature),
        )

    def _taken_over(self, kind: Kind) -> Made | None:
        """Return the same file of this bundle, or a copy of an earlier bundle's, if there is one."""
        key = self._key(kind)
        for bundle in (self.bundle, *self.previous):
            for artifact in bundle.manifest.artifacts:
                if artifact.key != key or artifact.variant != self.variant or self._unmeasured(artifact):
                    continue
                self.result.reused += 1
                if bundle is self.bundle:
                    return Made(bundle.path(artifact.path), artifact, _source_kind(bundle, artifact))
                place = self.folder / f"{self.variant}-{kind.label}"
                place.mkdir()
                exporter = available_exporters()[kind.format]
                path = place / f"model{exporter.suffix}"
                shutil.copy(bundle.path(artifact.path), path)
                copied = artifact.model_copy(update={"path": "", "data_path": None})
                if artifact.data_path:
                    data = place / _data_name(path.name, Path(artifact.data_path).name)
                    shutil.copy(bundle.path(artifact.data_path), data)
                    exporter.rename_data(path, data.name)
                return Made(path, copied, _source_kind(bundle, artifact))
        return None

    def _unmeasured(self, artifact: Artifact) -> bool:
        """Say whether a file lacks the quality that can be measured now: it was made without data."""
        measurable = artifact.precision != "fp32" and artifact.shape is None and artifact.parity.status == "passed"
        return measurable and artifact.quality is None and self.evaluation is not None

    def _store(self, made: Made) -> str:
        """Move a file, and its companion, into the bundle; the manifest's entry of the same kind is replaced."""
        artifact, manifest = made.artifact, self.bundle.manifest
        if artifact.path:
            return artifact.path  # there already
        exporter = available_exporters()[artifact.format]
        companions = [p for p in made.path.parent.iterdir() if p != made.path]
        digest = _digest([made.path, *sorted(companions)])
        stem = f"{self.variant}-{kind_of(artifact).label}-{digest[:12]}"
        name = f"{stem}{exporter.suffix}"
        for data in companions:
            renamed = _data_name(name, data.name)
            exporter.rename_data(made.path, renamed)
            artifact.data_path = self.bundle.add_as(data, f"artifacts/{renamed}")
        artifact.path = self.bundle.add_as(made.path, f"artifacts/{name}")
        made.path = self.bundle.path(artifact.path)
        names = {"{onnx}": artifact.source or "", "{engine}": artifact.path}
        for old, new in names.items():
            artifact.reproduce = [line.replace(old, new) for line in artifact.reproduce]
        artifact.sha256 = manifest.files[artifact.path]
        same = [a for a in manifest.artifacts if a.variant == self.variant and kind_of(a) == kind_of(artifact)]
        manifest.artifacts = [a for a in manifest.artifacts if a not in same] + [artifact]
        kept = {p for a in manifest.artifacts for p in (a.path, a.data_path)}
        for relative in {p for a in same for p in (a.path, a.data_path)} - kept:
            manifest.files.pop(relative or "", None)
        return artifact.path

    def _key(self, kind: Kind) -> str:
        """Return the hash of everything that the file depends on: weights, kind, options, metadata, versions."""
        manifest, exporter = self.bundle.manifest, available_exporters()[kind.format]
        unused = {*_IN_THE_KIND, *(() if kind.scheme == "qdq" else _STATIC_INT8)}
        unused |= set() if exporter.suffix == ".engine" else set(_ENGINES)
        options = {name: value for name, value in asdict(self.options).items() if name not in unused}
        contents = {
            "recipe": RECIPE,
            "kind": asdict(kind),
            "options": options,
            "weights": [manifest.model.get("sha256"), manifest.files.get("sliced/model.safetensors")],
            "plan": manifest.plan.get("hash"),
            "metadata": _metadata(self.bundle) | {"variant": self.variant},
            "calibration": {k: manifest.recipe.get(k) for k in ("data", "samples", "seed", "max_length")},
            "versions": {name: _version(name) for name in exporter.packages},
        }
        return hashlib.sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest()

    def _say(self, what: str, kind: Kind) -> None:
        if self.progress:
            self.progress(f"{what} {self.variant} {kind.label}")


def _check_length(bundle: Bundle, options: Options) -> None:
    """Raise InputError for shapes longer than the model has positions for, or other than its images'."""
    signature = Signature.of_manifest(bundle.manifest.model)
    for shape in [options.shape, options.profile.largest if options.profile else None]:
        if shape is not None:
            signature.check_length(shape[1])
    if signature.image:
        return
    config = json.loads(bundle.path("sliced/config.json").read_text("utf-8"))
    limit, lengths = config.get("max_position_embeddings"), [s[1] for s in (options.shape,) if s]
    lengths += [options.profile.largest[1]] if options.profile else []
    if limit is not None and lengths and lengths[0] > limit:
        raise InputError(f"The model has {limit} positions, not {lengths[0]}.", hint="Give a shorter --profile.")


def kind_of(artifact: Artifact) -> Kind:
    """Return the kind of file that an artifact is."""
    return Kind(artifact.format, artifact.dialect, artifact.precision, artifact.scheme, artifact.shape)


def _source_kind(bundle: Bundle, artifact: Artifact) -> Kind | None:
    if artifact.source is None:
        return None
    return next((kind_of(a) for a in bundle.manifest.artifacts if a.path == artifact.source), None)


def _data_name(name: str, data: str) -> str:
    """Return a companion's name beside a file of that name: model.onnx.data, model.bin."""
    return f"{name}.data" if data.endswith(".data") else f"{name.rpartition('.')[0]}{Path(data).suffix}"


def _digest(paths: Sequence[Path]) -> str:
    digests = [sha256_file(p) for p in paths]
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _metadata(bundle: Bundle) -> dict[str, str]:
    """Return what a file says of its origin, as JSON values under keys of this package."""
    manifest = bundle.manifest
    values = {
        "model": manifest.model,
        "task": manifest.task,
        "budget": manifest.budget,
        "plan_hash": manifest.plan.get("hash"),
        "labels": manifest.task.get("labels", []),
    }
    return {f"deploy_prune.{key}": json.dumps(value, sort_keys=True) for key, value in values.items()}
