"""Files of tiny sliced models in every kind, each made once for all tests of the session."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from bundles_tiny import HIDDEN, input_names, tiny_inputs, tiny_model, tiny_plan

from deploy_prune.bundle import Artifact, Parity
from deploy_prune.export.registry import Kind, Options, Source, available_exporters
from deploy_prune.heads import Head
from deploy_prune.runtimes import Runner
from deploy_prune.slicing import slice_model

FAMILIES = {
    "bert": "classification",
    "roberta": "qa",
    "distilbert": "token",
    "electra": "regression",
    "mpnet": "embedding",
    "vit": "classification",
    "deit": "classification",
    "dinov2": "classification",
}


@cache
def _folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="deploy-prune-tests-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@cache
def source(family: str = "bert") -> Source:
    """Return a tiny sliced model as exporters get it: ragged, one layer without neurons, one without heads."""
    head, names = Head(FAMILIES[family]), input_names(family)  # type: ignore[arg-type]
    dense = tiny_model(family, FAMILIES[family])
    model = slice_model(dense, *tiny_plan(dense))
    feeds = [tiny_inputs(names, 4, 9 + i, seed=i) for i in range(12)]
    return Source(
        model,
        head,
        names,
        {"deploy_prune.variant": "sliced"},
        Options(calibration_rows=48),
        usual_length=HIDDEN,
        feeds=lambda: feeds,
        make=lambda kind: made(family, kind)[0],
    )


@cache
def made(family: str, kind: Kind) -> tuple[Path, dict[str, Any]]:
    """Return a file of a kind, and what the exporter says of it."""
    exporter = available_exporters()[kind.format]
    folder = _folder() / f"{family}-{kind.label}"
    folder.mkdir()
    path = folder / f"model{exporter.suffix}"
    return path, dict(exporter.export(kind, source(family), path))


def runner(family: str, kind: Kind) -> Runner | str:
    path, said = made(family, kind)
    said = {k: v for k, v in said.items() if k in ("engine", "signature")}
    artifact = Artifact(
        variant="sliced",
        format=kind.format,
        dialect=kind.dialect,
        precision=kind.precision,
        scheme=kind.scheme,
        shape=kind.shape,
        path=path.name,
        sha256="",
        parity=Parity(status="not_run"),
        **said,
    )
    return available_exporters()[kind.format].runner(artifact, path)
