"""Make one candidate after the other: plan, prune, export, measure beside the dense model, evaluate the very file."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from ..bundle import Bundle
from ..config import BenchSettings
from ..costs import Budget
from ..errors import SystemStateError
from ..experiments import Lab
from ..export import Evaluation, export_bundle
from ..export.registry import Source
from ..latency_table import AnyLatency
from ..lengths import Lengths
from ..measuring import Stage
from ..predict import predict_by
from ..runtime_bench.bench import bench
from ..runtime_bench.stats import median_interval
from ..runtime_bench.subjects import Subject
from ..runtimes import Runner, open_runner
from ..search import Search
from ..stages import Options
from .settings import TuneSettings
from .space import Choice, Form, Space

CANDIDATE = "candidate"


@dataclass(frozen=True)
class Latency:
    """Hold a measured latency in ms, the dense model's in the same rounds, and the noise floor of these.

    `low_ms` and `high_ms` enclose the median: the bootstrap's 95% over rounds, and not closer than two processes of the
    dense model were to each other.
    """

    median_ms: float
    low_ms: float
    high_ms: float
    floor: float
    dense_ms: float
    ratio: Mapping[str, float] | None

    @classmethod
    def of_rounds(
        cls, own_ns: np.ndarray, dense_ns: np.ndarray, floor: float, ratio: Mapping[str, float] | None
    ) -> Latency:
        """Return the latency of rounds' medians in ns."""
        found, dense = median_interval(own_ns.tolist()), float(np.median(dense_ns))
        low, high = min(found.low, found.value / (1 + floor)), max(found.high, found.value * (1 + floor))
        return cls(found.value / 1e6, low / 1e6, high / 1e6, floor, dense / 1e6, ratio)


class _StaticCalibration(Evaluation):
    """Give static int8 its rows; quality is measured by the workbench, in the runtime that is asked for."""

    def quality(self, runner: Runner, source: Source) -> dict[str, Any]:
        return {"metric": None, "value": None, "n": 0, "to_fp32": {}}


