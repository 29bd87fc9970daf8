"""Models by name and version: loaded, warmed, replaced without a dropped request, rolled back."""

from __future__ import annotations

import asyncio
import json
import logging
import re
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from ..disk import sha256_file
from ..errors import InputError
from ..serve.loader import Predictor
from ..serve.loader import load as open_bundle
from ..signature import Signature
from .batching import Arrays, Batcher, Merging
from .errors import BusyError, NotFoundError, TooLargeError, readable
from .tensors import BYTES, datatype_of

if TYPE_CHECKING:
    from ..bundle import Variant

log = logging.getLogger("deploy_prune.server")
ANSWERS = ".answers"  # behind a model's name: texts or images in, answers out
MANIFEST = "manifest.json"
WARM_ROWS = (1, 2)
TOKEN_CHARACTERS = 128  # for each token that a model reads: longer texts are refused before they are tokenised and cut
SHORT_TOKENS = 512  # texts of so many tokens are taken whatever the model reads
LONG_TEXT = 1 << 20  # characters that no text may have
T = TypeVar("T")


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


@dataclass
class Entry:
    """Hold the versions of one name; `default` answers requests that name none."""

    source: Path
    serving: Serving
    versions: dict[int, Version] = field(default_factory=dict)
    default: int | None = None
    previous: int | None = None
    newest: int = 0  # ever loaded: a version that was rolled back, or unloaded, is not new again
    newest_digest: str = ""
    loading: asyncio.Lock = field(default_factory=asyncio.Lock)


