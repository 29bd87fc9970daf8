"""Let a release pass or not: latency against a base in the same job, memory, bytes and quality. No torch.

Each session starts the base twice and the new model once, in fresh processes, and runs them in turns. A session
gives one log ratio of new to base, and one of the base to itself: the A/A control, by which the clock is chosen and
without which no verdict on time is given. `sequential` says when that is enough.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..bundle import Bundle
from ..config import BenchSettings, GateSettings
from ..errors import DeployPruneError, InputError, SystemStateError, VerdictError
from ..progress import Progress
from .bench import Place, Timed, check_runtime, time_subjects
from .machine import describe_machine
from .sequential import Estimate, Plan, estimate
from .subjects import FILE_LENGTH, Subject, bundle_subjects, file_length, file_subject

SCHEMA_VERSION = "1.0"
BASE, NEW, CONTROL = "base", "new", "control"
TRIM = 0.2  # of a session's rounds at either end
FRESH_SECONDS = 1.0  # of a session that its processes take to start, about
Clock = Literal["wall", "cpu"]
Outcome = Literal["passed", "failed", "too noisy"]


@dataclass(frozen=True)
class Session:
    """Hold what one session found: log ratios by clock, the new model's medians in ms, and peak memory."""

    new: dict[str, float]
    control: dict[str, float]
    new_ms: dict[str, float]
    base_ms: dict[str, float]
    peak_bytes: dict[str, int]


@dataclass
class Check:
    """Hold one thing that was checked: its limit, what was found, and the sentence that says so."""

    name: str
    outcome: Outcome
    found: float
    limit: float
    text: str
    details: dict[str, Any] = field(default_factory=dict)


class BrokenModelError(DeployPruneError):
    """The new model cannot be run where the base can."""


@dataclass
class Verdict:
    """Hold what a gate found; `outcome` is the worst of its checks."""

    checks: list[Check]
    sessions: list[Session]
    clock: Clock | None
    machine: dict[str, Any]
    place: dict[str, Any]
    models: dict[str, str | None]  # the paths of "new" and "base"
    seconds: float
    created: str

    @property
    def outcome(self) -> Outcome:
        order: tuple[Outcome, ...] = ("failed", "too noisy", "passed")
        return next(o for o in order if o == "passed" or any(c.outcome == o for c in self.checks))

    def to_dict(self) -> dict[str, Any]:
        return {"schema_version": SCHEMA_VERSION, "outcome": self.outcome, **asdict(self)}

    def check(self) -> None:
        """Raise VerdictError when a check failed, SystemStateError when the machine was too noisy to tell."""
        bad = [c.text for c in self.checks if c.outcome == self.outcome]
        if self.outcome == "failed":
            timed = any(c.name in ("slowdown", "latency") for c in self.checks if c.outcome == "failed")
            raise VerdictError(" ".join(bad), hint="bench and the report say more of its times." if timed else "")
        if self.outcome == "too noisy":
            raise SystemStateError(
                " ".join(bad), hint="Use a quieter machine, more --max-seconds, or allow a coarser --resolution."
            )


