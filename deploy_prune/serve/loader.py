"""Open an exported model with its tokenizer or image processor; neither torch nor transformers.

It needs numpy, tokenizers or Pillow, and one runtime. All of them, and the reader of manifests, are imported when a
bundle is loaded, so that importing this module stays cheap.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import BundleError, InputError, MissingExtraError
from ..runtimes import Runner, open_runner
from ..runtimes.fixed import FixedShape
from .answers import read_answers
from .preparation import Preparation, open_preparation, read_json

if TYPE_CHECKING:
    from ..bundle import Bundle, Variant

MOST_THREADS = 1024
BATCH_ROWS = 32  # texts or images per run: memory does not grow with their number
_SHORT_NAMES = {"ort": "ort-cpu"}


def load(
    bundle: str | Path,
    runtime: str = "ort",
    variant: Variant = "sliced",
    precision: str = "fp32",
    threads: int | None = None,
    *,
    public_key: Path | None = None,
) -> Predictor:
    """Open a bundle's exported model and its tokenizer or image processor, ready to predict.

    `runtime` is "ort" (ONNX Runtime on the CPU) or a name of `available_runtimes()`; `threads` None leaves the
    number to the runtime. With `public_key` (minisign's) a bundle that was not signed by it is refused. Close the
    predictor, or use it in a with statement. Raises BundleError for a bundle that is missing, corrupted or without
    tokenizer.json (for images, preprocessor_config.json), InputError for an unknown runtime, variant or number of
    threads and where the file was not exported, MissingExtraError when the runtime, or for images Pillow, is not
    installed.
    """
    from ..bundle import PRECISIONS, VARIANTS, Bundle

    if variant not in VARIANTS:
        raise InputError(f"No variant '{variant}'.", hint=f"There are: {', '.join(VARIANTS)}.")
    if precision not in PRECISIONS:
        raise InputError(f"No precision '{precision}'.", hint=f"There are: {', '.join(PRECISIONS)}.")
    if threads is not None and not (isinstance(threads, int) and 1 <= threads <= MOST_THREADS):
        raise InputError(
            f"Cannot compute with {threads!r} threads.",
            hint=f"Give a number from 1 to {MOST_THREADS}, or leave it out.",
        )
    opened = Bundle.open(bundle, public_key=public_key)
    config = read_json(opened, "config.json") or read_json(opened, "module.json")  # none of transformers
    with _described(opened):
        pad_id = int(opened.manifest.model.get("pad_id", config.get("pad_token_id") or 0))
    name = _SHORT_NAMES.get(runtime, runtime)
    runner = open_runner(opened, name, variant, threads=threads, precision=precision)
    shape = _fixed_shape(opened, runner)
    if shape is not None:
        runner = FixedShape(runner, shape, pad_id)
    with _described(opened):
        preparation = open_preparation(opened, config, pad_id, shape)
    try:
        runner.__enter__()
    except MissingExtraError as error:
        if name != "ort-cpu":
            raise
        raise MissingExtraError("onnxruntime", "edge") from error  # its own hint would bring in torch as well
    try:
        with _described(opened):
            return Predictor(opened, runner, preparation, config)
    except BundleError:
        runner.__exit__(None, None, None)
        raise


@contextmanager
def _described(bundle: Bundle) -> Iterator[None]:
    """Turn what is missing in a manifest or config into an error that says so."""
    try:
        yield
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
        raise BundleError(
            f"The bundle {bundle.root} does not describe its model ({type(error).__name__}: {error!s:.100}).",
            hint="Make the bundle again.",
        ) from error


class Predictor:
    """Predict from texts or images with an open runner; made by `load`."""

    def __init__(self, bundle: Bundle, runner: Runner, preparation: Preparation, config: Mapping[str, Any]) -> None:
        self.bundle = bundle
        self.runner: Runner | None = runner
        self.preparation = preparation
        self.head = str(bundle.manifest.task["head"])
        self.vocabulary = int(config.get("vocab_size") or 0)  # 0 where it is not known
        self.token_types = int(config.get("type_vocab_size") or 1)
        self._labels = [str(label) for label in bundle.manifest.task.get("labels") or ()]
        names = config.get("id2label") or dict(enumerate(config.get("labels") or ()))
        self._id2label = {int(key): str(label) for key, label in names.items()}

    def __call__(self, inputs: Any) -> list[Any]:
        """Return one answer per text or image, by the model's head; longer texts than the model takes are cut.

        Texts are strings or (string, string) pairs, images uint8 arrays (H, W) or (H, W, C), Pillow images, paths or
        the bytes of image files; a single one counts as a list of one. classification:
        {"label", "score", "scores": {label: probability}} · regression: {"value"} · token: a list of {"word",
        "start", "end", "label", "score"}, one per token · qa: {"answer", "start", "end", "score"} of (question,
        context) · embedding: {"embedding": (d,)}. Positions count characters. Raises InputError for what is no
        text or image, for a single text where the head needs a pair, and when closed.
        """
        rows, answers = self.preparation.check(inputs), []
        for begin in range(0, len(rows), BATCH_ROWS):
            batch = rows[begin : begin + BATCH_ROWS]
            prepared, feeds = self.prepare(batch, begin)
            answers += self.answers(self.infer(feeds), prepared, batch)
        return answers

    def prepare(self, rows: Sequence[Any], first: int = 0) -> tuple[Any, dict[str, np.ndarray]]:
        """Return checked texts or images as encodings or pixel values, and as the model's inputs (B, ...)."""
        prepared = self.preparation.prepare(rows, first)
        return prepared, self._feeds(prepared)

    def answers(self, outputs: Mapping[str, np.ndarray], prepared: Any, rows: Sequence[Any]) -> list[Any]:
        """Return the answer of each row from the model's outputs (B, ...)."""
        return read_answers(self.head, outputs, prepared, rows, self._names)

    def outputs(self, inputs: Any) -> dict[str, np.ndarray]:
        """Return the model's raw outputs by name, all texts in one batch padded to the longest, or all images.

        logits (B, C), (B, 1) or (B, T, C), start_logits and end_logits (B, T), or embedding (B, d); nothing for an
        empty list. Raises InputError as a call does.
        """
        rows = self.preparation.check(inputs)
        return self.infer(self.prepare(rows)[1]) if rows else {}

    def infer(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run the model on its own inputs (B, T) or (B, C, H, W) and return its outputs by name.

        Raises InputError for a missing or extra input, a wrong dtype, rank or size, and when closed.
        """
        return self._running().infer(feeds)

    def close(self) -> None:
        """Free the model; closing twice does nothing."""
        runner, self.runner = self.runner, None
        if runner is not None:
            runner.__exit__(None, None, None)

    def __enter__(self) -> Predictor:
        self._running()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _running(self) -> Runner:
        if self.runner is None:
            raise InputError(f"This predictor of {self.bundle.root} is closed.", hint="Load the bundle again.")
        return self.runner

    def _feeds(self, prepared: Any) -> dict[str, np.ndarray]:
        feeds = {}
        for spec in self._running().inputs:
            array = self.preparation.feed(spec.name, prepared)
            if array is None:
                raise InputError(
                    f"The model takes {spec.name}, which is not made here.", hint="Use infer with inputs of your own."
                )
            feeds[spec.name] = array.astype(spec.dtype, copy=False)
        return feeds

    def _names(self, count: int) -> list[str]:
        """Return the names of a model's classes: those of the task, else of its config, else numbered."""
        if len(self._labels) == count:
            return self._labels
        return [self._id2label.get(i, f"LABEL_{i}") for i in range(count)]


def _fixed_shape(bundle: Bundle, runner: Runner) -> tuple[int, int] | None:
    """Return the shape that the runner's file is bound to; None where both axes are free."""
    path = getattr(runner, "path", None)  # runners of files have one
    return next((a.shape for a in bundle.manifest.artifacts if path and bundle.path(a.path) == path), None)
