"""A bounded queue before a model that puts waiting requests into one run: dynamic batching."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from .errors import BusyError

Arrays = dict[str, np.ndarray]
WASTE = 0.25  # of a batch's tokens may be padding that no request brought


@dataclass(frozen=True)
class Merging:
    """Say how requests become one batch: texts are padded to the longest, `pads` giving each input's filler.

    Without `pads` (images) only requests of one shape share a run. `per_token` names outputs (B, T, ...) that are cut
    to their own length again.
    """

    pads: Mapping[str, int] | None = None
    per_token: frozenset[str] = frozenset()


@dataclass
class Request:
    """Hold one request: inputs (rows, ...) by name, and the future of its outputs."""

    feeds: Arrays
    rows: int
    done: asyncio.Future[Arrays]
    since: float = field(default_factory=time.monotonic)

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the shape of the inputs behind their rows."""
        return next(iter(self.feeds.values())).shape[1:]


class Batcher:
    """Run requests in the order they came, as many together as fit; one run at a time.

    While a run is busy others queue up, and go together next; `wait` seconds more are waited for company when the
    model is idle. More than `queue_rows` waiting rows are refused with BusyError.
    """

    def __init__(
        self,
        run: Callable[[Arrays], Arrays],
        merging: Merging,
        *,
        most_rows: int = 32,
        queue_rows: int = 256,
        wait: float = 0.0,
        on_run: Callable[[int, float], None] = lambda rows, seconds: None,
    ) -> None:
        self.run, self.merging, self.on_run = run, merging, on_run
        self.most_rows, self.queue_rows, self.wait = most_rows, queue_rows, wait
        self.waiting: deque[Request] = deque()
        self.closing = False
        self._wake = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="model")
        self._task = asyncio.get_running_loop().create_task(self._work())

    @property
    def rows(self) -> int:
        """Return how many rows wait."""
        return sum(r.rows for r in self.waiting)

    async def infer(self, feeds: Arrays) -> Arrays:
        """Return the outputs (rows, ...) of inputs (rows, ...). Raises BusyError, or what the model raises."""
        rows = len(next(iter(feeds.values())))
        if self.closing:
            raise BusyError("The model is being unloaded.", hint="Ask again.")
        if self.rows + rows > self.queue_rows and self.waiting:
            raise BusyError(f"{self.rows} rows are waiting already.", hint="Ask again later.")
        request = Request(feeds, rows, asyncio.get_running_loop().create_future())
        self.waiting.append(request)
        self._wake.set()
        try:
            return await request.done
        finally:
            request.done.cancel()  # of a caller that went away; does nothing to one that is answered

    async def close(self) -> None:
        """Answer what waits, take nothing more, and end."""
        self.closing = True
        self._wake.set()
        await self._task
        self._thread.shutdown()

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            while self.waiting and self.waiting[0].done.cancelled():
                self.waiting.popleft()
            if not self.waiting:
                if self.closing:
                    return
                self._wake.clear()
                await self._wake.wait()
                continue
            await self._company()
            batch = self._next()
            if not batch:
                continue
            started = time.perf_counter()
            answers = await loop.run_in_executor(self._thread, self._answers, batch)
            self.on_run(sum(r.rows for r in batch), time.perf_counter() - started)
            for request, answer in zip(batch, answers, strict=True):
                if request.done.done():
                    continue
                if isinstance(answer, Exception):
                    request.done.set_exception(answer)
                else:
                    request.done.set_result(answer)

    async def _company(self) -> None:
        """Wait until the first request has waited long enough, or a whole batch is there."""
        until = self.waiting[0].since + self.wait
        while not self.closing and self.rows < self.most_rows and (left := until - time.monotonic()) > 0:
            self._wake.clear()
            try:
                await asyncio.wait_for(self._wake.wait(), left)
            except TimeoutError:
                return

    def _next(self) -> list[Request]:
        """Take the first request, and those behind it that fit beside it."""
        batch: list[Request] = []
        rest: deque[Request] = deque()
        for request in self.waiting:
            if request.done.cancelled():
                continue
            if not batch or self._fits(batch, request):
                batch.append(request)
            else:
                rest.append(request)
        self.waiting = rest
        return batch

    def _fits(self, batch: Sequence[Request], request: Request) -> bool:
        rows = sum(r.rows for r in batch) + request.rows
        if rows > self.most_rows:
            return False
        if self.merging.pads is None:
            return request.shape == batch[0].shape
        longest = max(r.shape[0] for r in (*batch, request))
        real = sum(r.rows * r.shape[0] for r in (*batch, request))
        return rows * longest <= (1 + WASTE) * real

    def _answers(self, batch: Sequence[Request]) -> list[Arrays | Exception]:
        """Run a batch; where that fails, each request alone, so that one does not spoil the others."""
        try:
            return [*self._together(batch)]
        except Exception as error:
            if len(batch) == 1:
                return [error]
        return [answer for request in batch for answer in self._answers([request])]

    def _together(self, batch: Sequence[Request]) -> list[Arrays]:
        """Run a batch and return each request's outputs."""
        if len(batch) == 1:
            return [self.run(batch[0].feeds)]
        longest = max(r.shape[0] for r in batch) if self.merging.pads is not None else 0
        feeds = {
            name: np.concatenate([self._padded(name, r.feeds[name], longest) for r in batch]) for name in batch[0].feeds
        }
        outputs, found, at = self.run(feeds), [], 0
        for r in batch:
            own = {name: array[at : at + r.rows] for name, array in outputs.items()}
            found.append({n: a[:, : r.shape[0]] if n in self.merging.per_token else a for n, a in own.items()})
            at += r.rows
        return found

    def _padded(self, name: str, array: np.ndarray, longest: int) -> np.ndarray:
        if self.merging.pads is None or array.shape[1] == longest:
            return array
        filler = self.merging.pads.get(name, 0)
        return np.pad(array, ((0, 0), (0, longest - array.shape[1])), constant_values=filler)