def judge(
    new: Subject,
    base: Subject | None,
    settings: GateSettings,
    place: Place,
    *,
    plan: Plan | None = None,
    measure: Callable[[float], Session] | None = None,
    progress: Progress = lambda share: None,
) -> Verdict:
    """Measure the new model beside the base in sessions until every limit on time is decided.

    `measure` takes one session of so many seconds (for replays). A new model that cannot be run is a check that
    failed. Raises InputError without a base where a ratio is limited, SystemStateError when the base cannot be run.
    """
    plan, begun = plan or Plan(), time.monotonic()
    machine = describe_machine(place.threads)  # before the gate's own load
    if base is None and settings.max_memory is not None:
        raise InputError("--max-memory compares with a base.", hint="Give --base.")
    measure = measure or (lambda seconds: measure_session(new, base, place, seconds))
    limits: dict[str, float] = {}
    if base is not None and settings.max_slowdown is not None:
        limits["slowdown"] = settings.max_slowdown
    if settings.max_latency_ms is not None:
        limits["latency"] = settings.max_latency_ms
    sessions: list[Session] = []
    clock: Clock | None = None
    found: dict[str, tuple[Estimate, int]] = {}  # with the number of sessions behind it

    def verdict(checks: list[Check]) -> Verdict:
        return Verdict(
            checks=checks,
            sessions=sessions,
            clock=clock,
            machine=machine,
            place=asdict(place),
            models={NEW: new.path, BASE: None if base is None else base.path},
            seconds=time.monotonic() - begun,
            created=datetime.now(UTC).isoformat(),
        )

    for look in plan.looks if limits or settings.max_memory is not None else ():
        while len(sessions) < look and (left := settings.max_seconds - (time.monotonic() - begun)) > 0:
            try:
                sessions.append(measure(max(left / (plan.sessions - len(sessions)) - FRESH_SECONDS, 0.5)))
            except BrokenModelError as error:
                return verdict([Check("runs", "failed", 0.0, 1.0, error.message)])
            progress(len(sessions) / plan.sessions)
        if len(sessions) < 2:
            raise SystemStateError(
                f"{settings.max_seconds:g} s are not enough for two sessions.", hint="Give more --max-seconds."
            )
        if base is not None and clock is None:
            clock = choose_clock(sessions, settings.clock)
        for name, limit in limits.items():
            if name not in found or found[name][0].decide(limit) is None:
                found[name] = estimate(log_ratios(name, sessions, clock), limit, plan), len(sessions)
        if len(sessions) < look or all(found[name][0].decide(limit) for name, limit in limits.items()):
            break
    clocks: dict[str, Clock | None] = {"slowdown": clock, "latency": "wall"}
    checks = [
        time_check(name, *found[name], limit, clocks[name], settings.resolution) for name, limit in limits.items()
    ]
    if "slowdown" in limits and (doubt := doubts(sessions, clock, limits["slowdown"], plan)):
        checks[0] = replace(checks[0], outcome="too noisy", text=f"{doubt} {checks[0].text}")
    if settings.max_memory is not None:
        checks.append(_memory(sessions, settings.max_memory))
    return verdict(checks)


def measure_session(new: Subject, base: Subject | None, place: Place, seconds: float) -> Session:
    """Run the base twice and the new model once in fresh processes, in turns for so many seconds."""
    cast = [replace(new, name=NEW)]
    if base is not None:
        cast += [replace(base, name=name) for name in (BASE, CONTROL)]
    random.shuffle(cast)  # which process starts first shall not always favour the same model
    timed = time_subjects(cast, place, BenchSettings(seconds=seconds, warmup_seconds=1.0, min_rounds=4))
    for name in (BASE, CONTROL, NEW):  # what the base cannot do either is no fault of the new model
        if (failure := timed.failures.get(name)) is None:
            continue
        if name == NEW:
            raise BrokenModelError(f"The new model cannot be run: {failure.message}")
        raise SystemStateError(f"The base model cannot be run: {failure.message}")
    return read_session(timed)


def read_session(timed: Timed) -> Session:
    """Turn a session's samples into one log ratio a clock: the trimmed mean over its rounds."""
    names = [n for n in (BASE, CONTROL) if n in timed.samples]
    new, control, medians = {}, {}, {}
    for clock in ("wall", "cpu"):
        rounds = {n: np.maximum(timed.samples[n].rounds(clock), 1.0) for n in (NEW, *names)}
        medians[clock] = {n: float(np.median(r)) / 1e6 for n, r in rounds.items()}
        if names:
            logs = {n: np.log(r) for n, r in rounds.items()}
            new[clock] = trimmed_mean(logs[NEW] - (logs[BASE] + logs[CONTROL]) / 2)
            control[clock] = trimmed_mean(logs[CONTROL] - logs[BASE])
    return Session(
        new=new,
        control=control,
        new_ms={c: m[NEW] for c, m in medians.items()},
        base_ms={c: m[BASE] for c, m in medians.items() if names},
        peak_bytes={n: timed.described[n]["peak_rss_bytes"] for n in (NEW, *names)},
    )


