"""Hand a sweep's jobs to Ray, take what they tell, and measure; what is lost is handed over again."""

from __future__ import annotations

import socket
import time
from collections import Counter, deque
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..disk import code_hash
from ..progress import Progress, Reporter
from .cells import Cell, Job, digest, expand, files_name, job_spec, jobs_of
from .cluster import WAIT_MINUTES, Patience, alive_ids, bench_options, gone
from .settings import SweepSettings
from .store import Store

if TYPE_CHECKING:
    from ray import ObjectRef, ObjectRefGenerator

POLL_SECONDS = 1.0
AHEAD = 1  # events that the driver has not read: more, and it could not tell in which cell a worker was lost


@dataclass
class Running:
    """Hold a job at work: which of its cells are still to come, when it was handed over, and the node that took it."""

    job: Job
    left: dict[int, Cell]
    since: float
    loaded: bool = False
    node: str | None = None


@dataclass(frozen=True)
class Bench:
    """Name a measurement to be made: of a cell's model, in a runtime, on a label's node or this machine."""

    number: int
    runtime: str
    place: str | None


@dataclass
class Driver:
    """Hand out jobs and measurements, and hold what comes back; it alone writes to the sweep's folder."""

    settings: SweepSettings
    store: Store
    workers: int
    reporter: Reporter
    wait_minutes: float = WAIT_MINUTES
    results: dict[int, dict[str, Any]] = field(default_factory=dict)  # by cell: key and result, or reason
    benches: dict[Bench, dict[str, Any]] = field(default_factory=dict)
    restarts: int = 0
    reused: int = 0

    def __post_init__(self) -> None:
        s = self.settings
        self.patience = Patience(s.threads, s.device, self.wait_minutes, self.reporter)
        self.cells = expand(self.settings)
        self.jobs = jobs_of(self.cells)
        self.known, self.measured = self.store.results("cells"), self.store.results("bench")
        self.code = code_hash()
        self.queue = deque(self.jobs)
        self.running: dict[ObjectRefGenerator, Running] = {}
        self.waiting: dict[str | None, deque[Bench]] = {place: deque() for place in self.settings.places}
        self.measuring: dict[ObjectRef, Bench] = {}
        self.crashes: Counter[Any] = Counter()
        self.cell_seconds = self.job_seconds = 0.0
        self.ended = 0.0
        self._dense: tuple[str, Any] = ("", None)

    def run(self) -> None:
        """Go on until every cell has a result or a reason. Raises SystemStateError where no node is left for jobs."""
        import ray

        with ExitStack() as stack:
            stack.callback(self._cancel)
            cells = stack.enter_context(self.reporter.stage("cells"))
            bench = stack.enter_context(self.reporter.stage("bench")) if self.settings.bench_runtimes else _nowhere
            while True:
                self._hand_out()
                handles = [*self.running, *self.measuring]
                if not handles:
                    break
                ready, _ = ray.wait(handles, num_returns=1, timeout=POLL_SECONDS)
                for handle in ready:
                    self._take(handle)
                self._leave_lost_jobs()
                self._show(cells, bench)
                self.patience.look(len(self.queue) + len(self.running))
        if self.settings.bench_runtimes and not any("reason" in found for found in self.benches.values()):
            self.store.drop_models()

    def _cancel(self) -> None:
        """Take back what is at work, or waits for a node: after an error nobody would read it."""
        import ray
        from ray.exceptions import RayError

        for handle in [*self.running, *self.measuring]:
            with suppress(RayError):
                ray.cancel(handle, force=True)

    def _show(self, cells: Progress, bench: Progress) -> None:
        cells(len(self.results) / len(self.cells))
        total = len(self.cells) * len(self.settings.bench_runtimes) * len(self.settings.places)
        bench(len(self.benches) / total if total else 1.0)

    # Pruning.

    def _hand_out(self) -> None:
        """Start what there is room for: jobs on free workers, one measurement on each quiet node."""
        import ray

        from .job import run_job

        while self.queue and len(self.running) < self.workers:
            job = self.queue.popleft()
            models = self.store.models()
            known = [key for key, result in self.known.items() if self._complete(key, result, models)]
            spec = job_spec(job, self.settings, known, models, self.code)
            task = ray.remote(run_job).options(
                num_cpus=self.settings.threads,
                num_gpus=1 if self.settings.device == "cuda" else 0,
                num_returns="streaming",
                max_retries=0,  # a retry of ours begins behind the cells that are kept
                _generator_backpressure_num_objects=AHEAD,
            )
            left = {cell.number: cell for cell in job.cells}
            self.running[task.remote(spec)] = Running(job, left, time.perf_counter())
        self._leave_lost_nodes()
        busy = {bench.place for bench in self.measuring.values()}
        for place, waiting in self.waiting.items():
            if place in busy or (place is None and (self.queue or self.running)):
                continue
            while waiting:
                bench = waiting.popleft()
                key = self._bench_key(self.results[bench.number]["key"], bench)
                if key not in self.measured:
                    self._measure(bench)
                    break
                self.benches[bench] = self.measured[key]  # of another entry's equal model, measured since

    def _take(self, handle: Any) -> None:
        """Take one event of a job, or the end of a measurement."""
        import ray
        from ray.exceptions import RayError, RayTaskError

        if handle in self.measuring:
            bench = self.measuring.pop(handle)
            try:
                self._measured(bench, ray.get(handle))
            except RayError as error:
                self._measured(bench, {"reason": f"The measurement's process was lost: {_first_line(error)}"})
            return
        run = self.running[handle]
        try:
            self._event(run, ray.get(next(handle)))
        except StopIteration:
            self._end(handle)
        except RayTaskError as error:  # not of ours: the node could not even begin
            self._end(handle)
            self._give_up(run, _first_line(error.cause or error))
        except RayError as error:
            self._end(handle)
            self._crashed(run, error)

    def _end(self, handle: Any) -> None:
        self.ended = time.perf_counter()
        self.job_seconds += self.ended - self.running.pop(handle).since

    def _event(self, run: Running, event: dict[str, Any]) -> None:
        match event["event"]:
            case "begun":
                run.node = event["node"]
            case "loaded":
                run.loaded = True
            case "refused":
                self._give_up(run, event["reason"])
            case "failed":
                self._done(run, event["number"], {"reason": event["reason"]})
            case "known":
                self.reused += 1
                self._done(run, event["number"], {"key": event["key"], "result": self.known[event["key"]]})
            case "cell":
                key, result = event["key"], event["result"]
                if "files" in event:
                    result["dense_model"] = event["dense"]
                    if "dense_files" in event:
                        self.store.keep_model(files_name(event["dense"], self.settings), event["dense_files"])
                    self.store.keep_model(files_name(key, self.settings), event["files"])
                self.store.keep("cells", key, result)
                self.cell_seconds += result["seconds"]
                self._done(run, event["number"], {"key": key, "result": result})

    def _done(self, run: Running, number: int, found: dict[str, Any]) -> None:
        self.results[number] = found
        cell = run.left.pop(number)
        if "reason" in found:
            self.reporter.note(f"Failed: {self.describe(cell)}: {found['reason']}")
            return
        for bench in self._benches_of(number):
            if (known := self.measured.get(self._bench_key(found["key"], bench))) is not None:
                self.benches[bench] = known
            else:
                self.waiting[bench.place].append(bench)

    def _give_up(self, run: Running, reason: str) -> None:
        for number in list(run.left):
            self._done(run, number, {"reason": reason})

    def _crashed(self, run: Running, error: Exception) -> None:
        """Hand over again what a lost worker left, without the cell that has cost too many workers."""
        at = next(iter(run.left.values())) if run.loaded and run.left else None
        charged = at or (run.job.entry, run.job.seed)  # a cell, or what is loaded before the first
        self.crashes[charged] += 1
        self.restarts += 1
        lost = f"its worker was lost {self.crashes[charged]} time(s): {_first_line(error)}"
        if self.crashes[charged] > self.settings.max_retries:
            if at is None:
                self._give_up(run, lost)
            else:
                self._done(run, at.number, {"reason": lost})
        if run.left:
            entry = self.settings.entries[run.job.entry]
            self.reporter.note(f"A worker was lost; {len(run.left)} cells of {entry.label} are handed over again.")
            self.queue.appendleft(Job(run.job.entry, run.job.seed, tuple(run.left.values())))

    def _leave_lost_jobs(self) -> None:
        """Hand over again the jobs of nodes that are gone: of one that was cut off Ray itself says so much later."""
        import ray

        there = alive_ids()
        for handle, run in list(self.running.items()):
            if run.node is None or run.node in there or ray.wait([handle], timeout=0)[0]:
                continue  # or it has still told something
            ray.cancel(handle, force=True)
            self._end(handle)
            self._crashed(run, ConnectionError("its node has left the Ray cluster"))

    # Measuring.

    def _bench_key(self, key: str, bench: Bench) -> str:
        s = self.settings
        where = bench.place or socket.gethostname()
        return digest([key, bench.runtime, where, s.bench_batch, s.bench_seq, s.bench_threads, s.bench_seconds])

    def _complete(self, key: str, result: dict[str, Any], models: set[str]) -> bool:
        """Say whether a cell's result is all that is needed of it: what is to be measured needs its models too."""
        if all(self._bench_key(key, bench) in self.measured for bench in self._benches_of(0)):
            return True
        return {files_name(of, self.settings) for of in (key, result.get("dense_model", ""))} <= models

    def _measure(self, bench: Bench) -> None:
        import ray

        from .bench import measure

        found = self.results[bench.number]
        dense = found["result"]["dense_model"]
        if self._dense[0] != dense:
            self._dense = dense, ray.put(self.store.model(files_name(dense, self.settings)))
        spec = {
            "settings": self.settings.model_dump(mode="json"),
            "runtime": bench.runtime,
            "seq_len": found["result"]["seq_len"],
        }
        options = bench_options(bench.place)
        task = ray.remote(measure).options(max_retries=self.settings.max_retries, **options)
        sliced = self.store.model(files_name(found["key"], self.settings))
        self.measuring[task.remote(spec, sliced, self._dense[1])] = bench

    def _leave_lost_nodes(self) -> None:
        """Give up the measurements for labels whose nodes are gone."""
        import ray

        for place in gone(self.settings.bench_on):
            reason = {"reason": f"No node of the Ray cluster has the label '{place}' any more."}
            for task in [task for task, bench in self.measuring.items() if bench.place == place]:
                ray.cancel(task, force=True)
                self._measured(self.measuring.pop(task), reason)
            while self.waiting[place]:
                self._measured(self.waiting[place].popleft(), reason)

    def _measured(self, bench: Bench, found: dict[str, Any]) -> None:
        self.benches[bench] = found
        if "reason" in found:
            self.reporter.note(f"Not measured: {self.describe(self.cells[bench.number])}: {found['reason']}")
            return
        key = self.results[bench.number]["key"]
        self.measured[self._bench_key(key, bench)] = found
        self.store.keep("bench", self._bench_key(key, bench), found)
        if all("reason" not in self.benches.get(b, {"reason": ""}) for b in self._benches_of(bench.number)):
            self.store.drop_models(files_name(key, self.settings))

    def _benches_of(self, number: int) -> list[Bench]:
        return [Bench(number, r, place) for r in self.settings.bench_runtimes for place in self.settings.places]

    # What came of it.

    def describe(self, cell: Cell) -> str:
        """Name a cell in one line."""
        entry = self.settings.entries[cell.entry]
        return f"{entry.label}, keep {cell.keep:g}, seed {cell.seed}, {cell.criterion}, {cell.compensate}"

    def rows(self) -> list[dict[str, Any]]:
        """Return one row a cell, or one for each of its measurements, in the order of the cells."""
        found = []
        done = [(cell.entry, self.results[cell.number].get("result")) for cell in self.cells]
        tasks = {entry: result["task"] for entry, result in done if result}  # also those that were inferred
        for cell in self.cells:
            entry = self.settings.entries[cell.entry]
            row: dict[str, Any] = {
                "model": entry.label,
                "task": tasks.get(cell.entry, entry.task),
                "budget": self.settings.budget,
                "keep": cell.keep,
                "seed": cell.seed,
                "criterion": cell.criterion,
                "compensate": cell.compensate,
                "threads": self.settings.threads,
                "key": self.results[cell.number].get("key"),
                "reason": self.results[cell.number].get("reason"),
                **self.results[cell.number].get("result", {}),
            }
            benches = self._benches_of(cell.number)
            found += [row | self._measurement(bench) for bench in benches] if benches else [row]
        return [row | {"status": "done" if row["reason"] is None else "failed"} for row in found]

    def _measurement(self, bench: Bench) -> dict[str, Any]:
        where = {"runtime": bench.runtime, "bench_on": bench.place or "this machine"}
        return where | self.benches.get(bench, {})

    def account(self, started: float) -> dict[str, Any]:
        """Return what the sweep took: the overhead is the workers' time beyond the sum of the cells."""
        workers = min(self.workers, len(self.jobs))
        wall = (self.ended or time.perf_counter()) - started
        computed = self.cell_seconds > 0
        return {
            "cells": len(self.cells),
            "reused": self.reused,
            "restarts": self.restarts,
            "workers": workers,
            "wall_seconds": wall,
            "cell_seconds": self.cell_seconds,
            "job_seconds": self.job_seconds,
            "overhead": workers * wall / self.cell_seconds - 1 if computed else None,
        }


def _nowhere(share: float) -> None:
    pass


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