class Models:
    """Hold every model that is served.

    A source is a bundle, which may be replaced in its place, or a folder of bundles named by their version: 1, 2, ...
    """

    def __init__(self, serving: Serving) -> None:
        self.serving = serving
        self.entries: dict[str, Entry] = {}
        self.closing = False
        self._changes: set[asyncio.Task[Any]] = set()
        self.on_load: Callable[[Version], None] = lambda version: None

    def add(self, name: str, source: Path, serving: Serving | None = None) -> None:
        """Name a source, perhaps served in its own way; nothing is opened yet.

        Raises InputError for a name that cannot stand in an address, or a source without a bundle.
        """
        if source.is_file():
            raise InputError(f"{source} is a file.", hint="Give the folder of a bundle: deploy-prune run makes one.")
        if not name or not all(c.isalnum() or c in "-_" for c in name):
            raise InputError(
                f"{name!r} is no name for a model: letters, digits, - and _ are.",
                hint=f"Give it one as NAME=PATH: model={source}",
            )
        if not sources(source):
            raise InputError(f"No bundle at {source}.", hint="Give a bundle, or a folder of bundles named 1, 2, ...")
        self.entries[name] = Entry(source, serving or self.serving)

    @property
    def ready(self) -> bool:
        """Say whether every model answers."""
        return not self.closing and all(e.default is not None for e in self.entries.values())

    async def load(self, name: str, number: int | None = None) -> Version:
        """Open the newest version of a name, or the one that is asked for, and let it answer from now on.

        Requests that run are answered by the version they began with. The version before stays open, to go back to.
        A load that has begun is finished, also where who asked for it goes away. Raises NotFoundError for an unknown
        name or version, SystemStateError for what cannot be read; what answered before goes on where opening fails.
        """
        entry = self._entry(name)
        if self.closing:
            raise BusyError("The server is going down.", hint="Ask another one.")
        return await self._finish(self._load(name, entry, number))

    async def _load(self, name: str, entry: Entry, number: int | None) -> Version:
        async with entry.loading:
            with readable(entry.source):
                version = await self._opened(name, entry, number)
            if entry.default != version.number:
                entry.previous, entry.default = entry.default, version.number
            kept = {entry.default, entry.previous}
            old = [entry.versions.pop(n) for n in list(entry.versions) if n not in kept]
        for stale in old:
            await stale.close()
            log.info("unloaded", extra={"model": name, "version": stale.number})
        return version

    async def _opened(self, name: str, entry: Entry, number: int | None) -> Version:
        """Return a version of an entry, opened unless it is already. Raises NotFoundError where there is none."""
        found = sources(entry.source)
        single = (entry.source / MANIFEST).is_file()
        if number is None:
            if not found:
                raise NotFoundError(f"There is no bundle of {name} any more.")
            number = self._number_of_single(entry) if single else max(found)
        if number in entry.versions:
            return entry.versions[number]
        root = entry.source if single else found.get(number)
        if root is None or (single and number != self._number_of_single(entry)):
            raise NotFoundError(f"There is no version {number} of {name}.")
        version = await Version.open(name, number, root, entry.serving)
        entry.versions[number] = version
        if number >= entry.newest:
            entry.newest, entry.newest_digest = number, version.digest
        self.on_load(version)
        log.info("loaded", extra={"model": name, "version": number, "bundle": str(root)})
        return version

    async def load_new(self, name: str) -> None:
        """Load what has come since the last load, if anything has."""
        entry = self._entry(name)
        if (entry.source / MANIFEST).is_file():
            newest = self._number_of_single(entry)
        else:
            newest = max(sources(entry.source), default=0)
        if newest > entry.newest:
            await self.load(name)

    async def unload(self, name: str) -> None:
        """Close every version of a name; it stays known, and can be loaded again."""
        await self._finish(self._unload(self._entry(name)))

    async def _unload(self, entry: Entry) -> None:
        async with entry.loading:
            old, entry.versions, entry.default, entry.previous = list(entry.versions.values()), {}, None, None
        for version in old:
            await version.close()

    async def close(self) -> None:
        """Refuse new requests, answer those that wait, and free all models."""
        self.closing = True
        while self._changes:
            await asyncio.gather(*self._changes, return_exceptions=True)
        for name in self.entries:
            await self.unload(name)

    async def _finish(self, change: Coroutine[Any, Any, T]) -> T:
        """Wait for a change, which goes on by itself where who waits is cancelled: none is left half done."""
        task = asyncio.get_running_loop().create_task(change)
        self._changes.add(task)
        task.add_done_callback(self._changes.discard)
        return await asyncio.shield(task)

    def get(self, name: str, number: int | str | None = None) -> Version:
        """Return a version that answers. Raises NotFoundError, or BusyError while it is not ready."""
        entry = self._entry(name.removesuffix(ANSWERS))
        if self.closing:
            raise BusyError("The server is going down.", hint="Ask another one.")
        if number in (None, ""):
            if entry.default is None:
                raise BusyError(f"{name} is not ready.", hint="Ask again later.")
            return entry.versions[entry.default]
        try:
            return entry.versions[int(str(number))]
        except (KeyError, ValueError) as error:
            raise NotFoundError(f"No version {number!r:.40} of {name} is loaded.") from error

    @asynccontextmanager
    async def use(self, name: str, number: int | str | None = None) -> AsyncIterator[Version]:
        """Hold a version while a request runs on it."""
        version = self.get(name, number)
        version.using += 1
        try:
            yield version
        finally:
            version.using -= 1

    def _entry(self, name: str) -> Entry:
        if name not in self.entries:
            raise NotFoundError(f"There is no model {name!r:.80}.")
        return self.entries[name]

    def _number_of_single(self, entry: Entry) -> int:
        """Return the number of the bundle that lies at a single source now: a new one when it was replaced."""
        digest = sha256_file(entry.source / MANIFEST)
        known = {entry.newest_digest: entry.newest, **{v.digest: v.number for v in entry.versions.values()}}
        return known.get(digest, entry.newest + 1)


def sources(folder: Path) -> dict[int, Path]:
    """Return the bundles of a source by version; a lone bundle is version 1."""
    if (folder / MANIFEST).is_file():
        return {1: folder}
    if not folder.is_dir():
        return {}
    named = (p for p in folder.iterdir() if re.fullmatch("[0-9]{1,18}", p.name))
    return {int(p.name): p for p in named if (p / MANIFEST).is_file()}
