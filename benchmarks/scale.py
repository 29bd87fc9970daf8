"""Measure how the seconds of pruning grow with rows and with the model, and say what a sweep on many machines takes.

    python benchmarks/scale.py measure scale.jsonl --shape minilm
    python benchmarks/scale.py measure scale.jsonl --shape bert-base
    python benchmarks/scale.py measure scale.jsonl --shape bert-large --methods paper
    python benchmarks/scale.py table scale.jsonl
    python benchmarks/scale.py sweep scale.jsonl recipes/paper-table.toml --workers 1,8,32,160
    python benchmarks/scale.py overhead sweeps/sst2 sweep-overhead.json

`measure` adds a line for each method and number of rows, of a model with random weights: seconds, never quality. From
two numbers of rows follow what a stage takes whatever the rows, and what each token adds. `sweep` runs a sweep's jobs
through a simulated cluster: workers that take one job after another, and die now and then. `overhead` keeps what a real
sweep took beyond its cells.
"""

from __future__ import annotations

import heapq
import json
import time
import tomllib
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from prune import SHAPES, PeakMemory, make_model, make_rows
from rich.console import Console
from rich.table import Table

from deploy_prune.archs import check_config
from deploy_prune.costs import Budget, encoder_flops
from deploy_prune.disk import write_atomically
from deploy_prune.heads import Head
from deploy_prune.predict import predict
from deploy_prune.pruner import Pruner
from deploy_prune.runtime_bench.machine import describe_machine
from deploy_prune.stages import Options
from deploy_prune.sweep.cells import Job, expand, jobs_of
from deploy_prune.sweep.settings import SweepSettings

CELL = ("model", "task", "seed", "keep", "criterion", "compensate", "seconds")  # those of one seed were one job
ACCOUNT = ("workers", "cells", "cell_seconds", "job_seconds", "wall_seconds", "overhead")
MOMENTARY = ("busy", "load_1min", "memory_available_bytes")  # of a machine: now, and not when the sweep ran
METHODS = {
    "paper": Options(criterion="fisher", search="paper", compensate="mask-tuning"),
    "default": Options(),
}
STAGES = ("calibrate", "score", "search", "rearrange", "compensate")
SHARED = ("calibrate", "score")  # once for all budgets
VOCABULARY = 30_522
# Rows of the evaluation splits (GLUE's and SQuAD's own), and tokens at which rows are cut: no row can take longer.
TASKS = {
    "mnli": (9815, 128),
    "qqp": (40430, 128),
    "qnli": (5463, 128),
    "sst2": (872, 128),
    "stsb": (1500, 128),
    "mrpc": (408, 128),
    "squad": (10570, 384),
    "squad_v2": (11873, 384),
}
DEPTHS = {"BERT-base": ("bert-base", 1.0), "DistilBERT": ("bert-base", 0.5)}  # half of the layers, half of all work
app = typer.Typer(help=__doc__, pretty_exceptions_enable=False)


@app.command()
def measure(
    out: Path,
    shape: Annotated[str, typer.Option(help=f"{', '.join(SHAPES)}.")] = "minilm",
    samples: Annotated[str, typer.Option(help="Numbers of rows.")] = "128,256",
    length: Annotated[int, typer.Option(min=8, help="Tokens of each row.")] = 64,
    methods: Annotated[str, typer.Option(help=f"{', '.join(METHODS)}.")] = "paper,default",
    threads: Annotated[int, typer.Option(min=1)] = 1,
) -> None:
    """Prune to two budgets, and add the seconds of each stage to a file of JSON lines."""
    torch.set_num_threads(threads)
    model, head = make_model(SHAPES[shape], vocabulary=VOCABULARY), Head("classification")
    groups = check_config(model.config).groups(model)
    for method in methods.split(","):
        for count in map(int, samples.split(",")):
            rows = make_rows(count, length)
            with PeakMemory() as memory:
                pruner = Pruner(model, head, rows)
                first, second = (pruner.prune(Budget(keep), METHODS[method]) for keep in (0.7, 0.5))
            started = time.perf_counter()
            predict(model, head, rows[:64])
            entry = {
                "shape": shape,
                "params": sum(p.numel() for p in model.parameters()),
                "method": method,
                "samples": count,
                "length": length,
                "flops_per_row": encoder_flops(groups, length),
                "first": _seconds(first.stages),
                "second": _seconds(second.stages),
                "evaluate_seconds_per_row": (time.perf_counter() - started) / 64,
                "peak_growth_bytes": memory.growth,
                "machine": describe_machine(threads),
            }
            with open(out, "a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")
            Console().print(f"{shape} {method} {count}: {sum(entry['first'].values()):.1f} s", highlight=False)


