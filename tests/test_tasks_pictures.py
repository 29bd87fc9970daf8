"""Reading image data: arrays are measured first, nothing is unpickled, what is malformed is refused."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from pictures_tiny import TEST, TEST_LABELS, TRAIN, TRAIN_LABELS, encoded, load, npz, write_npz
from PIL import Image

from deploy_prune import npz as npz_files
from deploy_prune.errors import DataError
from deploy_prune.tasks.pictures import read_pictures


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


class Touch:
    """Note that it was unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    evil = np.array([Touch(tmp_path / "touched")] * 3, dtype=object)
    np.savez(tmp_path / "a.npz", x_train=evil, y_train=[0, 1, 2])
    with pytest.raises(DataError, match="pickled"):
        load(tmp_path / "a.npz")
    assert not (tmp_path / "touched").exists()


def test_an_array_that_claims_too_much_is_not_allocated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "|u1", "fortran_order": False, "shape": (10**9, 1000, 1000)})
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("images.npy", buffer.getvalue() + b"few")
    with pytest.raises(DataError, match="broken"):
        load(tmp_path / "a.npz")
    monkeypatch.setattr(npz_files, "MAX_BYTES", 100)
    with pytest.raises(DataError, match="of memory"):
        load(write_npz(tmp_path))


def folders(*files: str) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        for name in files:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(TRAIN[0]).save(folder / name)
        return folder

    return write


def parquet(**columns: Any) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        datasets.Dataset.from_dict(columns).to_parquet(folder / "a.parquet")
        return folder / "a.parquet"

    return write


def file(name: str, content: bytes) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        (folder / name).write_bytes(content)
        return folder / name

    return write


@pytest.mark.parametrize(
    ("write", "words"),
    [
        (npz(y=[1]), ("no array of images", "y.npy", "x_train")),
        (npz(x=TRAIN, images=TRAIN), ("x.npy", "images.npy", "both")),
        (npz(x=TRAIN.astype(np.float32), y=TRAIN_LABELS), ("float32", "uint8")),
        (npz(x=np.zeros((6, 3, 5, 5), np.uint8), y=TRAIN_LABELS), ("(6, 3, 5, 5)", "last")),
        (npz(x_train=TRAIN, y_train=[0, 1], x_test=TEST, y_test=TEST_LABELS), ("(2,)", "6 images")),
        (npz(x_train=TRAIN, y_train=[0.5] * 6, x_test=TEST), ("float64",)),
        (npz(x_test=TEST, y_test=TEST_LABELS), ("no training images", "test")),
        (npz(x=TRAIN[:1], y=[0]), ("cannot be split",)),
        (file("a.npz", b"not a zip"), ("not a readable .npz",)),
        (file("a.txt", b"x"), ("known kind", ".npz")),
        (file("a.parquet", b"x"), ("Cannot read", "a.parquet")),
        (folders(), ("no images", "folder of its own")),
        (folders("train/cat/a.png"), ("cannot be split",)),
        (folders("train/cat/a.png", "train/b.png", "val/cat/a.png"), ("beside",)),
        (folders("val/cat/a.png", "test/cat/b.png"), ("no training images",)),
        (parquet(text=["a"], label=[0]), ("no column of images", "text, label", "--text-column")),
        (parquet(image=["a"] * 20, label=[0] * 20), ("image 1", "str")),
        (parquet(image=encoded(TRAIN)[:1], label=[0]), ("cannot be split",)),
    ],
)  # fmt: skip
def test_data_that_are_refused(tmp_path: Path, write: Callable[[Path], Path], words: tuple[str, ...]) -> None:
    with pytest.raises(DataError) as caught:
        load(write(tmp_path))
    for word in words:
        assert word in str(caught.value)


def test_columns_of_parquet_files_can_be_named(tmp_path: Path) -> None:
    rows = {"a": encoded(TRAIN), "b": encoded(TRAIN[::-1]), "n": TRAIN_LABELS, "label": [0] * 6}
    for name in ("train", "dev"):
        datasets.Dataset.from_dict(rows).to_parquet(tmp_path / f"{name}.parquet")
    splits = read_pictures(tmp_path, "b", "n")
    assert list(splits) == ["train", "dev"]
    assert splits["train"].labels == TRAIN_LABELS
    np.testing.assert_array_equal(np.asarray(splits["train"].decode(0)), TRAIN[5])
    with pytest.raises(DataError, match="no column 'm'"):
        read_pictures(tmp_path, "b", "m")
