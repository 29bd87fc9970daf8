"""Tiny images of three classes, in every form that image data may have."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
from PIL import Image
from tasks_tiny import tiny_config

from deploy_prune import tasks
from deploy_prune.images import ImageProcessor
from deploy_prune.tasks import TaskData

SIZE = 4
NAMES = ("cat", "dog", "eel")


def config(names: int | Sequence[str] = NAMES, **extra: Any) -> SimpleNamespace:
    return tiny_config("ImageClassification", names, model_type="vit", image_size=SIZE, patch_size=2, **extra)


def load(
    data: Path | None, task: str = "image-classification", names: int | Sequence[str] = NAMES, **options: Any
) -> TaskData:
    processor = ImageProcessor((3, SIZE, SIZE), scale=1 / 255)
    return tasks.load_task(task, config=config(names), processor=processor, data=data, **options)


def images(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, SIZE, SIZE, 3), dtype=np.uint8)


TRAIN, TEST = images(6), images(3, 1)
TRAIN_LABELS, TEST_LABELS = [0, 1, 2, 0, 1, 2], [2, 1, 0]


def npz(**contents: Any) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        np.savez(folder / "a.npz", **contents)
        return folder / "a.npz"

    return write


def write_npz(folder: Path) -> Path:
    np.savez_compressed(
        folder / "a.npz", x_train=TRAIN, y_train=TRAIN_LABELS, x_test=TEST, y_test=TEST_LABELS, classes=NAMES
    )
    return folder / "a.npz"


def write_two_npz(folder: Path) -> Path:
    np.savez(folder / "train.npz", images=TRAIN, labels=np.array(TRAIN_LABELS)[:, None])
    np.savez(folder / "test.npz", images=TEST, labels=[NAMES[i] for i in TEST_LABELS])
    return folder


def write_folders(folder: Path) -> Path:
    for split, pixels, labels in (("train", TRAIN, TRAIN_LABELS), ("test", TEST, TEST_LABELS)):
        for i, (image, label) in enumerate(zip(pixels, labels, strict=True)):
            path = folder / split / NAMES[label] / "deep" / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)
    (folder / "train" / "notes.txt").write_text("not an image")
    return folder


def encoded(pixels: np.ndarray) -> list[bytes]:
    files = []
    for image in pixels:
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "PNG")
        files.append(buffer.getvalue())
    return files


def dataset(pixels: np.ndarray, labels: Sequence[Any], image: str = "image", label: str = "label") -> datasets.Dataset:
    features = datasets.Features({image: datasets.Image(), label: datasets.ClassLabel(names=[*NAMES])})
    rows = [{"bytes": content, "path": None} for content in encoded(pixels)]
    return datasets.Dataset.from_dict({image: rows, label: [*labels]}, features=features)


def write_parquet(folder: Path) -> Path:
    """Write parquet files as `datasets` does: a record for each image, names of the classes, several files."""
    dataset(TRAIN[:4], TRAIN_LABELS[:4]).to_parquet(folder / "train-00000-of-00002.parquet")
    dataset(TRAIN[4:], TRAIN_LABELS[4:]).to_parquet(folder / "train-00001-of-00002.parquet")
    dataset(TEST, TEST_LABELS).to_parquet(folder / "test-00000-of-00001.parquet")
    return folder


def write_raw_parquet(folder: Path) -> Path:
    """Write parquet files with nothing but bytes and numbers."""
    for name, pixels, labels in (("train", TRAIN, TRAIN_LABELS), ("test", TEST, TEST_LABELS)):
        datasets.Dataset.from_dict({"img": encoded(pixels), "class": labels}).to_parquet(folder / f"{name}.parquet")
    return folder


WRITERS = [write_npz, write_two_npz, write_folders, write_parquet, write_raw_parquet]
