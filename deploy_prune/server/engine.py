"""What both protocols do with a decoded request: find the model, run it, count it."""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from ..errors import DeployPruneError, InputError
from .batching import Arrays
from .errors import BusyError, LateError, NotFoundError, UnopenedError
from .metrics import Metrics
from .models import Models
from .tensors import check_finite
from .versions import ANSWERS, Version

log = logging.getLogger("deploy_prune.server")


@dataclass
class Answer:
    """Hold what a request is answered with."""

    model: str
    version: int
    outputs: Arrays


class Held:
    """Account for the bytes of requests that are held at one time, over both protocols: `most` together."""

    def __init__(self, most: int) -> None:
        self.most, self.bytes = most, 0

    def take(self, count: int) -> None:
        """Count bytes that have come. Raises BusyError, and counts none, where there is no room for them."""
        if self.bytes + count > self.most:
            raise BusyError("The server holds too many other requests.", hint="Ask again later.")
        self.bytes += count

    def give_back(self, count: int) -> None:
        """Count bytes that are gone."""
        self.bytes -= count

    @contextmanager
    def holding(self, count: int) -> Iterator[None]:
        """Count bytes while they are used."""
        self.take(count)
        try:
            yield
        finally:
            self.give_back(count)


@dataclass
class Engine:
    """Answer requests; `seconds` bounds the time of each, `held` the memory of all."""

    models: Models
    metrics: Metrics = field(default_factory=Metrics)
    seconds: float = 30.0
    held: Held = field(default_factory=lambda: Held(1 << 29))

    def __post_init__(self) -> None:
        self.models.on_load = self.metrics.watch

    async def infer(
        self, protocol: str, name: str, number: str | None, feeds: Arrays, wanted: Sequence[str] = ()
    ) -> Answer:
        """Run a model. Raises NotFoundError, BusyError, LateError, InputError; all else is the server's fault."""
        started, code = time.perf_counter(), "error"
        try:
            async with self.models.use(name, number) as version:
                try:
                    outputs = await asyncio.wait_for(self._outputs(version, name, feeds), self.seconds)
                except TimeoutError as error:
                    raise LateError(f"No answer within {self.seconds:g} seconds.") from error
                if unknown := [n for n in wanted if n not in outputs]:
                    raise NotFoundError(f"The model has no output {unknown[0]!r:.80}.")
                code = "ok"
                return Answer(name, version.number, {n: outputs[n] for n in wanted} if wanted else outputs)
        except DeployPruneError as error:
            code = type(error).__name__.removesuffix("Error").lower()
            raise
        finally:
            known = name if name.removesuffix(ANSWERS) in self.models.entries else "unknown"
            self.metrics.count(protocol, known, code, time.perf_counter() - started)

    async def _outputs(self, version: Version, name: str, feeds: Arrays) -> Arrays:
        if not feeds:
            raise InputError("The request has no inputs.")
        if name.endswith(ANSWERS):
            return version.write_answers(await version.answer(version.read_given(feeds)))
        for key, array in feeds.items():
            check_finite(key, array)
        return await version.infer(feeds)

    def metadata(self, name: str, number: str | None) -> dict[str, Any]:
        """Return the protocol's metadata of a model."""
        version = self.models.get(name, number)
        answering = name.endswith(ANSWERS)
        entry = self.models.entries[name.removesuffix(ANSWERS)]
        return {
            "name": name,
            "versions": [str(n) for n in sorted(entry.versions)],
            "platform": f"deploy_prune_{version.predictor.runner.provider if version.predictor.runner else ''}",
            "inputs": version.answer_inputs() if answering else version.inputs(),
            "outputs": version.answer_outputs() if answering else version.outputs(),
        }

    def ready(self, name: str, number: str | None) -> bool:
        """Say whether a model answers. Raises NotFoundError for an unknown one."""
        try:
            self.models.get(name, number)
        except NotFoundError:
            raise
        except DeployPruneError:
            return False
        return True

    async def load(self, name: str, parameters: Mapping[str, Any] | None) -> Version:
        """Load the newest version of a model, or go (back) to the one that the parameters name.

        Raises NotFoundError, InputError for what is no version, and UnopenedError for a bundle that cannot be opened.
        """
        number = (parameters or {}).get("version")
        if number is not None and not re.fullmatch("[0-9]{1,18}", str(number)):
            raise InputError(f"{number!r:.40} is no version.", hint="Give a number.")
        try:
            return await self.models.load(name, None if number is None else int(number))
        except (NotFoundError, BusyError):
            raise
        except DeployPruneError as error:
            log.error("not loaded", extra={"model": name, "reason": str(error)})
            raise UnopenedError(f"{name} cannot be loaded: the server's log says why.") from error

    def index(self) -> list[dict[str, str]]:
        """Return every version of every model and its state, as the protocol's repository index has them."""
        found = []
        for name, entry in self.models.entries.items():
            for number in sorted(entry.versions):
                state = "READY" if number == entry.default else "AVAILABLE"
                found.append({"name": name, "version": str(number), "state": state, "reason": ""})
            if not entry.versions:
                found.append({"name": name, "version": "", "state": "UNAVAILABLE", "reason": "not loaded"})
        return found
