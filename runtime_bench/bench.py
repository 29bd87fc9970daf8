"""Measure models side by side: in each cell (runtime, shape, threads) one process a model, driven in turns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from ..bundle import PRECISIONS, VARIANTS, Bundle
from ..config import BenchSettings
from ..errors import InputError, MissingExtraError, SystemStateError
from ..progress import Progress
from ..runtimes import available_runtimes, onnx_runtimes
from .isolate import TIMEOUT_SECONDS, Worker, WorkerError
from .machine import default_threads, describe_machine
from .results import BASELINE, SCHEMA_VERSION, raw_runs, store_result
from .scenarios import check_scenarios
from .sensors import describe_gpus
from .stats import noise_floor, ratio_of_medians, summarise_ms, tell_difference
from .subjects import Subject, bundle_subjects, distinct_names, file_length, file_subject
from .timing import Samples, take_turns

CONTROL = "/control"  # the second process of the baseline, from which the noise floor is read; no file is so named
SCENARIO_TIMES = 3  # a scenario may take so many times its seconds: loadgen sizes its queries by an estimate
_CELL = "deploy_prune.runtime_bench.cells:Cell"


@dataclass(frozen=True)
class Place:
    """Say where models are compared: a cell of the matrix."""

    runtime: str
    batch: int
    seq: int
    threads: int


@dataclass
class Timed:
    """Hold what a cell gave: per model its samples and description, and what failed."""

    samples: dict[str, Samples]
    described: dict[str, dict[str, Any]]
    failures: dict[str, WorkerError]
    gpus: list[dict[str, Any]] = field(default_factory=list)  # right after the turns: their clocks at work


def bench_bundle(
    bundle: Bundle, settings: BenchSettings | None = None, progress: Progress = lambda share: None
) -> dict[str, Any]:
    """Measure a committed bundle's models and store the result as bench/*.json and *.npz; the caller commits.

    Lengths default to the budget's. The result replaces an older one of the same settings; where nothing could be
    measured the bundle stays as it was. Raises InputError for an unknown runtime or model.
    """
    settings = _at_length(settings or BenchSettings(), bundle)
    subjects = bundle_subjects(bundle, settings.models or (*VARIANTS, *_lower_precisions(bundle)))
    result, samples = bench(subjects, settings, progress, leave_out=None if settings.models else without_file)
    if result["measurements"]:
        store_result(bundle, result, samples)
    return result


def bench_paths(
    paths: Sequence[Path], settings: BenchSettings, progress: Progress = lambda share: None
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Measure several bundles, or any ONNX files, against the first of them; return what `bench` returns.

    The length is that of the first bundle's budget, or 128 tokens for files that take texts. Raises InputError for
    bundles and files together.
    """
    files = [path for path in paths if path.suffix == ".onnx"]
    if files and len(files) < len(paths):
        raise InputError("Bundles and ONNX files cannot be compared.", hint="Name the ONNX files inside the bundles.")
    names = distinct_names([str(path) for path in paths])
    if files:
        if settings.models:
            raise InputError("An ONNX file has no variants.", hint="Leave --models out.")
        subjects = [file_subject(name, path) for name, path in zip(names, files, strict=True)]
        if not settings.seqs:
            settings = settings.model_copy(update={"seqs": (max(map(file_length, files)),)})
        if settings.runtimes == BenchSettings().runtimes:
            settings = settings.model_copy(update={"runtimes": ("ort-cpu",)})
    else:
        bundles = [Bundle.open(path) for path in paths]
        settings = _at_length(settings, bundles[0])
        models = settings.models or ("sliced",)
        subjects = [s for b, name in zip(bundles, names, strict=True) for s in bundle_subjects(b, models, f"{name}/")]
    return bench(subjects, settings, progress)


def _at_length(settings: BenchSettings, bundle: Bundle) -> BenchSettings:
    if settings.seqs:
        return settings
    return settings.model_copy(update={"seqs": (int(bundle.manifest.budget["seq_len"]),)})


def _lower_precisions(bundle: Bundle) -> list[str]:
    """Return the sliced model in every lower precision that the bundle has a file of."""
    found = {a.precision for a in bundle.manifest.artifacts if a.variant == "sliced" and a.shape is None}
    return [f"sliced:{precision}" for precision in PRECISIONS if precision in found and precision != "fp32"]


