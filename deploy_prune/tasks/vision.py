"""Image classification: the known data sets, and data of the user's own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from ..errors import DataError, InputError
from ..images import ImageProcessor, check_fit, image_tokens
from .base import Row, RowOutput, Split, TaskData
from .generic import CLASSIFICATION
from .labels import class_ids, fold, is_generic, model_labels
from .pictures import Pictures, choose_splits, from_dataset, read_pictures
from .source import fetch, require_path
from .spec import LoadRequest, TaskSpec
from .vision_labels import CIFAR10, CIFAR100, FASHION_MNIST, MNIST


class Pixels(Mapping[str, np.ndarray]):
    """Give the features of one image, {"pixel_values": (C, H, W)}, decoded each time: a split never lies in memory."""

    def __init__(self, split: ImageSplit, index: int) -> None:
        self._split, self._index = split, index

    def __getitem__(self, name: str) -> np.ndarray:
        if name != "pixel_values":
            raise KeyError(name)
        return self._split.pixels(self._index)

    def __iter__(self) -> Iterator[str]:
        yield "pixel_values"

    def __len__(self) -> int:
        return 1


class ImageSplit(Split):
    """Hold images and their classes (None where there are none)."""

    def __init__(
        self, name: str, pictures: Pictures, labels: list[int] | None, processor: ImageProcessor, tokens: int
    ) -> None:
        self.name = name
        self.labelled = labels is not None
        self._pictures = pictures
        self._labels = labels
        self._processor = processor
        self._tokens = tokens

    def __len__(self) -> int:
        return len(self._pictures)

    def pixels(self, index: int) -> np.ndarray:
        """Return one image as the model takes it (C, H, W). Raises DataError saying which cannot be read."""
        try:
            return self._processor([self._pictures.decode(index)])[0]
        except InputError as error:
            where = self._pictures.where(index)
            message = error.message.removeprefix("Image 0: ")
            raise DataError(message if where in message else f"{where}: {message}", hint=error.hint) from error

    def encode(self, indices: Sequence[int]) -> list[Row]:
        labels: Any = self._labels or [None] * len(self)
        return [Row(Pixels(self, int(i)), labels[int(i)], self._tokens) for i in indices]

    def rows(self) -> list[Row]:
        return self.encode(range(len(self)))

    def score(self, outputs: Sequence[RowOutput], dense: Sequence[RowOutput] | None = None) -> dict[str, float]:
        if self._labels is None:
            return {}
        predictions = np.stack([o["logits"] for o in outputs]).argmax(axis=1)  # (N,)
        labels = np.asarray(self._labels)
        return {name: metric(predictions, labels) for name, metric in CLASSIFICATION.items()}

    def texts(self, limit: int) -> list[Any]:
        """Return where the first images lie."""
        return [self._pictures.where(i) for i in range(min(limit, len(self)))]


def load_images(hub: str, columns: tuple[str, str], canonical: tuple[str, ...], request: LoadRequest) -> TaskData:
    """Load a .npz file, parquet files, folders of images, or for the known data sets the hub.

    Raises InputError without a processor that fits the model, DataError for missing data, and for classes or images
    that are not the model's.
    """
    processor = _require_processor(request)
    if request.data is None and hub:
        image, label = request.text_column or columns[0], request.label_column or columns[1]
        splits = {n: from_dataset(found, f"{hub} {n}", image, label) for n, found in fetch(hub).items()}
        both = choose_splits(splits, hub)
    else:
        data = require_path(request.data, request.task)
        both = read_pictures(data, request.text_column, request.label_column)
    tokens = image_tokens(request.config, processor.output_size[1:])
    made = []
    for name, pictures in both.items():
        labels = _class_numbers(pictures, canonical, request.config)
        made.append(ImageSplit(name, pictures, labels, processor, tokens))
        made[-1].pixels(0)  # images that do not suit the model should not be found out after minutes
    train, evaluation = made
    own = model_labels(request.config)
    data_names = next((p.names for p in both.values() if p.names), canonical)
    return TaskData(
        task=request.task,
        head="classification",
        metric=next(iter(CLASSIFICATION)) if evaluation.labelled else None,
        train=train,
        evals={evaluation.name: evaluation},
        labels=[*data_names] if data_names and is_generic(own) else own,
    )


def _require_processor(request: LoadRequest) -> ImageProcessor:
    if request.processor is None:
        raise InputError(
            f"The task '{request.task}' needs the model's image processor.",
            hint="Give processor=ImageProcessor.from_folder(...), of a folder with preprocessor_config.json.",
        )
    if request.max_length is not None:
        raise InputError("Images have no length in tokens to cut.", hint="Leave out --max-length.")
    check_fit(request.processor, request.config)
    return request.processor


def _class_numbers(pictures: Pictures, canonical: Sequence[str], config: Any) -> list[int] | None:
    """Return the model's class of each image: by name where both have names, else by number."""
    labels = pictures.labels
    if labels is None:
        return None
    own, names = model_labels(config), [*(pictures.names or canonical)]
    if not names:
        return class_ids(labels, pictures.where, own)
    mine = {fold(name): i for i, name in enumerate(own)}
    if not is_generic(own) and all(fold(name) in mine for name in names):
        # The data may have fewer classes than the model, in another order.
        return [mine[fold(names[number])] for number in class_ids(labels, pictures.where, names)]
    if len(names) != len(own):
        raise DataError(
            f"{pictures.source} has {len(names)} classes ({_some(names)}), but the model has {len(own)}: {_some(own)}.",
            hint="Give the data that the model was trained for, or name its classes in id2label of its config.json.",
        )
    moved = [n for i, n in enumerate(names) if not is_generic(own) and mine.get(fold(n), i) != i]
    if moved:
        raise DataError(
            f"{pictures.source} counts some classes otherwise than the model ({_some(moved)}), and others have names "
            f"that the model lacks: {_some([n for n in names if fold(n) not in mine])}.",
            hint="Rename the classes of the data, or those in id2label of the model's config.json.",
        )
    return class_ids(labels, pictures.where, own, names)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


def _spec(name: str, hub: str, image: str, label: str, labels: tuple[str, ...] = ()) -> TaskSpec:
    return TaskSpec(name, "classification", partial(load_images, hub, (image, label), labels), labels, "image")


SPECS = [
    _spec("cifar10", "uoft-cs/cifar10", "img", "label", CIFAR10),
    _spec("cifar100", "uoft-cs/cifar100", "img", "fine_label", CIFAR100),
    _spec("fashion_mnist", "zalando-datasets/fashion_mnist", "image", "label", FASHION_MNIST),
    _spec("mnist", "ylecun/mnist", "image", "label", MNIST),
    _spec("mini_imagenet", "timm/mini-imagenet", "image", "label"),
    _spec("tiny_imagenet", "zh-plus/tiny-imagenet", "image", "label"),
    _spec("image-classification", "", "", ""),
]
