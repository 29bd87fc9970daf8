"""What a worker does: prune one model on one task and seed in many ways, and tell of each cell as it ends."""

from __future__ import annotations

import os
import socket
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from threadpoolctl import threadpool_limits
from torch import nn

from ..config import Recipe
from ..costs import Budget
from ..disk import code_hash
from ..errors import DeployPruneError, InputError
from ..experiments import Lab, Setting
from ..latency_table import read_latency_table
from ..measuring import Stage
from ..progress import Silent
from ..recording import versions
from ..resolving import check_length, check_rows, is_label_free, resolve
from ..resume import hash_inputs, hash_state, run_key
from ..stages import Options, PrunedPlan
from .cells import Cell, digest, files_name
from .cluster import node_id
from .settings import Entry, SweepSettings

FORMAT = 1  # raised when a cell's result has other columns
NOT_IN_KEY = ("machine", "budget", "options")  # nodes may differ; each cell has a budget and options of its own
STAGES = ("calibrate", "score", "search", "rearrange", "compensate")


def run_job(spec: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Compute a job's cells; yield {"event": ...} as plain values.

    "begun" at once, with Ray's id of the node; "loaded" once, with pid and host; then for each cell by its "number"
    either "known" with the key of a result that the driver has, "cell" with key, result and perhaps files to be
    measured, or "failed" with the reason. "refused" with the reason stands for the whole job.
    """
    yield {"event": "begun", "node": node_id()}
    settings = SweepSettings.model_validate(spec["settings"])
    for name, value in spec["environment"].items():
        if value is not None:
            os.environ[name] = value
    with limited(settings.threads):
        try:
            if code_hash() != spec["code"]:
                raise InputError(
                    f"{socket.gethostname()} has another deploy-prune than the driver.",
                    hint="Install the same release on every node.",
                )
            started = time.perf_counter()
            desk = Desk(Entry.model_validate(spec["entry"]), settings, spec["seed"])
            load_seconds = time.perf_counter() - started
        except Exception as error:  # told to the driver, which lists the cells as failed
            yield {"event": "refused", "reason": reason_of(error)}
            return
        yield {"event": "loaded", "pid": os.getpid(), "host": socket.gethostname()}
        for cell in (Cell(**values) for values in spec["cells"]):
            try:
                event = desk.cell(cell, spec["known"], spec["models"], load_seconds)
            except Exception as error:  # one cell's failure is no other's
                event = {"event": "failed", "number": cell.number, "reason": reason_of(error)}
            if event["event"] == "cell":
                load_seconds = 0.0  # counted once
            yield event


@contextmanager
def limited(threads: int) -> Iterator[None]:
    """Compute on so many threads: torch's, those of the BLAS libraries, and those of processes started here."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    before = torch.get_num_threads()
    with threadpool_limits(limits=threads):
        torch.set_num_threads(threads)
        try:
            yield
        finally:
            torch.set_num_threads(before)


def reason_of(error: Exception) -> str:
    """Say in one line what went wrong."""
    ours = isinstance(error, DeployPruneError)
    return " ".join((str(error) if ours else f"{type(error).__name__}: {error}").split())


class Desk:
    """Hold a model, its data and its calibration: what the cells of a job share."""

    def __init__(self, entry: Entry, settings: SweepSettings, seed: int) -> None:
        self.entry, self.settings, self.seed = entry, settings, seed
        asked = entry.model_dump(exclude={"name", "lut", "seq_len"}) | {"seed": seed}
        asked["samples"] = entry.samples or settings.samples
        source, self.task, recipe = resolve(Recipe(**{k: v for k, v in asked.items() if v is not None}), Silent())
        self.lab = Lab(
            Setting(
                model=source,
                task=self.task,
                data=recipe.data,
                seeds=(seed,),
                samples=recipe.samples,
                max_length=recipe.max_length,
                text_column=recipe.text_column,
                label_column=recipe.label_column,
                device=settings.device,
            )
        )
        check_length(entry.seq_len, self.lab.checkpoint)
        check_rows(self.lab.data)
        self.label_free = is_label_free(recipe, self.lab.data, self.lab.checkpoint)
        self.lut = read_latency_table(entry.lut) if entry.lut else None

    @cached_property
    def key(self) -> dict[str, Any]:
        """Return what every cell's result depends on."""
        lab = self.lab
        rows = lab.pruner(self.seed).rows
        whole = run_key(lab.model, lab.head, rows, Budget(), Options(), versions(), pad_id=lab.pad_id)
        shared = {name: value for name, value in whole.items() if name not in NOT_IN_KEY}
        return shared | {"format": FORMAT, "task": self.task, "evaluation": hash_inputs(lab.rows), "seed": self.seed}

    def options(self, cell: Cell) -> Options:
        """Return how a cell is pruned."""
        s = self.settings
        return Options(
            criterion=cell.criterion,
            compensate=cell.compensate,
            label_free=self.label_free,
            search=s.search,
            scope=s.scope,
            align=s.align,
            min_heads=s.min_heads,
            min_neurons=s.min_neurons,
            seed=cell.seed,
            forward_dtype=s.forward_dtype,
            cache_gb=s.cache_gb,
        )

    def budget(self, cell: Cell) -> Budget:
        """Return a cell's limit."""
        kind, length = self.settings.budget, self.entry.seq_len
        if kind == "latency":
            return Budget(keep_latency=cell.keep, lut=self.lut, seq_len=length)
        if kind == "params":
            return Budget(keep_params=cell.keep, seq_len=length)
        return Budget(keep_flops=cell.keep, seq_len=length)

    def cell_key(self, cell: Cell) -> str:
        """Return the SHA-256 of all that a cell's result depends on."""
        lut = None if self.lut is None else self.lut.model_dump(mode="json")
        own = {"budget": self.settings.budget, "keep": cell.keep, "seq_len": self.entry.seq_len, "lut": lut}
        return digest([self.key, own, asdict(self.options(cell))])

    def cell(self, cell: Cell, known: list[str], models: list[str], load_seconds: float) -> dict[str, Any]:
        """Compute a cell, unless the driver knows its result; return the event that says so."""
        started = time.perf_counter()
        key = self.cell_key(cell)
        if key in known:
            return {"event": "known", "number": cell.number, "key": key}
        lab = self.lab
        found, sliced = lab.prune(self.budget(cell), cell.seed, self.options(cell))
        evaluated = time.perf_counter()
        compared = lab.compare(sliced)
        now = time.perf_counter()
        result = {
            "task": self.task,
            "metric": lab.data.metric,
            "quality_dense": lab.dense_row["value"],
            "quality_sliced": compared["value"],
            **{name: compared.get(name) for name in ("agreement", "kl", "rmse", "cosine")},
            **self._counts(found),
            "plan_hash": found.hash,
            "weights_hash": hash_state(sliced.state_dict()),
            "samples": len(lab.pruner(cell.seed).rows),
            **_seconds(found),
            "seconds_evaluate": now - evaluated,
            "seconds_load": load_seconds,
        }
        event: dict[str, Any] = {"event": "cell", "number": cell.number, "key": key}
        if self.settings.bench_runtimes:
            event |= self._files(sliced, models)
        result["seconds"] = load_seconds + time.perf_counter() - started
        return event | {"result": result | {"host": socket.gethostname(), "pid": os.getpid()}}

    def _counts(self, found: PrunedPlan) -> dict[str, Any]:
        """Return what a plan keeps: shares, FLOPs at the budget's length, parameters of the whole model."""
        described = self.lab.describe(found)
        return {
            "seq_len": found.seq_len,
            "kept_flops": described["kept_flops"],
            "kept_params": described["kept_params"],
            "flops": found.surgery.flops(found.seq_len, found.plan),
            "flops_dense": found.surgery.flops(found.seq_len),
            "params": self.lab.params - found.surgery.removed_params(found.plan),
            "params_dense": self.lab.params,
            "declined": len(described["declined"]),
        }

    def _files(self, sliced: nn.Module, models: list[str]) -> dict[str, Any]:
        """Return the sliced model's files to be measured, and the dense one's where the driver has none."""
        dense = digest([self.key["model"], self.key["versions"]])
        found: dict[str, Any] = {"dense": dense, "files": self._bundle(sliced)}
        if (name := files_name(dense, self.settings)) not in models:
            found["dense_files"] = self._bundle(self.lab.whole())
            models.append(name)
        return found

    def _bundle(self, model: nn.Module) -> dict[str, bytes]:
        """Return a model as the files of a bundle that the runtimes open, by path."""
        with tempfile.TemporaryDirectory(prefix="deploy-prune-cell-") as folder:
            stage = Stage(Path(folder), self.lab.head, self.settings.bench_runtimes)
            root = stage.write("model", self.lab.candidate(model))
            return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def _seconds(found: PrunedPlan) -> dict[str, float]:
    """Return the seconds that each stage took in this cell; what an earlier cell had computed took none."""
    took = {f"seconds_{name}": 0.0 for name in STAGES}
    for stage in found.stages:
        if f"seconds_{stage['name']}" in took and not stage.get("reused"):
            took[f"seconds_{stage['name']}"] = stage["seconds"]
    return took