@dataclass
class Workbench:
    """Hold the dense model, one pruner for all candidates, and the folder in which they are made."""

    settings: TuneSettings
    lab: Lab
    options: Options
    space: Space
    folder: Path
    seq_len: int
    threads: int
    tables: Mapping[str, AnyLatency]  # by runtime
    _searched: dict[tuple[int, int], Search] = field(default_factory=dict)
    _sliced: tuple[tuple[int, int], nn.Module, str] | None = None
    _baselines: dict[str, Path] = field(default_factory=dict)

    def budget(self, choice: Choice) -> Budget:
        """Return what a choice keeps."""
        return Budget(choice.keep, seq_len=self.seq_len)

    def predicted(self, choice: Choice) -> float:
        """Return the share of the dense latency that the runtime's table gives the plan. Raises InfeasibleBudgetError.

        The plan is the one that would be made; only its counts are needed, so that nothing is compensated for it.
        """
        if choice.whole:
            return 1.0
        key = (choice.percent, choice.align)
        pruner = self.lab.pruner(self.settings.seed)
        if key not in self._searched:
            self._searched[key] = pruner.search(self.budget(choice), replace(self.options, align=choice.align))
        masks = self._searched[key].masks
        lut = Budget(keep_latency=1.0, lut=self.tables[choice.form.runtime], lengths_batch=self.settings.batch)
        (limit,) = pruner.limits(lut, Lengths(((self.seq_len, 1),), self.settings.batch))
        return limit.table.cost({g.name: int(masks[g.name].sum()) for g in pruner.groups}) / limit.table.dense

    def sliced(self, choice: Choice) -> tuple[nn.Module, str | None]:
        """Return a choice's model on the CPU and its plan's hash, None of the dense one; the last one is kept."""
        if choice.whole:
            return self.lab.whole(), None
        key = (choice.percent, choice.align)
        if self._sliced is None or self._sliced[0] != key:
            options = replace(self.options, align=choice.align)
            found, model = self.lab.prune(self.budget(choice), self.settings.seed, options)
            self._sliced = key, model.cpu(), found.hash
        return self._sliced[1], self._sliced[2]

    def make(self, name: str, choice: Choice, record: dict[str, Any]) -> Path:
        """Write a choice's bundle, with the one file of its form, checked against its model; return its folder.

        Raises VerdictError where the file cannot be built or differs from its model.
        """
        root = self.folder / name
        shutil.rmtree(root, ignore_errors=True)
        with _timed(record, "prune"):
            model, record["plan_hash"] = self.sliced(choice)
        with _timed(record, "export"):
            bundle = self._stage(choice.form).bundle(name, self.lab.candidate(model))
            self._export(bundle, choice.form, model)
            bundle.commit()
        record["file_bytes"] = sum(bundle.artifact_bytes(a) for a in bundle.manifest.artifacts) or None
        return root

    def _export(self, bundle: Bundle, form: Form, model: nn.Module) -> None:
        if form.kind is None:
            return
        rows = self.lab.pruner(self.settings.seed).rows
        static = form.kind.scheme == "qdq"
        export_bundle(
            bundle,
            formats=(form.kind.format,),
            precisions=(form.precision,),
            variants=("sliced",),
            options=form.options(),
            models={"sliced": model},
            evaluation=_StaticCalibration(self.lab.data, rows, self.lab.head, self.lab.pad_id) if static else None,
        ).check()

    def _stage(self, form: Form) -> Stage:
        return Stage(self.folder, self.lab.head, [form.runtime])

    def baseline(self, runtime: str) -> Path:
        """Return the bundle of the dense model in fp32 for a runtime, made once."""
        if runtime not in self._baselines:
            choice = self.space.dense(self.space.baseline(runtime))
            self._baselines[runtime] = self.make(f"dense-{runtime}", choice, {})
        return self._baselines[runtime]

    def measure(self, root: Path, form: Form, seconds: float) -> Latency:
        """Measure a candidate in turns with the dense model, each in a fresh process, a second one of dense for noise.

        Raises SystemStateError when one of them cannot be run.
        """
        subjects = [
            Subject("dense", str(self.baseline(form.runtime)), "sliced", "fp32"),
            Subject(CANDIDATE, str(root), "sliced", form.precision),
        ]
        cell = BenchSettings(
            runtimes=(form.runtime,),
            batches=(self.settings.batch,),
            seqs=(self.seq_len,),
            threads=(self.threads,),
            seconds=seconds,
        )
        result, arrays = bench(subjects, cell)
        if result["failures"]:
            failure = result["failures"][0]
            raise SystemStateError(f"{form.runtime} could not run {failure['model']}: {failure['reason']}")
        rounds = {name: _rounds(arrays, name) for name in ("dense", CANDIDATE)}
        ratio = next(m["ratio"] for m in result["measurements"] if m["model"] == CANDIDATE)
        floor = float(result["noise"][0]["floor"] or 0.0)
        return Latency.of_rounds(rounds[CANDIDATE], rounds["dense"], floor, ratio)

    def value(self, root: Path, form: Form) -> float:
        """Return the task's metric of a candidate's file in its runtime, on the whole evaluation split."""
        lab = self.lab
        runner = open_runner(Bundle.open(root), form.runtime, "sliced", threads=self.threads, precision=form.precision)
        with runner:
            outputs = predict_by(
                lambda inputs: runner.infer({n: inputs[n].numpy() for n in runner.input_names}),
                lab.head,
                lab.rows,
                pad_id=lab.pad_id,
            )
        scores = lab.data.evaluation.score(outputs, lab.dense)
        return float(scores[lab.data.metric or next(iter(scores))])

    def dense_value(self) -> float:
        """Return the dense model's metric, in torch and fp32."""
        scores = self.lab.data.evaluation.score(self.lab.dense, self.lab.dense)
        return float(scores[self.lab.data.metric or next(iter(scores))])

    def trial(self, name: str, choice: Choice, record: dict[str, Any]) -> Path:
        """Make, measure and evaluate a candidate; `record` takes what was found. Returns its folder."""
        root = self.make(name, choice, record)
        with _timed(record, "measure"):
            record["latency"] = asdict(self.measure(root, choice.form, self.settings.seconds))
        with _timed(record, "evaluate"):
            record["value"] = self.value(root, choice.form)
        record["loss"] = 100 * (self.dense_value() - record["value"])
        return root

    def drop(self, name: str) -> None:
        """Remove a candidate's folder."""
        with suppress(OSError):
            shutil.rmtree(self.folder / name)


@contextmanager
def _timed(record: dict[str, Any], name: str) -> Any:
    started = time.perf_counter()
    yield
    record.setdefault("seconds", {})[name] = round(time.perf_counter() - started, 2)


def _rounds(arrays: Mapping[str, np.ndarray], model: str) -> np.ndarray:
    """Return the median of each round's runs, in ns (rounds,)."""
    stem = next(name.removesuffix("/wall_ns") for name in arrays if name.endswith(f"/{model}/wall_ns"))
    wall, number = arrays[f"{stem}/wall_ns"], arrays[f"{stem}/round"]
    return np.array([np.median(wall[number == i]) for i in np.unique(number)])
