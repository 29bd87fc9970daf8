"""Measure what several processes gain: one process on one thread, two on one thread each, one on two threads, in turns.

    make bench-parallel
    python benchmarks/parallel.py time --shape bert-base --samples 512 --length 64 --out parallel.json

Weights and tokens are random: seconds are measured, never quality. Each measurement is a run of its own, started by
torchrun; its seconds are the first process's, of calibration, scores and compensation. The plans of the two ways with
one thread must be the same.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from prune import SHAPES, make_model, make_rows
from rich.console import Console
from rich.table import Table

from deploy_prune import parallel, prune
from deploy_prune.costs import Budget
from deploy_prune.disk import write_atomically
from deploy_prune.runtime_bench.machine import describe_machine

WAYS = {"1 x 1": (1, 1), "2 x 1": (2, 1), "1 x 2": (1, 2)}  # processes, threads of each
STAGES = ("calibrate", "score", "compensate")
app = typer.Typer(help=__doc__, pretty_exceptions_enable=False)
Shape = Annotated[str, typer.Option(help=f"{', '.join(SHAPES)}.")]
Samples = Annotated[int, typer.Option(min=128)]
Length = Annotated[int, typer.Option(min=8)]


@app.command()
def work(out: Path, shape: Shape = "minilm", samples: Samples = 512, length: Length = 64) -> None:
    """Prune once, as one of the processes that torchrun starts; the first one writes its seconds."""
    threads = int(os.environ["OMP_NUM_THREADS"])
    torch.set_num_threads(threads)
    model, rows = make_model(SHAPES[shape]), make_rows(samples, length)
    with parallel.team(torch.device("cpu")):
        prune(model, rows[:128], Budget(0.5))  # warms up
        found = prune(model, rows, Budget(0.5))
        first = parallel.rank() == 0
    if first:
        seconds = {s["name"]: s["seconds"] for s in found.stages if s["name"] in STAGES}
        write_atomically(out, json.dumps({"plan": found.hash, "seconds": seconds}) + "\n")


@app.command()
def time(
    shape: Shape = "minilm",
    samples: Samples = 512,
    length: Length = 64,
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    out: Annotated[Path | None, typer.Option(help="JSON file for the figures.")] = None,
) -> None:
    """Run every way in turns, and print the medians and their ratios."""
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in WAYS}
    for _ in range(rounds):
        for name, (processes, threads) in WAYS.items():
            runs[name].append(_run(processes, threads, shape, samples, length))
    plans = {run["plan"] for name in ("1 x 1", "2 x 1") for run in runs[name]}
    if len(plans) != 1:
        raise SystemExit("one and two processes found different plans")
    medians = {name: _medians([run["seconds"] for run in of]) for name, of in runs.items()}
    ratios = {
        "two processes on one thread each against one": medians["1 x 1"]["total"] / medians["2 x 1"]["total"],
        "two processes against one on two threads": medians["1 x 2"]["total"] / medians["2 x 1"]["total"],
    }
    table = Table("processes x threads", *STAGES, "total", title=f"{shape} shape, {samples} rows of {length} tokens, s")
    for name, found in medians.items():
        table.add_row(name, *(f"{found[stage]:.2f}" for stage in (*STAGES, "total")))
    Console().print(table)
    for name, ratio in ratios.items():
        Console().print(f"{name}: {ratio:.2f} x as fast", highlight=False)
    if out:
        about = {"shape": shape, "samples": samples, "length": length, "machine": describe_machine(2)}
        write_atomically(out, json.dumps({**about, "runs": runs, "ratios": ratios}, indent=1) + "\n")


def _medians(runs: list[dict[str, float]]) -> dict[str, float]:
    found = {stage: statistics.median(run[stage] for run in runs) for stage in STAGES}
    return {**found, "total": statistics.median(sum(run.values()) for run in runs)}


def _run(processes: int, threads: int, shape: str, samples: int, length: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "seconds.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        command += [__file__, "work", str(out), "--shape", shape, "--samples", str(samples), "--length", str(length)]
        subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": str(threads)})
        return json.loads(out.read_text("utf-8"))


if __name__ == "__main__":
    app()