def trimmed_mean(values: np.ndarray) -> float:
    from scipy.stats import trim_mean

    return float(trim_mean(values, TRIM))


def choose_clock(sessions: Sequence[Session], asked: Literal["auto", "wall", "cpu"]) -> Clock:
    """Return the clock by which the base agrees best with itself; the new model's times do not count in this."""
    if asked != "auto":
        return asked
    spread = {clock: float(np.std([s.control[clock] for s in sessions])) for clock in ("wall", "cpu")}
    coarse = any(s.base_ms["cpu"] < 0.01 for s in sessions)  # the clock ticks too slowly for this model
    return "wall" if coarse or spread["wall"] <= spread["cpu"] else "cpu"


def doubts(sessions: Sequence[Session], clock: Clock | None, limit: float, plan: Plan) -> str:
    """Say by how much the base surely differs from itself, if by more than the limit; else ""."""
    if clock is None:
        return ""
    limit = max(limit, 1.0)
    for sign in (1, -1):
        found = estimate([sign * s.control[clock] for s in sessions], limit, plan)
        if found.low > limit:
            return f"This machine is too noisy to tell: two processes of the base differ {found.value:.4g} times."
    return ""


def log_ratios(name: str, sessions: Sequence[Session], clock: Clock | None) -> list[float]:
    """Return what each session says of the new model: the log of its ratio to the base, or of its ms by the wall."""
    if name == "slowdown" and clock is not None:
        return [s.new[clock] for s in sessions]
    return [float(np.log(s.new_ms["wall"])) for s in sessions]


def time_check(
    name: str, found: Estimate, sessions: int, limit: float, clock: Clock | None, resolution: float
) -> Check:
    """Say whether the new model is slower than allowed; undecided passes only where the gate could have seen it."""
    unit, needed = ("times" if name == "slowdown" else "ms"), limit * (1 + resolution)
    seen = f"{found.visible:.4g} {unit} would have been seen 9 times in 10"
    of_what = f" the base's {clock} time" if name == "slowdown" else ""
    said = f"{found.value:.4g} {unit}{of_what} ({found.low:.4g} to {found.high:.4g}, {sessions} sessions)"
    said += f"; allowed {limit:g}"
    outcome: Outcome = "passed"
    decision = found.decide(limit)
    if decision is not None:
        outcome = "failed" if decision == "slower" else "passed"
        text = f"The new model takes {said}; {seen}."
    elif found.visible <= needed:
        text = f"Nothing beyond the limit was found: {said}; {seen}."
    else:
        outcome = "too noisy"
        text = f"This machine is too noisy to tell: {said}; {seen}, not {needed:.4g}."
    return Check(name, outcome, found.value, limit, text, asdict(found) | {"clock": clock, "sessions": sessions})


def _memory(sessions: Sequence[Session], limit: float) -> Check:
    peaks = {name: float(np.median([s.peak_bytes[name] for s in sessions])) for name in (BASE, NEW)}
    ratio = peaks[NEW] / peaks[BASE]
    shown = {name: f"{peak / 1e6:.0f} MB" for name, peak in peaks.items()}
    text = f"Peak memory {shown[NEW]}, {ratio:.3f} times the base's {shown[BASE]}; allowed {limit:g}."
    return Check("memory", "failed" if ratio > limit else "passed", ratio, limit, text, peaks)


def check_bytes(size: int | None, limit: int) -> Check:
    """Compare the size of the file to deploy with its limit. Raises InputError for a runtime that opens no file."""
    if size is None:
        raise InputError("This runtime opens no exported file.", hint="Leave --max-bytes out, or use ort-cpu.")
    text = f"The file to deploy has {size:,} bytes; allowed {limit:,}."
    return Check("bytes", "failed" if size > limit else "passed", float(size), float(limit), text)


