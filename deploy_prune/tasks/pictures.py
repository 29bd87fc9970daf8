"""Read images and their labels where they lie; each is decoded when it is asked for."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DataError, MissingExtraError
from ..images import open_image
from .arrays import Arrays, read_arrays
from .source import EVALUATION_NAMES, TRAIN_NAMES, role_of, split_files
from .splitting import split_by_content

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm")
ANNOTATIONS = "val_annotations.txt"  # Tiny-ImageNet's
IMAGES = ("image", "img", "images", "picture", "photo")
LABELS = ("label", "labels", "fine_label", "target", "class", "category")


@dataclass
class Pictures:
    """Hold one split: arrays, files or encoded bytes, their labels, and the class names that numbers stand for."""

    source: str
    images: Any  # a sequence of uint8 arrays (H, W) or (H, W, C), of paths, or of bytes
    labels: list[Any] | None = None
    names: Sequence[str] = ()

    def __len__(self) -> int:
        return len(self.images)

    def where(self, row: int) -> str:
        image = self.images[row] if isinstance(self.images, list) else None
        return str(image) if isinstance(image, Path) else f"{self.source}, image {row + 1}"

    def decode(self, row: int) -> Any:
        """Return a uint8 array or a Pillow image. Raises InputError for what cannot be decoded."""
        image = self.images[row]
        return image if isinstance(image, np.ndarray) else open_image(image, self.where(row))

    def digest(self, row: int) -> str:
        """Return a hash of the image as it lies there: equal images never part in a split."""
        image = self.images[row]
        if isinstance(image, Path):
            return hashlib.sha256(image.read_bytes()).hexdigest()
        return hashlib.sha256(image.tobytes() if isinstance(image, np.ndarray) else image).hexdigest()

    def select(self, rows: Sequence[int]) -> Pictures:
        images: Any
        if isinstance(self.images, np.ndarray):
            images = self.images[rows]
        elif isinstance(self.images, Column):
            images = Column(self.images.dataset.select(rows), self.images.name, self.source)
        else:
            images = [self.images[i] for i in rows]
        return Pictures(self.source, images, self.labels and [self.labels[i] for i in rows], self.names)


@dataclass
class Column:
    """Read the encoded images of a `datasets.Dataset`, one at a time, from its memory-mapped file."""

    dataset: Any
    name: str
    source: str

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, row: int) -> bytes:
        value = self.dataset[row][self.name]
        content = value.get("bytes") if isinstance(value, Mapping) else value
        if not isinstance(content, bytes):
            raise DataError(
                f"{self.source}, image {row + 1}: column '{self.name}' holds {type(value).__name__}, not a file.",
                hint='Store the bytes of image files, or {"bytes", "path"} records as `datasets` does.',
            )
        return content


def read_pictures(data: Path, image: str | None, label: str | None) -> dict[str, Pictures]:
    """Read the training split and the evaluation split, in this order, of a file or folder.

    A .npz file, parquet files, or folders with a folder a class; what is not split is split by content. `image` and
    `label` name the columns of parquet files. Raises DataError for missing, ambiguous or malformed data.
    """
    return choose_splits(
        _read_folder(data, image, label) if data.is_dir() else _read_file(data, image, label), str(data)
    )


def choose_splits(splits: Mapping[str, Pictures], source: str) -> dict[str, Pictures]:
    """Return the training split and the evaluation split by their names; a single one is split by content.

    Raises DataError when either is missing.
    """
    train = next((splits[name] for name in (*TRAIN_NAMES, "") if name in splits), None)
    evaluation = next((name for name in EVALUATION_NAMES if name in splits), None)
    if train is not None and evaluation is None and len(splits) == 1:
        parts = split_by_content([[train.digest(i)] for i in range(len(train))], source)
        return {name: train.select(rows) for name, rows in zip(("train", "validation"), parts, strict=True)}
    if train is None or evaluation is None:
        raise DataError(
            f"{source} has no {'training' if train is None else 'evaluation'} images; its splits: "
            f"{', '.join(splits) or 'none'}.",
            hint="Name them train and validation (or valid, val, dev, test), or leave all in one, which is then split.",
        )
    return {"train": train, evaluation: splits[evaluation]}


def from_dataset(dataset: Any, source: str, image: str | None, label: str | None) -> Pictures:
    """Take the images and labels of a `datasets.Dataset`, undecoded. Raises DataError without a column or a row."""
    import datasets

    if len(dataset) == 0:
        raise DataError(f"{source} holds no rows.", hint="Give data with at least one image.")
    kinds = dataset.features
    own = [name for name, kind in kinds.items() if isinstance(kind, datasets.Image)]
    image = image or next(iter([*own, *(n for n in IMAGES if n in kinds)]), "")
    if image not in kinds:
        raise DataError(
            f"{source} has no column {f'{image!r}' if image else 'of images'}; it has: {', '.join(kinds)}.",
            hint="Name the column of images with --text-column.",
        )
    if label is not None and label not in kinds:
        raise DataError(
            f"{source} has no column '{label}'; it has: {', '.join(kinds)}.", hint="Name it with --label-column."
        )
    label = label or next((name for name in LABELS if name in kinds), None)
    if image in own:
        dataset = dataset.cast_column(image, datasets.Image(decode=False))
    labels = list(dataset[label]) if label else None
    if labels is not None and all(value is None for value in labels):
        labels = None
    names = getattr(kinds[label], "names", ()) if label else ()
    return Pictures(source, Column(dataset, image, source), labels, list(names or ()))


def _read_file(path: Path, image: str | None, label: str | None) -> dict[str, Pictures]:
    if path.suffix.lower() == ".npz":
        return {name: _from_arrays(f"{path} {name}".strip(), arrays) for name, arrays in read_arrays(path).items()}
    if path.suffix.lower() == ".parquet":
        return {"": _read_parquet([path], image, label)}
    raise DataError(
        f"{path} is not a known kind of image data.",
        hint="Give a .npz file, a .parquet file, or a folder with a folder of images for each class.",
    )


def _read_folder(folder: Path, image: str | None, label: str | None) -> dict[str, Pictures]:
    """Read the splits of a folder: folders of images, parquet files or .npz files, whichever it has."""
    children = sorted(p for p in folder.iterdir() if not p.name.startswith("."))
    parts = {p.name.lower(): p for p in children if p.is_dir()}
    roles = [next((name for name in names if name in parts), "") for names in (TRAIN_NAMES, EVALUATION_NAMES)]
    if any(roles):  # other splits are not read: a test split may have images of no class
        splits = {name: _read_classes(parts[name]) for name in roles if name}
        names = sorted({name for split in splits.values() for name in split.names})
        return {name: Pictures(s.source, s.images, s.labels, names) for name, s in splits.items()}
    files = [p for p in children if p.suffix.lower() == ".parquet"]
    if files:
        groups: dict[str, list[Path]] = {}
        for path in files:
            groups.setdefault(role_of(path.name), []).append(path)
        return {name: _read_parquet(paths, image, label) for name, paths in groups.items()}
    files = [p for p in children if p.suffix.lower() == ".npz"]
    if len(files) == 1:
        return _read_file(files[0], image, label)
    if files:
        pairs = zip(("train", "validation"), split_files(folder, (".npz",)), strict=True)
        return {name: _only(path) for name, path in pairs}
    return {"": _read_classes(folder)}


def _only(path: Path) -> Pictures:
    splits = read_arrays(path)
    if len(splits) != 1:
        raise DataError(
            f"{path} holds several splits ({', '.join(splits)}), but its folder has files of their own for them.",
            hint="Give that file alone with --data, or one split in each file.",
        )
    return _from_arrays(str(path), next(iter(splits.values())))


def _from_arrays(source: str, arrays: Arrays) -> Pictures:
    return Pictures(source, arrays.images, arrays.labels, arrays.names)


def _read_classes(folder: Path) -> Pictures:
    """Read a folder with a folder of images for each class, named so; images right in it have no labels.

    Tiny-ImageNet's own validation folder is known too: its images lie together, and a file names their classes.
    """
    if (folder / ANNOTATIONS).is_file() and (folder / "images").is_dir():
        return _read_annotated(folder)
    classes = sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    files = {path: _images_in(path) for path in classes}
    loose = [p for p in sorted(folder.iterdir()) if _is_image(p)]
    found = [(image, path.name) for path in classes for image in files[path]]
    if (loose and found) or not (loose or found):
        fault = "images both beside and in its folders" if found else "no images"
        raise DataError(
            f"{folder} has {fault}.", hint=f"Give each class a folder of its own, of {', '.join(SUFFIXES)} files."
        )
    if loose:
        return Pictures(str(folder), loose)
    return Pictures(str(folder), [f for f, _ in found], [c for _, c in found], [p.name for p in classes if files[p]])


def _read_annotated(folder: Path) -> Pictures:
    """Read images whose classes stand in a file of lines "image <tab> class ..."."""
    lines = (folder / ANNOTATIONS).read_text("utf-8").splitlines()
    classes = dict(line.split("\t")[:2] for line in lines if "\t" in line)
    files = _images_in(folder / "images")
    unknown = [path for path in files if path.name not in classes]
    if unknown or not files:
        fault = f"does not name the class of {unknown[0]}" if unknown else f"stands beside no images in {folder}"
        raise DataError(f"{folder / ANNOTATIONS} {fault}.", hint="Take both from the same archive.")
    labels = [classes[path.name] for path in files]
    return Pictures(str(folder), files, labels, sorted(set(labels)))


def _images_in(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if _is_image(p))


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()


def _read_parquet(paths: Sequence[Path], image: str | None, label: str | None) -> Pictures:
    """Read parquet files of one split; `datasets` keeps them in its cache, where images are read one at a time."""
    try:
        import datasets
    except ImportError as error:
        raise MissingExtraError("datasets", "cpu") from error
    source = str(paths[0]) if len(paths) == 1 else f"{paths[0]} and {len(paths) - 1} more"
    try:
        dataset = datasets.Dataset.from_parquet([str(path) for path in paths])
    except Exception as error:  # one of a dozen unrelated types, whose cause says more
        reason = str(error.__cause__ or error).strip().splitlines() or [type(error).__name__]
        raise DataError(f"Cannot read {source} as parquet: {reason[0]}", hint="Write the files again.") from error
    return from_dataset(dataset, source, image, label)
