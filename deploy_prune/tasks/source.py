"""Find the files of a task's splits, or fetch them from the hub."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import DataError, MissingExtraError, SystemStateError
from .table import SUFFIXES

# A file's role is the last of these words in its name: "train.csv", "dev-v1.1.json", "eng.testa".
TRAIN_NAMES = ("train", "training")
EVALUATION_NAMES = ("validation", "valid", "val", "dev", "testa", "eval", "test")  # the first found is used


def require_file(path: Path, what: str) -> Path:
    """Return the path. Raises DataError naming it when there is no such file."""
    if not path.is_file():
        there = ""
        if path.parent.is_dir():
            names = sorted(p.name for p in path.parent.iterdir())
            there = f" The folder has: {', '.join(names[:12]) or 'nothing'}."
        raise DataError(
            f"{what} needs the file {path}, which is not there.{there}",
            hint="Give a folder that has it with --data. Calibration never reads the evaluation rows.",
        )
    return path


def split_files(folder: Path, suffixes: Sequence[str] = SUFFIXES) -> tuple[Path, Path]:
    """Return the training and evaluation files of a folder: train.*, then validation|valid|dev|test.*.

    Raises DataError when either is missing or more than one file could be meant.
    """
    files = sorted(p for p in folder.iterdir() if p.is_file() and p.suffix.lower() in suffixes)
    train = _one_named(files, TRAIN_NAMES)
    evaluation = _one_named(files, EVALUATION_NAMES)
    if train is None or evaluation is None:
        missing = "train.*" if train is None else "validation.* (or valid.*, dev.*, test.*)"
        raise DataError(
            f"{folder} has no {missing} with one of the endings {', '.join(suffixes)}; its data files: "
            f"{', '.join(p.name for p in files) or 'none'}.",
            hint="Name the files so, or give a single file, which is then split for you.",
        )
    return train, evaluation


def role_of(name: str) -> str:
    """Return the last word of a name that names a split ("train", "dev", ...), or ""."""
    words = reversed(re.split(r"[^a-z]+", name.lower()))
    return next((w for w in words if w in (*TRAIN_NAMES, *EVALUATION_NAMES)), "")


def require_path(data: Path | None, task: str) -> Path:
    """Return an existing file or folder. Raises DataError otherwise."""
    if data is None:
        raise DataError(f"The task '{task}' needs data of yours.", hint="Give --data FILE or FOLDER.")
    if not data.exists():
        raise DataError(f"There is no file or folder {data}.", hint="Check the path given with --data.")
    return data


def fetch(path: str, name: str | None = None, revision: str | None = None) -> Any:
    """Fetch a data set from the hub: a mapping from split names to `datasets.Dataset`.

    Raises SystemStateError when the hub cannot be reached, MissingExtraError without `datasets`.
    """
    try:
        import datasets
    except ImportError as error:
        raise MissingExtraError("datasets", "cpu") from error
    try:
        return datasets.load_dataset(path, name, revision=revision)
    except Exception as error:  # the hub's clients raise a dozen unrelated types when it is unreachable
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise SystemStateError(
            f"Cannot fetch the data set {path}{f' ({name})' if name else ''} from the hub: {reason[0]}",
            hint="With no network, pass local files with --data DIR.",
        ) from error


def _one_named(files: Sequence[Path], names: Sequence[str]) -> Path | None:
    """Return the file with the first of these roles that any has; an exact name such as train.csv wins."""
    for name in names:
        found = [p for p in files if role_of(p.name) == name]
        found = [p for p in found if p.stem.lower() == name] or found
        if len(found) > 1:
            raise DataError(
                f"More than one file could be the '{name}' split: {', '.join(str(p) for p in found)}.",
                hint="Keep one of them in the folder, or give a single file.",
            )
        if found:
            return found[0]
    return None
