"""Export the variants of a bundle: each file is compared with its model before the bundle gets it."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..bundle import VARIANTS, Artifact, Bundle, Parity, Variant, disk_errors
from .parity import check_parity
from .registry import Exporter, Source, find_exporter

if TYPE_CHECKING:
    from torch import nn


def export_bundle(
    bundle: Bundle,
    *,
    formats: Sequence[str] = ("onnx",),
    precisions: Sequence[str] = ("fp32",),
    variants: Sequence[Variant] = VARIANTS,
    models: Mapping[str, nn.Module] | None = None,
    progress: Callable[[str], None] | None = None,
) -> list[Artifact]:
    """Write each variant in each format and precision; the caller commits the bundle.

    `models` gives loaded variants; the others are loaded from the bundle. Files enter the bundle only
    when all of them have passed. Raises InputError for an unknown format or precision and VerdictError
    when a file does not compute what its model computes.
    """
    from ..checkpoint import head_of, load_variant

    plan = [(f, p, find_exporter(f, p)) for f in formats for p in precisions]
    head, golden, metadata = head_of(bundle), bundle.golden(), _metadata(bundle)
    done: list[tuple[Exporter, Artifact, Path]] = []
    with disk_errors(bundle.root), tempfile.TemporaryDirectory(prefix=".export-", dir=bundle.root) as folder:
        for variant in variants:
            model = models[variant] if models and variant in models else load_variant(bundle, variant)
            for name, precision, exporter in plan:
                label = f"{variant} {name} {precision}"
                if progress:
                    progress(f"export {label}")
                stem = f"{variant}-{name}-{exporter.dialect}-{precision}"
                path = Path(folder) / f"{stem}{exporter.suffix}"
                source = Source(
                    model=model,
                    head=head,
                    input_names=bundle.manifest.model["inputs"],
                    precision=precision,
                    metadata=metadata | {"deploy_prune.variant": variant},
                )
                exporter.export(source, path)
                if progress:
                    progress(f"check {label}")
                with exporter.runner(path) as runner:
                    parity = check_parity(runner, golden, variant, head=head.kind, precision=precision)
                done.append((exporter, _artifact(exporter, variant, name, precision, parity), path))
        return [_add(bundle, *entry) for entry in done]


def _artifact(exporter: Exporter, variant: Variant, name: str, precision: str, parity: Parity) -> Artifact:
    return Artifact(
        variant=variant,
        format=name,
        dialect=exporter.dialect,
        scheme=exporter.scheme,
        precision=precision,
        path="",
        sha256="",
        parity=parity,
    )


def _add(bundle: Bundle, exporter: Exporter, artifact: Artifact, path: Path) -> Artifact:
    """Move a checked file into the bundle; the manifest's entry of the same kind is replaced."""
    manifest = bundle.manifest
    data = path.with_name(path.name + ".data")
    if data.exists():
        artifact.data_path = bundle.add_file(data, "artifacts", path.stem)
        exporter.relocate_data(path, Path(artifact.data_path).name)
    artifact.path = bundle.add_file(path, "artifacts", path.stem)
    artifact.sha256 = manifest.files[artifact.path]
    old = [a for a in manifest.artifacts if _kind(a) == _kind(artifact)]
    manifest.artifacts = [a for a in manifest.artifacts if _kind(a) != _kind(artifact)] + [artifact]
    kept = {p for a in manifest.artifacts for p in (a.path, a.data_path)}
    for relative in {p for a in old for p in (a.path, a.data_path)} - kept:
        manifest.files.pop(relative or "", None)
    return artifact


def _kind(artifact: Artifact) -> tuple[str | None, ...]:
    return (artifact.variant, artifact.format, artifact.dialect, artifact.scheme, artifact.precision)


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