def without_file(subject: Subject, runtime: str) -> bool:
    """Say whether a runtime has no file of a lower precision (in fp32 that is a failure, to be shown)."""
    if subject.precision in (None, "fp32"):
        return False
    try:
        subject.open(runtime, None)
    except InputError:
        return True
    except (SystemStateError, MissingExtraError):  # a machine without it: a failure like those in fp32
        return False
    return False


def bench(
    subjects: Sequence[Subject],
    settings: BenchSettings,
    progress: Progress = lambda share: None,
    leave_out: Callable[[Subject, str], bool] | None = None,
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Measure models in every cell of the matrix; return the result and the raw samples by name.

    The baseline of all ratios is a bundle's model named "dense", or the first. The turns of a cell take
    `settings.seconds`, or `min_rounds` rounds if those take longer. What fails is listed under "failures" and
    stops nothing else; `leave_out` says of a model and a runtime that nobody asked for the two together. Raises
    InputError for an unknown runtime, or two models of one name.
    """
    _check(subjects, settings)
    names = [s.name for s in subjects]
    baseline = BASELINE if BASELINE in names and subjects[0].variant is not None else names[0]
    threads = settings.threads or (default_threads(),)
    result: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "created": datetime.now(UTC).isoformat(),
        "settings": settings.model_dump(mode="json") | {"threads": list(threads), "models": names},
        "baseline": baseline,
        "machine": describe_machine(max(threads)),
        "measurements": [],
        "noise": [],
        "failures": [],
    }
    arrays: dict[str, np.ndarray] = {}
    places = [Place(*cell) for cell in product(settings.runtimes, settings.batches, settings.seqs, threads)]
    for number, place in enumerate(places):
        progress(number / len(places))
        cast = [s for s in subjects if leave_out is None or not leave_out(s, place.runtime)]
        if settings.control is not False:
            first = next(s for s in subjects if s.name == baseline)
            cast.append(replace(first, name=CONTROL))
        timed = time_subjects(cast, place, settings)
        where = asdict(place)
        for name, error in timed.failures.items():
            if name != CONTROL:
                result["failures"].append({**where, "model": name, **error.to_dict()})
        noise = _noise(timed, baseline)
        result["noise"].append({**where, **noise, "gpus": timed.gpus})
        for subject in (s for s in subjects if s.name in timed.samples):
            what: dict[str, Any] = {"model": subject.name, "variant": subject.variant, "precision": subject.precision}
            what["flops"] = subject.flops(place.batch, place.seq)
            line = _measurement(timed, subject.name, baseline, place.batch, noise["floor"])
            result["measurements"].append({**where, **what, **line})
        arrays |= raw_runs(timed.samples, where)
    return result, arrays


def time_subjects(subjects: Sequence[Subject], place: Place, settings: BenchSettings) -> Timed:
    """Open each model in a process of its own and run them in turns."""
    timed = Timed({}, {}, {})
    with ExitStack() as stack:
        workers = {}
        for subject in subjects:  # all start at once
            arguments = {"subject": subject.to_dict(), **asdict(place)}
            workers[subject.name] = stack.enter_context(Worker(_CELL, arguments))
        for name in list(workers):
            try:
                timed.described[name] = workers[name].call("describe")
            except WorkerError as error:
                timed.failures[name] = error
                workers.pop(name).close()
        while workers:
            turns = {name: _Turns(name, worker) for name, worker in workers.items()}
            try:
                timed.samples = take_turns(
                    turns,
                    min_rounds=settings.min_rounds,
                    max_seconds=settings.seconds,
                    warmup_seconds=settings.warmup_seconds,
                )
                timed.gpus = describe_gpus()
                break
            except _TurnError as failed:  # this model alone has failed; the others begin anew
                timed.failures[failed.name] = failed.error
                workers.pop(failed.name).close()
        for name, turn in (turns if workers else {}).items():
            timed.described[name] |= turn.sensed()
            if name != CONTROL:
                timed.described[name]["scenarios"] = found = {}
                within = TIMEOUT_SECONDS + SCENARIO_TIMES * settings.seconds
                for scenario in settings.scenarios:
                    try:
                        found[scenario] = workers[name].call(
                            "scenario", within=within, name=scenario, seconds=settings.seconds
                        )
                    except WorkerError as error:
                        timed.failures[name] = error
                        break
    return timed


class _TurnError(Exception):
    def __init__(self, name: str, error: WorkerError) -> None:
        super().__init__(name)
        self.name, self.error = name, error


class _Turns:
    """Take a worker's turns, and add up the energy that they used."""

    def __init__(self, name: str, worker: Worker) -> None:
        self.name, self.worker = name, worker
        self.runs = 0
        self.energy: dict[str, float | None] = {"cpu_joules": 0.0, "gpu_joules": 0.0}

    def __call__(self, runs: int) -> tuple[list[int], list[int], list[int]]:
        try:
            answer = self.worker.call("run", runs=runs)
        except WorkerError as error:
            raise _TurnError(self.name, error) from error
        self.runs += runs
        for sensor, total in self.energy.items():
            found = answer[sensor]
            self.energy[sensor] = None if total is None or found is None else total + found
        return answer["wall_ns"], answer["cpu_ns"], answer["device_ns"]

    def sensed(self) -> dict[str, float | None]:
        """Return the joules per run, those of the warm-up included; None for no sensor."""
        return {f"{name}_per_run": None if sum_ is None else sum_ / self.runs for name, sum_ in self.energy.items()}


def _noise(timed: Timed, baseline: str) -> dict[str, Any]:
    """Return the ratio of the baseline to itself in a second process, and how far from 1 it may be by chance."""
    if not {CONTROL, baseline} <= set(timed.samples):
        return {"ratio": None, "cpu_ratio": None, "floor": None}
    wall, cpu = (_ratio(timed, CONTROL, baseline, clock) for clock in ("wall", "cpu"))
    return {"ratio": wall, "cpu_ratio": cpu, "floor": None if wall is None else noise_floor(wall)}


def _measurement(timed: Timed, name: str, baseline: str, batch: int, floor: float | None) -> dict[str, Any]:
    own = timed.samples[name]
    latency = summarise_ms(own.flat())
    known = baseline in timed.samples
    ratio = _ratio(timed, name, baseline, "wall") if known else None
    return {
        "rounds": len(own.wall_ns),
        "runs": len(own.flat()),
        "latency_ms": latency,
        "cpu_ms": summarise_ms(own.flat("cpu")),
        "device_ms": summarise_ms(own.flat("device")) if own.device_ns else None,
        "rows_per_second": 1000 * batch / latency["mean"],
        "ratio": ratio,
        "cpu_ratio": _ratio(timed, name, baseline, "cpu") if known else None,
        "device_ratio": _ratio(timed, name, baseline, "device") if known else None,
        "difference": None if ratio is None or name == baseline else tell_difference(ratio, floor),
        **timed.described[name],
    }


def _ratio(timed: Timed, name: str, baseline: str, clock: str) -> dict[str, float] | None:
    own, base = timed.samples[name].rounds(clock), timed.samples[baseline].rounds(clock)
    if not own or not base or np.median(base) == 0:  # a clock that is not there, or too coarse for this model
        return None
    return ratio_of_medians(own, base).to_dict()


def _check(subjects: Sequence[Subject], settings: BenchSettings) -> None:
    for runtime in settings.runtimes:
        check_runtime(runtime, files=not all(s.variant for s in subjects))
    if settings.scenarios:
        check_scenarios(settings.scenarios)
    names = [s.name for s in subjects]
    if twice := [n for n in names if names.count(n) > 1]:
        raise InputError(f"Two models are called '{twice[0]}'.", hint="Name each once.")
    if not settings.seqs:
        raise InputError("No sequence length to measure at.", hint="Give --seq.")


def check_runtime(runtime: str, *, files: bool) -> None:
    """Raise InputError unless there is such a runtime, of those that read any ONNX file if `files`."""
    there = onnx_runtimes() if files else available_runtimes()
    if runtime not in there:
        raise InputError(f"No runtime '{runtime}'.", hint=f"There are: {', '.join(sorted(there))}.")
