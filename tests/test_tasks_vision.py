"""Image tasks: the same rows however the images lie, which class of the model each label is, scores."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import transformers
from pictures_tiny import (
    NAMES,
    SIZE,
    TEST,
    TEST_LABELS,
    TRAIN,
    TRAIN_LABELS,
    WRITERS,
    config,
    dataset,
    images,
    load,
    npz,
    write_folders,
    write_npz,
    write_raw_parquet,
    write_two_npz,
)
from PIL import Image
from tasks_tiny import tiny_config

from deploy_prune import tasks
from deploy_prune.errors import DataError, InputError
from deploy_prune.images import ImageProcessor
from deploy_prune.tasks.vision_labels import CIFAR10, CIFAR100


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.mark.parametrize("write", WRITERS)
def test_the_same_images_however_they_lie(tmp_path: Path, write: Callable[[Path], Path]) -> None:
    data = load(write(tmp_path))
    assert (data.head, data.metric, data.labels) == ("classification", "accuracy", [*NAMES])
    assert (len(data.train), len(data.evaluation)) == (6, 3)
    found = {(row.features["pixel_values"].tobytes(), row.label) for row in data.train.encode(range(6))}
    wanted = zip(TRAIN, TRAIN_LABELS, strict=True)
    assert found == {
        ((np.moveaxis(image, -1, 0) / np.float64(255)).astype(np.float32).tobytes(), n) for image, n in wanted
    }
    rows = data.evaluation.rows()
    assert sorted(row.label for row in rows) == [0, 1, 2]
    assert [row.length for row in rows] == [5, 5, 5]  # 2 x 2 patches and one for the class
    assert dict(rows[0].features)["pixel_values"].shape == (3, SIZE, SIZE)
    with pytest.raises(KeyError):
        rows[0].features["input_ids"]
    assert len(data.evaluation.texts(2)) == 2


@pytest.mark.parametrize("write", WRITERS)
def test_a_model_with_other_numbers_for_the_same_names(tmp_path: Path, write: Callable[[Path], Path]) -> None:
    if write is write_raw_parquet or write is write_two_npz:  # only numbers, or names in one of two files
        pytest.skip("these data do not name their classes")
    plain = load(write(tmp_path), names=3)
    assert plain.labels == [*NAMES]
    own = load(tmp_path if write is not write_npz else tmp_path / "a.npz", names=("EEL", "fox", "Dog", "cat"))
    turn = {0: 3, 1: 2, 2: 0}
    for a, b in ((plain.train, own.train), (plain.evaluation, own.evaluation)):
        assert [turn[row.label] for row in a.encode(range(len(a)))] == [row.label for row in b.encode(range(len(b)))]
    assert own.labels == ["EEL", "fox", "Dog", "cat"]


def write_pictures(folder: Path, pixels: Sequence[Any], name: str) -> list[str]:
    folder.mkdir(parents=True)
    names = [f"{name}_{i}.JPEG" for i in range(len(pixels))]
    for path, image in zip(names, pixels, strict=True):
        Image.fromarray(image).save(folder / path)
    return names


def test_splits_that_are_not_read_add_no_classes(tmp_path: Path) -> None:
    """A test split whose images lie in one folder, whatever its name, belongs to no class."""
    (write_folders(tmp_path) / "test").rename(tmp_path / "val")
    write_pictures(tmp_path / "test" / "images", TEST, "secret")
    data = load(tmp_path)
    assert data.labels == [*NAMES]
    assert list(data.evals) == ["val"]


def test_tiny_imagenet_as_its_archive_unpacks(tmp_path: Path) -> None:
    """train/<class>/images/*, val/images/* with val_annotations.txt, test/images/* without classes."""
    for number, name in enumerate(NAMES):
        rows = [image for image, label in zip(TRAIN, TRAIN_LABELS, strict=True) if label == number]
        write_pictures(tmp_path / "train" / name / "images", rows, name)
    write_pictures(tmp_path / "test" / "images", TEST, "test")
    files = write_pictures(tmp_path / "val" / "images", TEST, "val")
    lines = [f"{path}\t{NAMES[n]}\t0\t0\t6\t6\n" for path, n in zip(files, TEST_LABELS, strict=True)]
    annotations = tmp_path / "val" / "val_annotations.txt"
    annotations.write_text("".join(lines))
    data = load(tmp_path, "tiny_imagenet")
    assert data.labels == [*NAMES]
    assert sorted(row.label for row in data.train.encode(range(6))) == sorted(TRAIN_LABELS)
    assert [row.label for row in data.evaluation.rows()] == TEST_LABELS
    annotations.write_text("".join(lines[:-1]))
    with pytest.raises(DataError, match=f"does not name the class of .*{files[-1]}"):
        load(tmp_path, "tiny_imagenet")


def test_scores(tmp_path: Path) -> None:
    split = load(write_npz(tmp_path)).evaluation
    outputs = [{"logits": np.eye(3)[row.label]} for row in split.rows()]
    assert split.score(outputs) == {"accuracy": 1.0, "macro_f1": 1.0}
    outputs[0], outputs[1] = outputs[1], outputs[0]
    assert split.score(outputs)["accuracy"] == pytest.approx(1 / 3)


def many(count: int = 60) -> tuple[np.ndarray, list[int]]:
    half = images(count // 2)
    return np.concatenate([half, half]), [i % 3 for i in range(count // 2)] * 2


@pytest.mark.parametrize("kind", ["npz", "folders", "parquet"])
def test_what_is_not_split_is_split_by_content(tmp_path: Path, kind: str) -> None:
    pixels, labels = many()
    path = tmp_path / ("all" if kind == "folders" else f"all.{kind}")
    if kind == "npz":
        np.savez(path, images=pixels, labels=labels)
    elif kind == "parquet":
        dataset(pixels, labels).to_parquet(path)
    else:
        for i, (image, label) in enumerate(zip(pixels, labels, strict=True)):
            (path / NAMES[label]).mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path / NAMES[label] / f"{i}.png")
    data = load(path)
    assert list(data.evals) == ["validation"]
    assert len(data.train) + len(data.evaluation) == 60
    assert 4 <= len(data.evaluation) <= 20
    sides = [
        {row.features["pixel_values"].tobytes() for row in split.encode(range(len(split)))}
        for split in (data.train, data.evaluation)
    ]
    assert len(sides[0]) == len(data.train) / 2  # every image is there twice, on one side
    assert not sides[0] & sides[1]


def test_images_without_labels(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x_train=TRAIN, x_test=TEST)
    for split in ("train", "val"):
        (tmp_path / "folder" / split).mkdir(parents=True)
        Image.fromarray(TEST[0]).save(tmp_path / "folder" / split / "a.png")
    for path in (tmp_path / "a.npz", tmp_path / "folder"):
        data = load(path)
        assert data.metric is None
        assert not data.train.labelled
        assert data.train.encode([0])[0].label is None
        assert data.evaluation.score([]) == {}


@pytest.mark.parametrize(
    ("task", "path", "columns", "evaluation", "names"),
    [
        ("cifar10", "uoft-cs/cifar10", ("img", "label"), "test", CIFAR10),
        ("cifar100", "uoft-cs/cifar100", ("img", "fine_label"), "test", CIFAR100),
        ("mnist", "ylecun/mnist", ("image", "label"), "test", 10),
        ("fashion_mnist", "zalando-datasets/fashion_mnist", ("image", "label"), "test", 10),
        ("tiny_imagenet", "zh-plus/tiny-imagenet", ("image", "label"), "valid", NAMES),
        ("mini_imagenet", "timm/mini-imagenet", ("image", "label"), "validation", NAMES),
    ],
)
def test_known_data_sets_come_from_the_hub(monkeypatch, task, path, columns, evaluation, names) -> None:
    asked = []
    splits = {"train": (TRAIN, TRAIN_LABELS), evaluation: (TEST, TEST_LABELS)}
    known = tasks.registry.find_spec(task).labels or NAMES

    def fetch(*arguments: Any, **options: Any) -> dict[str, datasets.Dataset]:
        asked.append(arguments[0])
        kinds = datasets.Features({columns[0]: datasets.Image(), columns[1]: datasets.ClassLabel(names=[*known])})
        return datasets.DatasetDict(
            {name: dataset(pixels, labels, *columns).cast(kinds) for name, (pixels, labels) in splits.items()}
        )

    monkeypatch.setattr(datasets, "load_dataset", fetch)
    data = load(None, task, names)
    assert asked == [path]
    assert list(data.evals) == [evaluation]
    assert [row.label for row in data.train.encode(range(6))] == TRAIN_LABELS
    assert data.labels == [*known]
    np.testing.assert_allclose(
        data.train.encode([5])[0].features["pixel_values"], np.moveaxis(TRAIN[5], -1, 0) / 255, atol=1e-6
    )


@pytest.mark.parametrize(
    ("names", "model", "words"),
    [
        (NAMES, 4, ("3 classes (cat, dog, eel)", "model has 4")),
        (NAMES, ("a", "b"), ("3 classes", "model has 2: a, b")),
        (("dog", "cat", "gnu"), NAMES, ("counts some classes otherwise", "dog, cat", "gnu")),
        ((), 2, ("Label mismatch", "2", "image 3")),
    ],
)
def test_classes_that_are_not_the_models(tmp_path: Path, names: Any, model: Any, words: tuple[str, ...]) -> None:
    extra = {"classes": names} if names else {}
    path = npz(x_train=TRAIN, y_train=TRAIN_LABELS, x_test=TEST, y_test=TEST_LABELS, **extra)(tmp_path)
    with pytest.raises(DataError) as caught:
        load(path, names=model)
    for word in words:
        assert word in str(caught.value)


def test_other_spellings_of_the_same_classes_keep_their_numbers(tmp_path: Path) -> None:
    write = npz(x_train=TRAIN, y_train=TRAIN_LABELS, x_test=TEST, y_test=TEST_LABELS, classes=("cat", "hound", "eel"))
    assert [row.label for row in load(write(tmp_path)).train.encode(range(6))] == TRAIN_LABELS


def test_images_of_another_size_are_refused_at_once(tmp_path: Path) -> None:
    path = npz(x_train=np.zeros((2, 5, 5), np.uint8), x_test=np.zeros((2, 4, 4), np.uint8))(tmp_path)
    with pytest.raises(DataError, match=r"a\.npz train, image 1: It comes out 5 x 5") as caught:
        load(path)
    assert "do_resize" in caught.value.hint


def test_a_broken_image_is_named_when_it_is_decoded(tmp_path: Path) -> None:
    data = load(write_folders(tmp_path))
    where = data.train.texts(6)[4]
    Path(where).write_bytes(b"broken")
    rows = data.train.encode(range(6))
    assert rows[3].features["pixel_values"].shape == (3, SIZE, SIZE)
    with pytest.raises(DataError, match="is not an image") as caught:
        rows[4].features["pixel_values"]
    assert str(caught.value).count(where) == 1


def test_a_processor_is_needed_and_must_fit(tmp_path: Path) -> None:
    path = write_npz(tmp_path)
    with pytest.raises(InputError, match="image processor"):
        tasks.load_task("image-classification", config=config(), data=path)
    with pytest.raises(InputError, match="8 x 8, but the model takes 4 x 4"):
        tasks.load_task("image-classification", config=config(), processor=ImageProcessor((3, 8, 8)), data=path)
    with pytest.raises(InputError, match="--max-length"):
        load(path, max_length=128)
    (tmp_path / "train.csv").write_text("text,label\na,0\n")
    (tmp_path / "dev.csv").write_text("text,label\na,0\n")
    with pytest.raises(InputError, match="tokenizer"):
        tasks.load_task("text-classification", config=tiny_config(), data=tmp_path)
    with pytest.raises(DataError, match="--data"):
        load(None)


def test_ten_thousand_images_are_rows_without_pixels(tmp_path: Path) -> None:
    count = 10_000
    np.savez(tmp_path / "a.npz", x_train=TRAIN, x_test=np.zeros((count, SIZE, SIZE), np.uint8))
    calls = []

    class Counting(ImageProcessor):
        def __call__(self, images: Sequence[Any]) -> np.ndarray:
            calls.append(len(images))
            return super().__call__(images)

    data = tasks.load_task(
        "image-classification", config=config(), processor=Counting((3, SIZE, SIZE)), data=tmp_path / "a.npz"
    )
    rows = data.evaluation.rows()
    assert sum(row.length for row in rows) == 5 * count
    assert len(calls) == 2  # the first image of each split
    assert rows[-1].features["pixel_values"].shape == (3, SIZE, SIZE)


DATA = os.environ.get("DEPLOY_PRUNE_DATA", "")


@pytest.mark.data
@pytest.mark.skipif(not DATA, reason="DEPLOY_PRUNE_DATA is not set")
def test_real_files() -> None:
    folder = Path(DATA) / "checkpoints" / "vit-fashion"
    fashion = tasks.load_task(
        "fashion_mnist",
        config=transformers.AutoConfig.from_pretrained(folder),
        processor=ImageProcessor.from_folder(folder),
        data=Path(DATA) / "data" / "vision" / "fashion_mnist.npz",
    )
    assert (len(fashion.train), len(fashion.evaluation), fashion.train.encode([7])[0].length) == (60_000, 10_000, 50)
    cifar = tasks.load_task(
        "cifar10",
        config=transformers.ViTConfig(num_labels=10, architectures=["ViTForImageClassification"]),
        processor=ImageProcessor.from_dict({"image_processor_type": "ViTImageProcessor"}),
        data=Path(DATA) / "data" / "vision" / "cifar10.npz",
    )
    assert (len(cifar.train), len(cifar.evaluation), cifar.labels) == (5_000, 10_000, [*CIFAR10])
    assert cifar.evaluation.rows()[0].features["pixel_values"].shape == (3, 224, 224)
    assert sorted({row.label for row in cifar.train.encode(range(5_000))}) == [*range(10)]


def test_modules_stay_light() -> None:
    code = "import sys, deploy_prune.tasks.vision; sys.exit(bool({'PIL', 'datasets', 'torch'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
