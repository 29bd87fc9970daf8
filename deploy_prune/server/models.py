"""Models by name and version: loaded, warmed, replaced without a dropped request, rolled back."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from ..disk import sha256_file
from ..errors import InputError
from .errors import BusyError, NotFoundError, readable
from .versions import ANSWERS, MANIFEST, Serving, Version

log = logging.getLogger("deploy_prune.server")
T = TypeVar("T")


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
