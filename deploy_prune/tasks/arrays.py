"""Read images from a .npz file: numpy arrays without pickles, measured before they are loaded."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DataError
from ..npz import Npz, open_npz
from .source import role_of

_IMAGES = {"x", "image", "images", "img", "imgs", "data", "pixels"}
_LABELS = {"y", "label", "labels", "target", "targets"}
_NAMES = {"classes", "names"}


@dataclass
class Arrays:
    """Hold one split of a .npz file: images (N, H, W) or (N, H, W, C), uint8."""

    images: np.ndarray
    labels: list[Any] | None
    names: list[str] = field(default_factory=list)


def read_arrays(path: Path) -> dict[str, Arrays]:
    """Return the splits of a .npz file by name, "" for one without a name.

    An array's name says what it is by its words: x, image(s), data, pixels; y, label(s), target(s); classes, names
    (of the classes); and train, test, validation, ... for its split: x_train, test_labels. Raises DataError for what
    is none, is pickled, or has another shape or type.
    """
    with open_npz(path) as npz:
        return _read(path, npz)


def _read(path: Path, npz: Npz) -> dict[str, Arrays]:
    members: dict[tuple[str, str], str] = {}
    for name in npz.members:
        kind, split = _meaning(name)
        if kind and (split, kind) in members:
            raise DataError(
                f"{path}: '{npz.file(members[split, kind])}' and '{npz.file(name)}' could both be the {kind} of "
                f"the split '{split}'.",
                hint="Keep one of them in the file.",
            )
        if kind:
            members[split, kind] = name
    splits = sorted({split for split, kind in members if kind == "images"})
    if not splits:
        raise DataError(
            f"{path} has no array of images; its arrays: {', '.join(map(npz.file, npz.members)) or 'none'}.",
            hint="Name them x_train, y_train, x_test, y_test, or images and labels.",
        )
    names = _names(path, npz, members["", "names"]) if ("", "names") in members else []
    found = {}
    for split in splits:
        images = _images(path, npz, members[split, "images"])
        member = members.get((split, "labels"))
        labels = None if member is None else _labels(path, npz, member, len(images))
        found[split] = Arrays(images, labels, names)
    return found


def _meaning(name: str) -> tuple[str, str]:
    """Return what an array holds (or "") and its split."""
    words = set(re.split(r"[^a-z]+", name.lower()))
    for kind, known in (("names", _NAMES), ("labels", _LABELS), ("images", _IMAGES)):
        if words & known:
            return kind, "" if kind == "names" else role_of(name)
    return "", ""


def _names(path: Path, npz: Npz, name: str) -> list[str]:
    names = npz.load(name)
    if names.ndim != 1 or names.dtype.kind not in "iuU":
        raise DataError(f"{path}: '{npz.file(name)}' is {names.shape} of {names.dtype}, no list of names.")
    return [str(name) for name in names]


def _images(path: Path, npz: Npz, name: str) -> np.ndarray:
    images = npz.load(name)
    colour = images.ndim == 4 and images.shape[3] in (1, 3, 4)
    if images.dtype != np.uint8 or not (images.ndim == 3 or colour) or not images.size:
        raise DataError(
            f"{path}: '{npz.file(name)}' is {images.shape} of {images.dtype}, no images.",
            hint="Store uint8 values from 0 to 255 of shape (N, H, W) or (N, H, W, C), the channels last.",
        )
    return images


def _labels(path: Path, npz: Npz, name: str, count: int) -> list[Any]:
    labels = npz.load(name)
    if labels.shape not in ((count,), (count, 1)) or labels.dtype.kind not in "iuU":
        raise DataError(
            f"{path}: '{npz.file(name)}' is {labels.shape} of {labels.dtype}, but there are {count} images.",
            hint="Give one integer, or one name, to each image.",
        )
    return list(labels.reshape(count).tolist())