def _seconds(stages: Sequence[dict[str, Any]]) -> dict[str, float]:
    took = dict.fromkeys(STAGES, 0.0)
    for stage in stages:
        if stage["name"] in took and not stage.get("reused"):
            took[stage["name"]] = stage["seconds"]
    return took


@app.command()
def overhead(folder: Path, out: Path) -> None:
    """Keep what a sweep took, and each of its cells, from its results.parquet; run it on the machine of the sweep."""
    from pyarrow import parquet

    found = parquet.read_table(folder / "results.parquet")
    about = json.loads(found.schema.metadata[b"deploy_prune"])
    if about["reused"]:
        raise SystemExit("some cells were kept from before: sweep into an empty folder")
    cells = {row["key"]: {name: row[name] for name in CELL} for row in found.to_pylist()}  # measured or not
    account = {name: about[name] for name in ACCOUNT}
    machine = describe_machine(about["settings"]["threads"])
    machine = {name: value for name, value in machine.items() if name not in MOMENTARY}
    document = {**account, "by_cell": list(cells.values()), "machine": machine}
    write_atomically(out, json.dumps(document, indent=1) + "\n")
    Console().print(f"overhead {account['overhead']:.1%}", highlight=False)


@dataclass(frozen=True)
class Stage:
    """Say what a stage takes: seconds whatever the rows, and seconds for each token."""

    fixed: float
    per_token: float

    def seconds(self, tokens: float) -> float:
        return self.fixed + self.per_token * tokens


@dataclass(frozen=True)
class Costs:
    """Hold what each stage of one shape and method takes; the second budget's, where it differs from the first's."""

    first: dict[str, Stage]
    second: dict[str, Stage]
    evaluate_per_token: float
    params: int
    memory: float


def read_costs(path: Path) -> dict[tuple[str, str], Costs]:
    """Return the costs by shape and method, each from a line through its numbers of rows."""
    entries = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    found = {}
    for key in dict.fromkeys((e["shape"], e["method"]) for e in entries):
        own = [e for e in entries if (e["shape"], e["method"]) == key]
        tokens = [e["samples"] * e["length"] for e in own]

        def stages(which: str, own: Sequence[Any] = own, tokens: Sequence[int] = tokens) -> dict[str, Stage]:
            return {name: _line(tokens, [e[which][name] for e in own]) for name in STAGES}

        per_token = float(np.mean([e["evaluate_seconds_per_row"] / e["length"] for e in own]))
        largest = max(own, key=lambda e: e["samples"])
        found[key] = Costs(
            stages("first"), stages("second"), per_token, largest["params"], largest["peak_growth_bytes"]
        )
    return found


def _line(tokens: Sequence[int], seconds: Sequence[float]) -> Stage:
    """Return the line through the points, neither part of which is negative."""
    if len(set(tokens)) < 2:
        return Stage(0.0, seconds[0] / tokens[0])
    slope, fixed = np.polyfit(tokens, seconds, 1)
    if fixed < 0:
        return Stage(0.0, float(np.sum(seconds) / np.sum(tokens)))
    return Stage(float(fixed), float(slope)) if slope > 0 else Stage(float(np.mean(seconds)), 0.0)


@app.command()
def table(measured: Path, samples: int = 2048, length: int = 64) -> None:
    """Print the seconds of one run at a number of rows, by shape and method, and how they grow with the parameters."""
    costs, tokens = read_costs(measured), samples * length
    shown = Table(
        "shape", "parameters", "method", *STAGES, "total", "another budget", title=f"s, {samples} rows of {length}"
    )
    for (shape, method), cost in costs.items():
        took = [cost.first[name].seconds(tokens) for name in STAGES]
        more = sum(cost.second[name].seconds(tokens) for name in STAGES if name not in SHARED)
        cells = [f"{seconds:.1f}" for seconds in (*took, sum(took), more)]
        shown.add_row(shape, f"{cost.params / 1e6:.0f} M", method, *cells)
    Console(width=140).print(shown)
    for method in METHODS:
        own = [
            (c.params, sum(s.seconds(tokens) for s in c.first.values())) for (_, m), c in costs.items() if m == method
        ]
        if len(own) > 1:
            power = np.polyfit(np.log([p for p, _ in own]), np.log([s for _, s in own]), 1)[0]
            Console().print(f"{method}: seconds grow as parameters to the power {power:.2f}", highlight=False)


