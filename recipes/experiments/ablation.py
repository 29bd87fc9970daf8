"""Measure what each stage of the pruning adds, over budgets and seeds: the tables of docs/results.md.

    python recipes/experiments/ablation.py MODEL --task sst2 --data glue/SST-2 --keep 0.7,0.6,0.5,0.4 \
        --seeds 0,1,2 --out docs/results/sst2.json

Every cell compares with the dense model on the whole evaluation split. Rows: dense; search,
+rearrange and +mask tuning (the paper's three stages, as published); then with a sixteenth of each layer's
neurons kept: search, and the refit (the default). For seed 0 alone, to compare: rearranged with the
floor, then mask tuning or the refit.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from deploy_prune.archs import check_config
from deploy_prune.batches import Batches
from deploy_prune.bundle import write_atomically
from deploy_prune.calibration import calibrate, sample_indices
from deploy_prune.checkpoint import load_dense
from deploy_prune.compensate import MaskTuning, Refit, Solver, sweep
from deploy_prune.costs import Budget, encoder_flops
from deploy_prune.criteria import fisher
from deploy_prune.fidelity import fidelity
from deploy_prune.heads import Head
from deploy_prune.predict import predict
from deploy_prune.rearrange import rearrange
from deploy_prune.runtime_bench.machine import default_threads, describe_machine
from deploy_prune.search import search_flops
from deploy_prune.slicing import slice_model
from deploy_prune.stages import Options, resolve_device
from deploy_prune.tasks import load_task, task_head
from deploy_prune.units import SlicePlan

console = Console(stderr=True)


class Ablation:
    """Hold one dense model, its evaluation split, and the rows measured so far."""

    def __init__(self, model: str, task: str, data: str, samples: int, device: str) -> None:
        self.head = Head(task_head(task))
        dense = load_dense(str(Path(model).resolve()), self.head.kind)
        self.device = resolve_device(device)
        self.model, self.pad_id, self.samples = dense.model.to(self.device), dense.tokenizer.pad_token_id or 0, samples
        self.data = load_task(task, tokenizer=dense.tokenizer, config=self.model.config, data=data)
        self.groups = check_config(self.model.config).groups(self.model)
        self.split = self.data.evaluation
        self.rows = self.split.rows()
        self.dense = predict(self.model, self.head, self.rows, pad_id=self.pad_id)
        self.results: list[dict[str, Any]] = [
            {"method": "dense", "keep": 1.0, "seed": None, **self.split.score(self.dense, self.dense)}
        ]

    def measure(self, method: str, keep: float, seed: int, model: torch.nn.Module, seconds: float, **more: Any) -> None:
        outputs = predict(model, self.head, self.rows, pad_id=self.pad_id)
        row = {
            "method": method,
            "keep": keep,
            "seed": seed,
            "seconds": round(seconds, 1),
            **self.split.score(outputs, self.dense),
            **fidelity(self.head.kind, self.dense, outputs),
            **more,
        }
        self.results.append(row)
        console.print({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()})

    def run(self, keeps: list[float], seed: int, first: bool, methods: list[str]) -> None:
        """Calibrate once, then measure every stage at every budget."""
        rows = self.data.train.encode(sample_indices(len(self.data.train), self.samples, seed))
        started = time.perf_counter()
        stats = calibrate(self.model, self.groups, self.head, rows, pad_id=self.pad_id)
        calibration_s = time.perf_counter() - started
        scores, batches = fisher(stats), Batches(rows, self.head, self.pad_id)
        length = -(-sum(r.length for r in rows) // len(rows))  # mean, rounded up
        floor = Options().resolved(self.groups).min_neurons or 1

        def plan(keep: float, least: int, moved: bool) -> SlicePlan:
            masks = search_flops(self.groups, scores, Budget(keep, length), min_neurons=least)
            masks = rearrange(self.groups, masks, stats.gradients)[0] if moved else masks
            return SlicePlan.from_masks(self.groups, masks)

        for keep in keeps:
            shared = {"seq_len": length, "samples": len(rows), "calibration_seconds": round(calibration_s, 1)}
            trials: list[tuple[str, int, bool, Solver | None]] = [
                ("search", 1, False, None),
                ("+rearrange", 1, True, None),
                ("+mask tuning", 1, True, MaskTuning()),
                ("floor: search", floor, False, None),
                ("floor: refit (default)", floor, False, Refit()),
            ]
            if first:
                trials.append(("floor: +rearrange, mask tuning", floor, True, MaskTuning()))
                trials.append(("floor: +rearrange, refit", floor, True, Refit()))
            trials = [t for t in trials if not methods or t[0] in methods]
            for method, least, moved, solver in trials:
                started = time.perf_counter()
                chosen = plan(keep, least, moved)
                student = slice_model(self.model, self.groups, chosen)
                declined: list[str] = []
                if solver:
                    taught = solver.teacher_keep(keep)
                    teacher = self.model
                    if taught < 1:
                        teacher = slice_model(self.model, self.groups, plan(taught, least, moved))
                    swept = sweep(student, teacher, self.groups, chosen, self.head, batches, solver, stats.saliency)
                    declined = [entry.group for entry in swept.log if not entry.accepted]
                seconds = time.perf_counter() - started
                share = encoder_flops(self.groups, length, chosen) / encoder_flops(self.groups, length)
                more = {"declined": declined, "kept_flops": share, "layers": chosen.layer_counts(), **shared}
                self.measure(method, keep, seed, student, seconds, **more)


def _list(kind: Callable[[str], Any], text: str) -> list[Any]:
    return [kind(part) for part in text.split(",")]


def _merged(old: list[dict[str, Any]], new: list[dict[str, Any]]) -> list[dict[str, Any]]:
    def key(row: dict[str, Any]) -> tuple[Any, ...]:
        return row["method"], row["keep"], row["seed"]

    measured = {key(row) for row in new}
    return [row for row in old if key(row) not in measured] + new


def main(
    model: str,
    task: Annotated[str, typer.Option()],
    data: Annotated[str, typer.Option()],
    out: Annotated[Path, typer.Option()],
    keep: str = "0.5",
    seeds: str = "0",
    samples: int = 2048,
    device: str = "auto",
    methods: Annotated[str, typer.Option(help="Measure these rows alone, separated by semicolons.")] = "",
) -> None:
    """Write one JSON file with the machine and a row per method, budget and seed.

    Rows that OUT holds already are kept, unless they are measured anew.
    """
    ablation = Ablation(model, task, data, samples, device)
    out.parent.mkdir(parents=True, exist_ok=True)
    old = json.loads(out.read_text("utf-8"))["rows"] if out.exists() else []
    for seed in _list(int, seeds):
        ablation.run(_list(float, keep), seed, first=seed == 0, methods=methods.split(";") if methods else [])
        document = {
            "model": Path(model).name,
            "task": task,
            "metric": ablation.data.metric,
            "evaluated": {"split": ablation.split.name, "rows": len(ablation.split)},
            "machine": describe_machine(default_threads()),
            "rows": _merged(old, ablation.results),
        }
        write_atomically(out, json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
