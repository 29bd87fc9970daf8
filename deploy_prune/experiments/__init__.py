"""Experiments of the field, one command each: rows, tables and figures from a model and its data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..archs import is_convolutional
from ..disk import disk_errors, write_atomically
from ..errors import InputError
from ..progress import Reporter
from .catalogue import EXPERIMENTS, FOR_CHANNELS
from .lab import Lab, Setting
from .report import document_of, write

__all__ = ["EXPERIMENTS", "Lab", "Setting", "run_experiment"]


def run_experiment(
    name: str, setting: Setting, out: str | Path, reporter: Reporter | None = None, stem: str | None = None
) -> tuple[dict[str, Any], list[Path]]:
    """Run an experiment and write its files into `out`; return the document and the files.

    While it runs its rows are in STEM.partial.json, so that an interrupted run loses none, and no earlier result.
    Raises InputError for an unknown name, a model of another kind or an `out` that is no folder.
    """
    if name not in EXPERIMENTS:
        raise InputError(f"No experiment '{name}'.", hint=f"There are: {', '.join(EXPERIMENTS)}.")
    experiment = EXPERIMENTS[name]
    folder, stem = Path(out), stem or name
    with disk_errors(folder):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise InputError(f"{folder} is not a folder.", hint="Choose another --out.") from error
    lab = Lab(setting, reporter)
    _check_kind(name, is_convolutional(lab.model))
    rows: list[dict[str, Any]] = []
    partial = folder / f"{stem}.partial.json"
    for row in experiment.run(lab):
        rows.append(row)
        write_atomically(partial, json.dumps(document_of(name, experiment, lab, rows), indent=1) + "\n")
        if reporter:
            said = ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in _plain(row).items())
            reporter.note(said)
    document = document_of(name, experiment, lab, rows)
    files = write(document, folder, stem)
    partial.unlink(missing_ok=True)
    return document, files


def _check_kind(name: str, convolutional: bool) -> None:
    """Raise InputError, saying what there is instead, where an experiment is for another kind of model."""
    if EXPERIMENTS[name].convolutional in (None, convolutional):
        return
    there = ", ".join(n for n, e in EXPERIMENTS.items() if e.convolutional in (None, convolutional))
    if not convolutional:
        raise InputError(
            f"The experiment {name} is of channels, and the model has heads and neurons.", hint=f"Use {there}."
        )
    hint = f"The experiments of channels are {there}."
    if name in FOR_CHANNELS:
        hint = f"Without an experiment: {FOR_CHANNELS[name]}. {hint}"
    raise InputError(
        f"The experiment {name} is of heads and neurons, and the model is a convolutional network.", hint=hint
    )


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in row.items() if v is not None and not isinstance(v, dict | list)}
