"""One version of a model: a bundle that is open, with its queue, what it is asked and what it answers."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..disk import sha256_file
from ..errors import InputError
from ..serve.loader import Predictor
from ..serve.loader import load as open_bundle
from ..signature import Signature
from .batching import Arrays, Batcher, Merging
from .errors import BusyError, TooLargeError
from .tensors import BYTES, datatype_of

if TYPE_CHECKING:
    from ..bundle import Variant

ANSWERS = ".answers"  # behind a model's name: texts or images in, answers out
MANIFEST = "manifest.json"
WARM_ROWS = (1, 2)
TOKEN_CHARACTERS = 128  # for each token that a model reads: longer texts are refused before they are tokenised and cut
SHORT_TOKENS = 512  # texts of so many tokens are taken whatever the model reads
LONG_TEXT = 1 << 20  # characters that no text may have


@dataclass(frozen=True)
class Serving:
    """Say how bundles are opened and how requests are gathered."""

    variant: Variant = "sliced"
    runtime: str = "ort"
    precision: str = "fp32"
    threads: int | None = None
    most_rows: int = 32
    queue_rows: int = 256
    wait: float = 0.0
    request_rows: int = 128
    request_elements: int = 1 << 24
    public_key: Path | None = None  # bundles that it did not sign are refused


class Version:
    """Hold one open bundle, ready to answer; made by `Version.open`. `sample` are the outputs of a run of it."""

    def __init__(
        self, name: str, number: int, digest: str, predictor: Predictor, serving: Serving, sample: Arrays
    ) -> None:
        self.name, self.number, self.digest = name, number, digest
        self.predictor, self.serving = predictor, serving
        self.using = 0
        self.signature = Signature.of_manifest(predictor.bundle.manifest.model)
        self.head = predictor.head
        self.on_run: Callable[[int, float], None] = lambda rows, seconds: None
        self.on_close: Callable[[], None] = lambda: None
        per_token = {"token": ("logits",), "qa": ("start_logits", "end_logits")}.get(self.head, ())
        pads = None if self.signature.image else {"input_ids": int(predictor.bundle.manifest.model.get("pad_id", 0))}
        self.batcher = Batcher(
            predictor.infer,
            Merging(pads, frozenset(per_token)),
            most_rows=serving.most_rows,
            queue_rows=serving.queue_rows,
            wait=serving.wait,
            on_run=lambda rows, seconds: self.on_run(rows, seconds),
        )
        free = {n: [-1, *([-1, *a.shape[2:]] if n in per_token else a.shape[1:])] for n, a in sample.items()}
        self._outputs = [{"name": n, "datatype": datatype_of(sample[n]), "shape": shape} for n, shape in free.items()]

    @classmethod
    async def open(cls, name: str, number: int, root: Path, serving: Serving) -> Version:
        """Open a bundle and run it once at some sizes, away from the event loop."""
        digest = sha256_file(root / MANIFEST)

        def work() -> tuple[Predictor, Arrays]:
            predictor = open_bundle(
                *(root, serving.runtime, serving.variant, serving.precision, serving.threads),
                public_key=serving.public_key,
            )
            runs = [predictor.infer(warm_feeds(predictor, rows)) for rows in WARM_ROWS]
            return predictor, runs[0]

        predictor, sample = await asyncio.to_thread(work)
        return cls(name, number, digest, predictor, serving, sample)

    async def infer(self, feeds: Arrays) -> Arrays:
        """Return the outputs of raw inputs, checked first, so that one bad request spoils no batch."""
        from ..runtimes.base import check_feeds

        runner = self.predictor.runner
        if runner is None:
            raise BusyError("The model is being unloaded.", hint="Ask again.")
        check_feeds(runner.inputs, feeds)
        self._check_rows(len(next(iter(feeds.values()))))
        self._check_tokens(feeds)
        self._check_values(feeds)
        return await self.batcher.infer(feeds)

    async def answer(self, given: Sequence[Any]) -> list[Any]:
        """Return the answers of texts or images."""
        rows = self.predictor.preparation.check(list(given))
        self._check_rows(len(rows))
        self._check_texts(rows)
        prepared, feeds = await asyncio.to_thread(self.predictor.prepare, rows)
        outputs = await self.batcher.infer(feeds)
        return self.predictor.answers(outputs, prepared, rows)

    async def close(self) -> None:
        """Let every request end that has begun, those too that are not in the queue yet, and free the model."""
        while self.using:
            await asyncio.sleep(0.01)
        await self.batcher.close()
        self.on_close()
        await asyncio.to_thread(self.predictor.close)

    def inputs(self) -> list[dict[str, Any]]:
        """Return the raw inputs as the protocol's metadata has them, -1 for a free axis."""
        runner = self.predictor.runner
        specs = runner.inputs if runner else ()
        return [
            {
                "name": s.name,
                "datatype": datatype_of(np.empty(0, s.dtype)),
                "shape": [n if isinstance(n, int) else -1 for n in s.shape],
            }
            for s in specs
        ]

    def outputs(self) -> list[dict[str, Any]]:
        """Return the raw outputs as the protocol's metadata has them."""
        return self._outputs

    def answer_inputs(self) -> list[dict[str, Any]]:
        """Return what the answering side of the model takes."""
        name = "image" if self.signature.image else "text"
        return [{"name": name, "datatype": BYTES, "shape": [-1, -1] if self.head == "qa" else [-1]}]

    def answer_outputs(self) -> list[dict[str, Any]]:
        """Return what the answering side of the model gives."""
        more = {
            "classification": [("label", BYTES, [-1]), ("score", "FP32", [-1])],
            "regression": [("value", "FP32", [-1])],
            "embedding": [("embedding", "FP32", [-1, -1])],
        }.get(self.head, [])
        return [{"name": n, "datatype": d, "shape": s} for n, d, s in [("answer", BYTES, [-1]), *more]]

    def read_given(self, feeds: Arrays) -> list[Any]:
        """Return the texts, pairs or image files of a request to the answering side."""
        (wanted,) = self.answer_inputs()
        if set(feeds) != {wanted["name"]} or feeds[wanted["name"]].dtype != object:
            raise InputError(f"This model takes one input, '{wanted['name']}' of {BYTES}.")
        array = feeds[wanted["name"]]
        if self.signature.image:
            return [bytes(x) for x in array.reshape(-1)]
        try:
            texts = [[x.decode("utf-8") for x in row] for row in array.reshape(len(array), -1)]
        except UnicodeDecodeError as error:
            raise InputError("A text is not UTF-8.") from error
        if array.ndim > 2 or len(texts[0]) > 2:
            raise InputError(f"Texts have the shape [rows], pairs [rows, 2], not {list(array.shape)}.")
        return [row[0] if len(row) == 1 else tuple(row) for row in texts]

    def write_answers(self, answers: Sequence[Any]) -> Arrays:
        """Return answers as the outputs of the answering side."""

        def plain(value: Any) -> Any:
            return value.tolist() if isinstance(value, np.ndarray) else value

        def texts(values: Sequence[str]) -> np.ndarray:
            array = np.empty(len(values), dtype=object)
            array[:] = [v.encode("utf-8") for v in values]
            return array

        outputs = {"answer": texts([json.dumps(a, default=plain, ensure_ascii=False) for a in answers])}
        if self.head == "classification":
            outputs["label"] = texts([a["label"] for a in answers])
            outputs["score"] = np.array([a["score"] for a in answers], np.float32)
        elif self.head in ("regression", "embedding"):
            name = "value" if self.head == "regression" else "embedding"
            outputs[name] = np.array([a[name] for a in answers], np.float32)
        return outputs

    def _check_rows(self, rows: int) -> None:
        most = min(self.serving.request_rows, self.serving.queue_rows)
        if rows > most:
            raise TooLargeError(f"The request has {rows} rows; at most {most} are taken.", hint="Send several.")

    def _check_tokens(self, feeds: Arrays) -> None:
        """Raise TooLargeError for rows that are longer than the model reads: memory grows with their square."""
        most = self.predictor.preparation.most_tokens
        if most is not None and (longest := max(a.shape[1] for a in feeds.values())) > most:
            raise TooLargeError(f"Rows of {longest:,} tokens; the model reads {most:,}.", hint="Cut them.")

    def _check_texts(self, rows: Sequence[Any]) -> None:
        """Raise TooLargeError for a text that is so long that all but its beginning would be tokenised for nothing."""
        tokens = self.predictor.preparation.most_tokens
        if tokens is None:
            return
        most = min(TOKEN_CHARACTERS * max(tokens, SHORT_TOKENS), LONG_TEXT)
        for i, row in enumerate(rows):
            longest = max(len(text) for text in ((row,) if isinstance(row, str) else row))
            if longest > most:
                raise TooLargeError(
                    f"Text {i} has {longest:,} characters; at most {most:,} are taken.",
                    hint=f"The model reads {tokens:,} tokens of it: send its beginning.",
                )

    def _check_values(self, feeds: Arrays) -> None:
        """Raise InputError for token ids that a runtime would read beyond its tables with."""
        ids = feeds.get("input_ids")
        size = self.predictor.vocabulary
        if ids is not None and size and (int(ids.min()) < 0 or int(ids.max()) >= size):
            raise InputError(f"input_ids must lie between 0 and {size - 1}.")
        types = feeds.get("token_type_ids")
        if types is not None and (int(types.min()) < 0 or int(types.max()) >= self.predictor.token_types):
            raise InputError(f"token_type_ids must lie between 0 and {self.predictor.token_types - 1}.")


def warm_feeds(predictor: Predictor, rows: int) -> Arrays:
    """Return inputs of a loaded model to run it once: ones, of 16 tokens where the length is free."""
    assert predictor.runner is not None
    return {
        s.name: np.ones([n if isinstance(n, int) else (rows if i == 0 else 16) for i, n in enumerate(s.shape)], s.dtype)
        for s in predictor.runner.inputs
    }
