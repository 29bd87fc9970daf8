"""Latency against FLOPs at the shapes of known encoders: random weights, ragged plans, every cell of a matrix.

S=recipes/experiments/shapes.py
python recipes/experiments/encoders.py bert-base-random --out encoders/bert-base-random
python $S make encoders/bert-base-random shapes/bert-base        # bundles at 0.7, 0.5 and 0.3 of the FLOPs
python $S measure shapes/bert-base bert-base.jsonl --runtimes ort-cpu,openvino,torch-compile
python $S keep bert-base.jsonl docs/results/bert-base-shapes.json    # tables.py makes the table
python $S profile shapes/bert-base --precision int8      # where the time of ONNX Runtime goes, operator by operator
python $S fusion shapes/bert-base                        # residuals as Sum (as exported) against Add, which gets fused
A plan keeps early layers whole and late ones nearly empty, as searched plans do. `measure` goes on where it stopped.
`--align 16` rounds the neurons kept; `--data` is what static int8 (OpenVINO) is calibrated on.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from deploy_prune.archs import arch_of
from deploy_prune.bundle import Bundle
from deploy_prune.checkpoint import load_dense
from deploy_prune.config import BenchSettings
from deploy_prune.costs import encoder_flops, unit_flops
from deploy_prune.disk import write_atomically
from deploy_prune.export import Options, evaluation_of, export_bundle
from deploy_prune.pipeline import slice_given
from deploy_prune.runtime_bench.bench import Place, bench, time_subjects, without_file
from deploy_prune.runtime_bench.subjects import Subject, bundle_subjects, file_subject
from deploy_prune.units import UnitGroup

KEEPS = (0.7, 0.5, 0.3)
app = typer.Typer(help=__doc__, pretty_exceptions_enable=False)


@app.command()
def make(
    model: Path,
    folder: Path,
    data: Path | None = None,
    task: str | None = None,
    align: int = 1,
    length: int = 128,
    formats: str = "onnx,openvino",
    precisions: str = "fp32,int8",
) -> None:
    """Write a bundle for each share of the FLOPs at a length: these files, and the checkpoint that torch reads.

    An image model's length is the number of its tokens, whatever `length` says.
    """
    dense = load_dense(str(model), "classification")
    length = dense.signature.tokens or length
    groups = arch_of(dense.model).groups(dense.model)
    for keep in KEEPS:
        out = folder / f"{keep:g}"
        if out.exists():
            continue
        made_in = folder / f".{keep:g}"  # until it is whole
        shutil.rmtree(made_in, ignore_errors=True)
        with tempfile.TemporaryDirectory() as scratch:
            masks = Path(scratch) / "masks.npz"
            np.savez(masks, **ragged_masks(groups, keep, length, align))
            bundle = slice_given(
                str(model), [masks], made_in, task=task, data=str(data) if data else None, seq_len=length
            )
        variants = ("dense", "virtual", "sliced") if keep == KEEPS[1] else ("sliced",)
        options = Options()
        evaluation = evaluation_of(bundle) if data else None
        made = export_bundle(
            bundle,
            formats=formats.split(","),
            precisions=precisions.split(","),
            variants=variants,
            options=options,
            evaluation=evaluation,
        )
        made.check()
        bundle.commit()
        made_in.rename(out)
        print("\n".join(made.left_out()))
        print(f"{out}: {bundle.manifest.budget['keep']:.4f} of the encoder's FLOPs at {length} tokens")


def ragged_masks(groups: Sequence[UnitGroup], keep: float, length: int, align: int = 1) -> dict[str, np.ndarray]:
    """Return masks by group that keep about this share of the FLOPs, falling by a straight line over the layers.

    At least one head and `align` neurons stay in a layer.
    """
    last = max(g.layer for g in groups)

    def at(offset: float) -> dict[str, np.ndarray]:
        masks = {}
        for g in groups:
            step = 1 if g.kind == "head" else align
            share = min(max(offset - g.layer / last, 0.0), 1.0)
            count = min(max(round(share * g.size / step), 1) * step, g.size)
            masks[g.name] = (np.arange(g.size) < count).astype(np.float64)
        return masks

    def share_of(masks: dict[str, np.ndarray]) -> float:
        kept = sum(int(masks[g.name].sum()) * unit_flops(g, length) for g in groups)
        return kept / encoder_flops(groups, length)

    low, high = 0.0, 2.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if share_of(at(middle)) < keep else (low, middle)
    return at(high)


def subjects_of(folder: Path, precisions: Sequence[str] = ("fp32", "int8")) -> list[Subject]:
    """Return the dense and the virtual model, and every sliced one in these precisions, named by its share."""
    lower = [p for p in precisions if p != "fp32"]
    bundles = {keep: Bundle.open(folder / f"{keep:g}") for keep in KEEPS}
    found = bundle_subjects(bundles[KEEPS[1]], ["dense", "virtual", *(f"dense:{p}" for p in lower)])
    for keep, bundle in bundles.items():
        for subject in bundle_subjects(bundle, ["sliced", *(f"sliced:{p}" for p in lower)]):
            found.append(Subject(**{**subject.to_dict(), "name": f"{keep:g} {subject.precision}"}))
    return found


@app.command()
def measure(
    folder: Path,
    out: Path,
    runtimes: str = "ort-cpu,openvino,torch-compile",
    batches: str = "1,8,32",
    seqs: str = "32,128,384",
    threads: int = 2,
    seconds: float = 4.0,
    rounds: int = 6,
    precisions: str = "fp32,int8",
    models: Annotated[str, typer.Option(help="Only models whose names hold one of these, comma-separated.")] = "",
) -> None:
    """Measure every cell, small ones first; a line of JSON a cell."""
    asked, parts = precisions.split(","), models.split(",")
    subjects = [s for s in subjects_of(folder, asked) if not models or any(part in s.name for part in parts)]
    done = [_place(json.loads(line)) for line in out.read_text().splitlines()] if out.is_file() else []
    cells = product(runtimes.split(","), map(int, batches.split(",")), map(int, seqs.split(",")))
    for runtime, batch, seq in sorted(cells, key=lambda c: c[1] * c[2]):
        if (runtime, batch, seq, threads) in done:
            continue
        settings = BenchSettings(
            runtimes=(runtime,), batches=(batch,), seqs=(seq,), threads=(threads,), seconds=seconds, min_rounds=rounds
        )
        result, _ = bench(subjects, settings, leave_out=without_file if "int8" in asked else None)
        with open(out, "a", encoding="utf-8") as file:
            file.write(json.dumps({"folder": folder.name, **result}) + "\n")
        print(f"{runtime} {batch} x {seq}: " + ", ".join(_said(m) for m in result["measurements"]), flush=True)
        for failure in result["failures"]:
            print(f"  not measured: {failure['model']}: {failure['reason'].splitlines()[0]}", flush=True)


@app.command()
def keep(path: Path, out: Path) -> None:
    """Write what `measure` found as one JSON document without the details, for docs/results."""
    results = sorted((json.loads(line) for line in path.read_text().splitlines()), key=_place)
    document = {"shape": path.stem, "machine": results[0]["machine"], "cells": [_cell(result) for result in results]}
    write_atomically(out, json.dumps(document, indent=1) + "\n")


def _cell(result: dict[str, Any]) -> dict[str, Any]:
    gpus = result["noise"][0].get("gpus")  # read right after the turns: their clocks at work
    kept = ("latency_ms", "ratio", "difference", "flops", "peak_rss_bytes", "resident_bytes", "file_bytes", "rounds")
    if gpus:
        kept += ("provider", "device_ms", "device_ratio", "device_bytes", "gpu_joules_per_run", "cuda_graphs")
    return {
        **dict(zip(("runtime", "batch", "seq", "threads"), _place(result), strict=True)),
        "noise_floor": result["noise"][0]["floor"],
        **({"gpus": gpus} if gpus else {}),
        "models": {m["model"]: {key: m[key] for key in kept} for m in result["measurements"]},
        "failures": {f["model"]: f["reason"] for f in result["failures"]},
    }


@app.command()
def profile(
    folder: Path, precision: str = "int8", keep: float = 0.5, batch: int = 1, seq: int = 128, threads: int = 2
) -> None:
    """Print the ms of a run that ONNX Runtime spends in each operator, dense and sliced, by its own profiler."""
    found = {}
    for variant, share in (("dense", KEEPS[1]), ("sliced", keep)):
        bundle = Bundle.open(folder / f"{share:g}")
        (subject,) = bundle_subjects(bundle, [f"{variant}:{precision}"])
        runner: Any = subject.open("ort-cpu", threads)
        with runner:
            found[variant] = operator_ms(runner.path, subject.feeds(runner, batch, seq), threads)
    print("| operator | dense ms | sliced ms | ratio |\n|---|---|---|---|")
    for name in sorted(found["dense"], key=lambda n: -found["dense"][n]):
        dense, sliced = found["dense"][name], found["sliced"].get(name, 0.0)
        print(f"| {name} | {dense:.3f} | {sliced:.3f} | {sliced / dense if dense else 0:.2f} |")
    total = {variant: sum(ms.values()) for variant, ms in found.items()}
    ratio = total["sliced"] / total["dense"]
    print(f"| all | {total['dense']:.3f} | {total['sliced']:.3f} | {ratio:.2f} |")


@app.command()
def fusion(folder: Path, batch: int = 1, seq: int = 128, threads: int = 2, rounds: int = 20) -> None:
    """Print what ONNX Runtime takes for the exported files and for copies whose residuals are Adds, which it fuses."""
    import onnx

    bundle = Bundle.open(folder / f"{KEEPS[1]:g}")
    print("| model | Sum ms | Add ms | Sum / Add |\n|---|---|---|---|")
    for (subject,) in (bundle_subjects(bundle, [name]) for name in ("dense", "sliced", "dense:int8", "sliced:int8")):
        runner: Any = subject.open("ort-cpu", threads)
        proto = onnx.load(runner.path)
        for node in proto.graph.node:
            if node.op_type == "Sum":
                node.op_type = "Add"
        with tempfile.TemporaryDirectory() as scratch:
            onnx.save(proto, Path(scratch) / "add.onnx")
            pair = [file_subject("sum", runner.path), file_subject("add", Path(scratch) / "add.onnx")]
            settings = BenchSettings(seconds=4.0, min_rounds=rounds)
            samples = time_subjects(pair, Place("ort-cpu", batch, seq, threads), settings).samples
        sums, adds = (np.median(samples[name].rounds()) / 1e6 for name in ("sum", "add"))
        print(f"| {subject.name} | {sums:.2f} | {adds:.2f} | {sums / adds:.3f} |")


def operator_ms(path: Path, feeds: dict[str, np.ndarray], threads: int, runs: int = 30) -> dict[str, float]:
    """Return the mean ms a run of every operator of an ONNX file; the first runs are left out."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads, options.enable_profiling = threads, True
    with tempfile.TemporaryDirectory() as scratch:
        options.profile_file_prefix = str(Path(scratch) / "ort")
        session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        for _ in range(2 * runs):
            session.run(None, feeds)
        events = json.loads(Path(session.end_profiling()).read_text())
    kernels = [e for e in events if e.get("cat") == "Node" and e["name"].endswith("_kernel_time")]
    found: dict[str, float] = {}
    for event in kernels[len(kernels) // 2 :]:
        name = event["args"]["op_name"]
        found[name] = found.get(name, 0.0) + event["dur"] / 1000 / runs
    return found


def _said(m: dict[str, Any]) -> str:
    return f"{m['model']} {m['latency_ms']['median']:.1f} ms ({m['ratio']['value'] if m['ratio'] else 0:.3f})"


def _place(result: dict[str, Any]) -> tuple[str, int, int, int]:
    s = result["settings"]
    return s["runtimes"][0], s["batches"][0], s["seqs"][0], s["threads"][0]


if __name__ == "__main__":
    app()
