"""Open an exported model with its tokenizer: numpy, tokenizers and one runtime; neither torch nor transformers.

The tokenizer, the runtime and the reader of manifests are imported when a bundle is loaded, so that importing this
module stays cheap.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace, TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import BundleError, InputError, MissingExtraError
from ..runtimes import Runner, open_runner
from ..runtimes.fixed import FixedShape
from .answers import Text, check_texts, read_answers

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer

    from ..bundle import Bundle, Variant

MOST_THREADS = 1024
BATCH_ROWS = 32  # texts per run: memory does not grow with the number of texts
_SHORT_NAMES = {"ort": "ort-cpu"}
_NO_LIMIT = 1_000_000  # tokens; tokenizers without a limit of their own name 10^30, which no integer type holds


def load(
    bundle: str | Path,
    runtime: str = "ort",
    variant: Variant = "sliced",
    precision: str = "fp32",
    threads: int | None = None,
) -> Predictor:
    """Open a bundle's exported model and its tokenizer, ready to predict.

    `runtime` is "ort" (ONNX Runtime on the CPU) or a name of `available_runtimes()`; `threads` None leaves the
    number to the runtime. Close the predictor, or use it in a with statement. Raises BundleError for a bundle that
    is missing, corrupted or without tokenizer.json, InputError for an unknown runtime, variant or number of
    threads and where the file was not exported, MissingExtraError when the runtime is not installed.
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
    opened = Bundle.open(bundle)
    config = _read_json(opened, "config.json")
    pad_id = int(opened.manifest.model.get("pad_id", config.get("pad_token_id") or 0))
    name = _SHORT_NAMES.get(runtime, runtime)
    runner = open_runner(opened, name, variant, threads=threads, precision=precision)
    shape = _fixed_shape(opened, runner)
    if shape is not None:
        runner = FixedShape(runner, shape, pad_id)
    tokenizer = _open_tokenizer(opened, config, pad_id, shape)
    try:
        runner.__enter__()
    except MissingExtraError as error:
        if name != "ort-cpu":
            raise
        raise MissingExtraError("onnxruntime", "edge") from error  # its own hint would bring in torch as well
    return Predictor(opened, runner, tokenizer, config)


class Predictor:
    """Predict from texts with an open runner; made by `load`."""

    def __init__(self, bundle: Bundle, runner: Runner, tokenizer: Tokenizer, config: Mapping[str, Any]) -> None:
        self.bundle = bundle
        self.runner: Runner | None = runner
        self.tokenizer = tokenizer
        self.head = str(bundle.manifest.task["head"])
        self._labels = [str(label) for label in bundle.manifest.task.get("labels") or ()]
        self._id2label = {int(key): str(label) for key, label in (config.get("id2label") or {}).items()}

    def __call__(self, texts: str | Iterable[Text]) -> list[Any]:
        """Return one answer per text, by the model's head; longer texts than the model takes are cut.

        `texts` are strings or (string, string) pairs; a single string counts as a list of one. classification:
        {"label", "score", "scores": {label: probability}} · regression: {"value"} · token: a list of {"word",
        "start", "end", "label", "score"}, one per token · qa: {"answer", "start", "end", "score"} of (question,
        context) · embedding: {"embedding": (d,)}. Positions count characters. Raises InputError for what is no
        text, for a single text where the head needs a pair, and when closed.
        """
        rows, answers = check_texts(texts, self.head), []
        for begin in range(0, len(rows), BATCH_ROWS):
            batch = rows[begin : begin + BATCH_ROWS]
            encodings = self._encode(batch)
            outputs = self.infer(self._feeds(encodings))
            answers += read_answers(self.head, outputs, encodings, batch, self._names)
        return answers

    def outputs(self, texts: str | Iterable[Text]) -> dict[str, np.ndarray]:
        """Return the model's raw outputs by name, all texts in one batch padded to the longest.

        logits (B, C), (B, 1) or (B, T, C), start_logits and end_logits (B, T), or embedding (B, d); nothing for an
        empty list. Raises InputError as a call does.
        """
        rows = check_texts(texts, self.head)
        return self.infer(self._feeds(self._encode(rows))) if rows else {}

    def infer(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run the model on its own inputs (B, T) and return its outputs by name.

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

    def _encode(self, texts: Sequence[Text]) -> list[Encoding]:
        return self.tokenizer.encode_batch(list(texts))

    def _feeds(self, encodings: Sequence[Encoding]) -> dict[str, np.ndarray]:
        feeds = {}
        for spec in self._running().inputs:
            if spec.name not in _FEATURES:
                raise InputError(
                    f"The model takes {spec.name}, which no tokenizer gives.", hint="Use infer with inputs of your own."
                )
            feeds[spec.name] = np.array([getattr(e, _FEATURES[spec.name]) for e in encodings], dtype=spec.dtype)
        return feeds

    def _names(self, count: int) -> list[str]:
        """Return the names of a model's classes: those of the task, else of its config, else numbered."""
        if len(self._labels) == count:
            return self._labels
        return [self._id2label.get(i, f"LABEL_{i}") for i in range(count)]


_FEATURES = {"input_ids": "ids", "attention_mask": "attention_mask", "token_type_ids": "type_ids"}


def _open_tokenizer(bundle: Bundle, config: Mapping[str, Any], pad_id: int, shape: tuple[int, int] | None) -> Tokenizer:
    """Read tokenizer.json and make it pad and cut as the model needs it. Raises BundleError without a usable one."""
    from tokenizers import Tokenizer

    if "sliced/tokenizer.json" not in bundle.manifest.files:
        raise BundleError(
            f"The bundle {bundle.root} has no sliced/tokenizer.json, the file of a fast tokenizer.",
            hint="Save the checkpoint's tokenizer as a fast one, and make the bundle again.",
        )
    path = bundle.path("sliced/tokenizer.json")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise BundleError(f"Cannot read the tokenizer {path}: {error}", hint="Upgrade tokenizers.") from error
    settings = _read_json(bundle, "tokenizer_config.json")
    limits = [_NO_LIMIT, int(settings.get("model_max_length") or _NO_LIMIT)]
    if config.get("max_position_embeddings"):
        from ..archs import max_positions

        padding = config.get("pad_token_id")
        known = {**config, "pad_token_id": pad_id if padding is None else padding}
        limits.append(max_positions(SimpleNamespace(config=SimpleNamespace(**known))))
    if shape is not None:
        limits.append(shape[1])
    # A right-padded row gives the same answer alone and in a batch, also where positions are absolute.
    tokenizer.enable_padding(pad_id=pad_id, pad_token=tokenizer.id_to_token(pad_id) or "[PAD]")
    tokenizer.enable_truncation(min(limits), direction=settings.get("truncation_side") or "right")
    return tokenizer


def _read_json(bundle: Bundle, name: str) -> dict[str, Any]:
    """Return the contents of a file in sliced/; nothing where the bundle lacks it."""
    if f"sliced/{name}" not in bundle.manifest.files:
        return {}
    contents = json.loads(bundle.path(f"sliced/{name}").read_text("utf-8"))
    return dict(contents)


def _fixed_shape(bundle: Bundle, runner: Runner) -> tuple[int, int] | None:
    """Return the shape that the runner's file is bound to; None where both axes are free."""
    path = getattr(runner, "path", None)  # runners of files have one
    return next((a.shape for a in bundle.manifest.artifacts if path and bundle.path(a.path) == path), None)