def check_quality(new: Bundle, base: Bundle, model: str, runtime: str, limit: float) -> Check:
    """Compare the quality that the two bundles recorded, in points. Raises InputError where one was not measured."""
    found = [recorded_quality(bundle, model, runtime) for bundle in (new, base)]
    if found[0][0] != found[1][0]:
        raise InputError(
            f"The bundles were scored by {found[0][0]} and by {found[1][0]}.", hint="Use one task for both."
        )
    loss = 100 * (found[1][1] - found[0][1])
    text = f"{found[0][0]} {found[0][1]:.4f}, the base's {found[1][1]:.4f}: {loss:.2f} points lost; allowed {limit:g}."
    return Check("quality", "failed" if loss > limit else "passed", loss, limit, text)


def recorded_quality(bundle: Bundle, model: str, runtime: str) -> tuple[str, float]:
    """Return the metric and the value that a bundle holds for a model as "sliced:int8": of the file that runs."""
    (subject,) = bundle_subjects(bundle, [model])
    entry: dict[str, Any] = bundle.manifest.quality.get(str(subject.variant)) or {}
    if subject.precision != "fp32":
        opened: Any = getattr(subject.open(runtime, None), "path", None)
        files = {bundle.path(a.path): a.quality for a in bundle.manifest.artifacts}
        entry = files.get(opened) or {}
    if entry.get("value") is None:
        raise InputError(
            f"The bundle {bundle.root} holds no measured quality of {model} in {runtime}.",
            hint="Make it with labelled evaluation data, or leave --max-quality-loss out.",
        )
    return str(entry["metric"]), float(entry["value"])


def gate_paths(new: Path, settings: GateSettings, progress: Progress = lambda share: None) -> Verdict:
    """Check a bundle, or an ONNX file, against a base of the same sort and the other limits.

    Raises InputError where a limit cannot be checked, nothing is limited, or the two are not of one sort.
    """
    base = Path(settings.base) if settings.base is not None else None
    if base is None and {settings.max_latency_ms, settings.max_bytes} == {None}:
        raise InputError("Nothing to check.", hint="Give --base, --max-latency-ms or --max-bytes.")
    for name in ("max_slowdown", "max_memory", "max_quality_loss"):
        if base is None and name in settings.model_fields_set and getattr(settings, name) is not None:
            raise InputError(f"--{name.replace('_', '-')} compares with a base.", hint="Give --base.")
    if base is not None and (new.suffix == ".onnx") != (base.suffix == ".onnx"):
        raise InputError("Bundles and ONNX files cannot be compared.", hint="Name the ONNX file inside the bundle.")
    if new.suffix == ".onnx":
        if settings.max_quality_loss is not None:
            raise InputError("An ONNX file records no quality.", hint="Gate bundles, or leave --max-quality-loss out.")
        check_runtime(settings.runtime, files=True)
        subjects = [file_subject(path.stem, path) for path in (new, base) if path is not None]
        place = _place(settings, max(file_length(path) for path in (new, base) if path is not None))
        quality = None
    else:
        check_runtime(settings.runtime, files=False)
        bundles = [Bundle.open(path) for path in (new, base) if path is not None]
        if len({bundle.manifest.task.get("name") for bundle in bundles}) > 1:
            tasks = " and ".join(str(bundle.manifest.task.get("name")) for bundle in bundles)
            raise InputError(f"The two models are of two tasks, {tasks}.", hint="Name a base of the same task.")
        subjects = [bundle_subjects(bundle, [settings.model])[0] for bundle in bundles]
        place = _place(settings, int(bundles[0].manifest.budget.get("seq_len", FILE_LENGTH)))
        quality = None
        if settings.max_quality_loss is not None:
            limit = settings.max_quality_loss
            quality = check_quality(bundles[0], bundles[1], settings.model, settings.runtime, limit)
    size = None
    if settings.max_bytes is not None:
        size = check_bytes(subjects[0].open(place.runtime, place.threads).file_bytes(), settings.max_bytes)
    verdict = judge(subjects[0], subjects[1] if base is not None else None, settings, place, progress=progress)
    if size is not None:
        verdict.checks.append(size)
    if quality is not None:
        verdict.checks.append(quality)
    return verdict


def _place(settings: GateSettings, length: int) -> Place:
    return Place(settings.runtime, settings.batch, settings.seq or length, settings.threads)
