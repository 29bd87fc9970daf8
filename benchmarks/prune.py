"""Measure what pruning takes, stage by stage, beside the paper's algorithm on the same rows and machine.

    make bench-prune
    python benchmarks/prune.py --shape bert-base --samples 256
    python benchmarks/prune.py --model my-model --task sst2 --data glue/SST-2 --samples 2048

Without a model weights and tokens are random: seconds and operation counts are measured, never quality. Least
squares converge faster on random weights than on trained ones, which favours the reference.
"""

from __future__ import annotations

import ctypes
import gc
import json
import math
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import psutil
import torch
import transformers
import typer
from reference import run_reference
from rich.console import Console
from rich.table import Table

from deploy_prune.archs import check_config
from deploy_prune.batches import Batches
from deploy_prune.calibration import sample_indices
from deploy_prune.checkpoint import load_dense
from deploy_prune.costs import Budget
from deploy_prune.disk import write_atomically
from deploy_prune.heads import Head
from deploy_prune.pruner import Pruner
from deploy_prune.runtime_bench.machine import default_threads, describe_machine
from deploy_prune.stages import Options
from deploy_prune.tasks import load_task, task_head
from deploy_prune.tasks.base import Row


@dataclass(frozen=True)
class Shape:
    """Name a model's sizes."""

    hidden: int
    layers: int
    heads: int
    neurons: int


SHAPES = {
    "minilm": Shape(384, 6, 12, 1536),
    "bert-base": Shape(768, 12, 12, 3072),
    "bert-large": Shape(1024, 24, 16, 4096),
    "tiny": Shape(64, 2, 4, 256),
}


def make_model(shape: Shape, seed: int = 0, vocabulary: int = 8000) -> Any:
    """Return a BERT classifier of this shape with random weights."""
    torch.manual_seed(seed)
    config = transformers.BertConfig(
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        intermediate_size=shape.neurons,
        vocab_size=vocabulary,
        num_labels=2,
    )
    return transformers.BertForSequenceClassification(config).eval()


def make_rows(samples: int, length: int, seed: int = 0) -> list[Row]:
    """Return rows of random tokens, all of one length."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(samples):
        ids = rng.integers(5, 8000, length)
        features = {"input_ids": ids, "attention_mask": np.ones(length, np.int64), "token_type_ids": 0 * ids}
        rows.append(Row(features, int(rng.integers(2))))
    return rows


class PeakMemory:
    """Follow how much this process's own memory grows; file-mapped pages, which the system may drop, count apart."""

    def __enter__(self) -> PeakMemory:
        gc.collect()
        if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
            libc.malloc_trim(0)  # what an earlier run freed goes back to the system, and hides no growth
        self._process, self._over = psutil.Process(), threading.Event()
        self._before = self._most = self._now()
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._over.set()
        self._thread.join()

    @property
    def growth(self) -> int:
        return self._most - self._before

    def _now(self) -> int:
        info = self._process.memory_info()
        return int(info.rss - getattr(info, "shared", 0))

    def _follow(self) -> None:
        while not self._over.wait(0.05):
            self._most = max(self._most, self._now())


def main(
    shape: Annotated[str, typer.Option(help=f"{', '.join(SHAPES)}.")] = "minilm",
    model: Annotated[str | None, typer.Option(help="Folder of a real checkpoint, with --task and --data.")] = None,
    task: str = "",
    data: str | None = None,
    samples: Annotated[int, typer.Option(min=64)] = 256,
    length: Annotated[int, typer.Option(min=8)] = 128,
    keep: float = 0.5,
    tuning: Annotated[bool, typer.Option(help="Time the package's own mask tuning as well.")] = True,
    out: Annotated[Path | None, typer.Option(help="JSON file for the figures.")] = None,
) -> None:
    """Run the package's default, its mask tuning and the reference, one after another."""
    threads = default_threads()
    torch.set_num_threads(threads)
    if model:
        head = Head(task_head(task))
        dense = load_dense(str(Path(model).resolve()), head.kind)
        net = dense.model
        train = load_task(task, tokenizer=dense.tokenizer, config=net.config, data=data).train
        rows = train.encode(sample_indices(len(train), samples, 0))
        length = math.ceil(np.mean([r.length for r in rows]))
    else:
        net, rows, head = make_model(SHAPES[shape]), make_rows(samples, length), Head("classification")
    name_of_model = Path(model).name if model else f"{shape} shape"
    groups = check_config(net.config).groups(net)
    results: dict[str, dict[str, Any]] = {}
    ways = {"default": Options(), "mask tuning": Options(compensate="mask-tuning", search="paper")}
    for name, options in ways.items():
        if name == "default" or tuning:
            with PeakMemory() as memory:
                found = Pruner(net, head, rows).prune(Budget(keep), options)
            seconds = {s["name"]: s["seconds"] for s in found.stages}
            results[name] = {"seconds": seconds, "peak_growth_bytes": memory.growth}
            del found
    with PeakMemory() as memory:
        _, timing = run_reference(net, groups, head, list(Batches(rows, head, 0)), keep, length)
    results["reference"] = {
        "seconds": timing.seconds,
        "peak_growth_bytes": memory.growth,
        "lsmr_iterations": timing.lsmr_iterations,
        "tuning_flops": timing.tuning_flops,
    }
    for result in results.values():
        result["total"] = sum(result["seconds"].values())
    _show(results, f"{name_of_model}, {len(rows)} samples of {length} tokens, keep {keep:g}, {threads} threads")
    if out:
        about = {"model": name_of_model, "samples": len(rows), "length": length, "keep": keep}
        document = {**about, "machine": describe_machine(threads), "results": results}
        write_atomically(out, json.dumps(document, indent=1) + "\n")


def _show(results: dict[str, dict[str, Any]], title: str) -> None:
    table = Table(title=title, title_justify="left")
    for column in ("stage, seconds", *results, "reference / default"):
        table.add_column(column, justify="left" if column.startswith("stage") else "right")
    reference, default = results["reference"], results["default"]
    for stage in ("calibrate", "score", "search", "rearrange", "compensate"):
        cells = [f"{r['seconds'].get(stage, 0.0):.2f}" for r in results.values()]
        table.add_row(stage, *cells, _ratio(reference["seconds"].get(stage, 0.0), default["seconds"].get(stage, 0.0)))
    table.add_row(
        "total", *(f"{r['total']:.2f}" for r in results.values()), _ratio(reference["total"], default["total"])
    )
    memory = [f"{r['peak_growth_bytes'] / 1e6:.0f}" for r in results.values()]
    key = "peak_growth_bytes"
    table.add_row("memory, +MB", *memory, _ratio(reference[key], default[key]))
    console = Console()
    console.print(table)
    console.print(
        f"The reference's tuning: {reference['lsmr_iterations']} LSMR iterations,"
        f" {reference['tuning_flops']:.2e} FLOPs."
    )


def _ratio(a: float, b: float) -> str:
    return f"{a / b:.2f}" if a and b else "-"


if __name__ == "__main__":
    typer.run(main)