@app.command()
def sweep(
    measured: Path,
    recipe: Path,
    workers: Annotated[str, typer.Option(help="Numbers of workers, each of one thread.")] = "1,8,32,160",
    method: str = "paper",
    load_seconds: Annotated[float, typer.Option(help="What a job takes before it computes.")] = 10.0,
    hours_between_deaths: Annotated[float, typer.Option(help="Mean life of a worker; 0: they live on.")] = 24.0,
    seed: int = 0,
) -> None:
    """Simulate a sweep's schedule: hours, machine-hours, how busy the workers are, and what their deaths cost."""
    costs = read_costs(measured)
    settings = SweepSettings.model_validate(tomllib.loads(recipe.read_text("utf-8")))
    jobs = [job_seconds(job, settings, costs, method, load_seconds) for job in jobs_of(expand(settings))]
    work = sum(first + sum(cells) for first, cells in jobs)
    console = Console()
    longest = max(first + sum(cells) for first, cells in jobs) / 3600
    console.print(
        f"{len(jobs)} jobs, {work / 3600:.0f} hours of work, the longest job {longest:.2f} h", highlight=False
    )
    shown = Table("workers", "hours", "worker-hours", "busy with cells", "lost to deaths", "deaths")
    for count in map(int, workers.split(",")):
        found = simulate(jobs, count, 3600 * hours_between_deaths, seed)
        held = count * found.makespan
        shown.add_row(
            str(count),
            f"{found.makespan / 3600:.2f}",
            f"{held / 3600:.0f}",
            f"{work / held:.1%}",
            f"{found.lost / held:.1%}",
            str(found.deaths),
        )
    console.print(shown)


def job_seconds(
    job: Job, settings: SweepSettings, costs: dict[tuple[str, str], Costs], method: str, load_seconds: float
) -> tuple[float, list[float]]:
    """Return what a job takes before its first cell, and what each cell takes."""
    entry = settings.entries[job.entry]
    shape, share = DEPTHS[entry.label]
    cost, (rows, length) = costs[shape, method], TASKS[str(entry.task)]
    tokens = (entry.samples or settings.samples or 2048) * length
    before = load_seconds + share * sum(cost.first[name].seconds(tokens) for name in SHARED)
    before += share * rows * length * cost.evaluate_per_token  # of the dense model
    each = sum(cost.second[name].seconds(tokens) for name in STAGES if name not in SHARED)
    return before, [share * (each + rows * length * cost.evaluate_per_token)] * len(job.cells)


@dataclass
class Simulated:
    """Hold when the last cell ended, the seconds of work that were lost, and the number of deaths."""

    makespan: float
    lost: float = 0.0
    deaths: int = 0


def simulate(jobs: Sequence[tuple[float, list[float]]], workers: int, life: float, seed: int) -> Simulated:
    """Let workers take jobs in order; the unfinished cells of one that dies go to the queue's front.

    It is replaced at once. Lives are exponential with the mean `life` in seconds; 0 means forever. A job that is taken
    up again calibrates again.
    """
    rng, queue, found = np.random.default_rng(seed), deque(jobs), Simulated(0.0)
    free = [(0.0, number) for number in range(workers)]
    heapq.heapify(free)
    dies = [float(rng.exponential(life)) if life else np.inf for _ in range(workers)]
    while queue:
        now, worker = heapq.heappop(free)
        before, cells = queue.popleft()
        at, done = now + before, 0
        while at < dies[worker] and done < len(cells):
            if at + cells[done] > dies[worker]:
                break
            at += cells[done]
            done += 1
        if done < len(cells):
            at = max(dies[worker], now)
            found.deaths += 1
            found.lost += at - now - sum(cells[:done])
            dies[worker] = at + float(rng.exponential(life))
            queue.appendleft((before, cells[done:]))
        found.makespan = max(found.makespan, at)
        heapq.heappush(free, (at, worker))
    return found


if __name__ == "__main__":
    app()
