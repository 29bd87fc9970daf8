"""Read images from a .npz file: numpy arrays without pickles, measured before they are loaded."""

from __future__ import annotations

import math
import re
import zipfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np

from ..errors import DataError
from .source import role_of

MAX_BYTES = 8 * 2**30  # of one array; more should lie in files that are read piece by piece
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
    try:
        with zipfile.ZipFile(path) as archive:
            return _read(path, archive)
    except (OSError, zipfile.BadZipFile, EOFError, ValueError, zlib.error) as error:
        raise DataError(f"{path} is not a readable .npz file: {error}", hint="Write it with numpy.savez.") from error


def _read(path: Path, archive: zipfile.ZipFile) -> dict[str, Arrays]:
    members: dict[tuple[str, str], zipfile.ZipInfo] = {}
    for info in archive.infolist():
        kind, split = _meaning(info.filename.removesuffix(".npy"))
        if kind and (split, kind) in members:
            raise DataError(
                f"{path}: '{members[split, kind].filename}' and '{info.filename}' could both be the {kind} of "
                f"the split '{split}'.",
                hint="Keep one of them in the file.",
            )
        if kind:
            members[split, kind] = info
    splits = sorted({split for split, kind in members if kind == "images"})
    if not splits:
        raise DataError(
            f"{path} has no array of images; its arrays: {', '.join(archive.namelist()) or 'none'}.",
            hint="Name them x_train, y_train, x_test, y_test, or images and labels.",
        )
    names = [str(name) for name in _load(path, archive, members["", "names"])] if ("", "names") in members else []
    found = {}
    for split in splits:
        images = _images(path, archive, members[split, "images"])
        member = members.get((split, "labels"))
        labels = None if member is None else _labels(path, archive, member, len(images))
        found[split] = Arrays(images, labels, names)
    return found


def _meaning(name: str) -> tuple[str, str]:
    """Return what an array holds (or "") and its split."""
    words = set(re.split(r"[^a-z]+", name.lower()))
    for kind, known in (("names", _NAMES), ("labels", _LABELS), ("images", _IMAGES)):
        if words & known:
            return kind, "" if kind == "names" else role_of(name)
    return "", ""


def _images(path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> np.ndarray:
    images = _load(path, archive, info)
    colour = images.ndim == 4 and images.shape[3] in (1, 3, 4)
    if images.dtype != np.uint8 or not (images.ndim == 3 or colour) or not images.size:
        raise DataError(
            f"{path}: '{info.filename}' is {images.shape} of {images.dtype}, no images.",
            hint="Store uint8 values from 0 to 255 of shape (N, H, W) or (N, H, W, C), the channels last.",
        )
    return images


def _labels(path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo, count: int) -> list[Any]:
    labels = _load(path, archive, info)
    if labels.shape not in ((count,), (count, 1)) or labels.dtype.kind not in "iuU":
        raise DataError(
            f"{path}: '{info.filename}' is {labels.shape} of {labels.dtype}, but there are {count} images.",
            hint="Give one integer, or one name, to each image.",
        )
    return list(labels.reshape(count).tolist())


def _load(path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> np.ndarray:
    """Load one array after its header was compared with its size; nothing pickled is ever read."""
    with archive.open(info) as file:
        shape, dtype = _header(file)
        header = file.tell()
    where = f"{path}: '{info.filename}'"
    if dtype.hasobject:
        raise DataError(
            f"{where} holds Python objects, which are pickled.", hint="Store numbers, or text as numpy str."
        )
    size = math.prod(shape) * dtype.itemsize
    if size != info.file_size - header:
        raise DataError(f"{where} is broken: {shape} of {dtype} does not fill it.", hint="Write the file again.")
    if size > MAX_BYTES:
        raise DataError(
            f"{where} takes {size / 2**30:.0f} GiB of memory.", hint="Give folders of images, or parquet files."
        )
    with archive.open(info) as file:
        return np.lib.format.read_array(file, allow_pickle=False)


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype]:
    version = np.lib.format.read_magic(file)
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in read:
        raise ValueError(f"unknown version {version} of the array format")
    shape, _, dtype = read[version](file)
    return shape, dtype
