"""Experiments of the field, one command each: rows, tables and figures from a model and its data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import InputError
from ..progress import Reporter
from .catalogue import EXPERIMENTS
from .lab import Lab, Setting
from .report import document_of, write

__all__ = ["EXPERIMENTS", "Lab", "Setting", "run_experiment"]


def run_experiment(
    name: str, setting: Setting, out: str | Path, reporter: Reporter | None = None, stem: str | None = None
) -> tuple[dict[str, Any], list[Path]]:
    """Run an experiment; after every row its files in `out` are written anew. Return the document and the files.

    Raises InputError for an unknown name.
    """
    if name not in EXPERIMENTS:
        raise InputError(f"No experiment '{name}'.", hint=f"There are: {', '.join(EXPERIMENTS)}.")
    experiment = EXPERIMENTS[name]
    lab = Lab(setting, reporter)
    rows: list[dict[str, Any]] = []
    document, files = document_of(name, experiment, lab, rows), []
    for row in experiment.run(lab):
        rows.append(row)
        document = document_of(name, experiment, lab, rows)
        files = write(document, Path(out), stem or name)
        if reporter:
            said = ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in _plain(row).items())
            reporter.note(said)
    return document, files


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in row.items() if v is not None and not isinstance(v, dict | list)}
