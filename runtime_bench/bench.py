"""Measure a bundle: each runtime at each shape in a process of its own, its variants side by side."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from typing import Any

from ..bundle import VARIANTS, Bundle, Variant, disk_errors
from ..errors import InputError
from ..runtimes import available_runtimes
from .isolate import WorkerError, run_isolated
from .machine import default_threads, describe_machine
from .stats import ratio_of_medians, summarise_ms

SCHEMA_VERSION = "1.0"
_CELLS = "deploy_prune.runtime_bench.cells"


def bench_bundle(
    bundle: Bundle,
    *,
    runtimes: Sequence[str] = ("ort-cpu", "torch"),
    batches: Sequence[int] = (1,),
    seqs: Sequence[int] | None = None,
    variants: Sequence[Variant] = VARIANTS,
    max_seconds_per_cell: float = 4.0,
    min_rounds: int = 10,
    threads: int | None = None,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Measure latency and peak memory and store the result as bench/*.json; the caller commits.

    `seqs` defaults to the budget's sequence length, `threads` to the physical cores. The latency of
    one runtime at one shape takes at most `max_seconds_per_cell`, or `min_rounds` rounds if those take
    longer. What fails is listed under "failures" and stops nothing else. The result replaces an older
    one of the same settings. Raises InputError for an unknown runtime or variant or a size below 1.
    """
    seqs = [int(bundle.manifest.budget["seq_len"])] if seqs is None else list(seqs)
    _check(runtimes, variants, [*batches, *seqs])
    threads = default_threads() if threads is None else threads
    result: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "created": datetime.now(UTC).isoformat(),
        "settings": {
            "runtimes": list(runtimes),
            "batches": list(batches),
            "seqs": seqs,
            "variants": list(variants),
            "threads": threads,
            "max_seconds_per_cell": max_seconds_per_cell,
            "min_rounds": min_rounds,
        },
        "machine": describe_machine(threads),
        "measurements": [],
        "failures": [],
    }
    for runtime, batch, seq in product(runtimes, batches, seqs):
        cell = {"runtime": runtime, "batch": batch, "seq": seq, "threads": threads}
        root = str(bundle.root.resolve())
        models = {variant: {"root": root, "variant": variant} for variant in variants}
        if progress:
            progress(f"latency {runtime} {batch}x{seq}")
        limits = {"max_seconds": max_seconds_per_cell, "min_rounds": min_rounds}
        try:
            timed = run_isolated(f"{_CELLS}:time_cell", {**cell, "models": models, **limits})
        except WorkerError as error:
            result["failures"].append({**cell, "variant": None, "stage": "latency", **_reason(error)})
            continue
        for variant, failure in timed["failures"].items():
            result["failures"].append({**cell, "variant": variant, "stage": "latency", **failure})
        for variant in timed["samples"]:
            measurement = {**cell, "variant": variant, **_latency(timed["samples"], variant)}
            if progress:
                progress(f"memory {runtime} {batch}x{seq} {variant}")
            try:
                measurement |= run_isolated(f"{_CELLS}:memory_cell", {**cell, "root": root, "variant": variant})
            except WorkerError as error:
                measurement |= {"peak_rss_bytes": None, "baseline_rss_bytes": None}
                result["failures"].append({**cell, "variant": variant, "stage": "memory", **_reason(error)})
            result["measurements"].append(measurement)
    _store(bundle, result)
    return result


def _check(runtimes: Sequence[str], variants: Sequence[str], sizes: Sequence[int]) -> None:
    for runtime in runtimes:
        if runtime not in available_runtimes():
            there = ", ".join(sorted(available_runtimes()))
            raise InputError(f"No runtime '{runtime}'.", hint=f"There are: {there}.")
    for variant in variants:
        if variant not in VARIANTS:
            raise InputError(f"No variant '{variant}'.", hint=f"There are: {', '.join(VARIANTS)}.")
    if wrong := [size for size in sizes if size < 1]:
        raise InputError(f"A batch or length of {wrong[0]} cannot be measured.", hint="Give 1 or more.")


def _latency(samples: dict[str, dict[str, Any]], variant: str) -> dict[str, Any]:
    """Return the summary of one variant's samples and its ratio to the dense ones of the same rounds."""
    own, dense = samples[variant], samples.get("dense")

    def ratio(clock: str) -> dict[str, float] | None:
        if dense is None or summarise_ms(dense[clock])["median"] == 0:  # a clock too coarse for this model
            return None
        return ratio_of_medians(own[clock], dense[clock]).to_dict()

    return {
        "provider": own["provider"],
        "samples": len(own["wall_ns"]),
        "latency_ms": summarise_ms(own["wall_ns"]),
        "cpu_ms": summarise_ms(own["cpu_ns"]),
        "ratio_to_dense": ratio("wall_ns"),
        "cpu_ratio_to_dense": ratio("cpu_ns"),
    }


def _reason(error: WorkerError) -> dict[str, str]:
    return {"kind": error.kind, "reason": error.message, "traceback": error.traceback}


def _store(bundle: Bundle, result: dict[str, Any]) -> None:
    """Add the result to the bundle in place of an older one of the same settings."""
    s = result["settings"]
    shapes = f"b{'+'.join(map(str, s['batches']))}-s{'+'.join(map(str, s['seqs']))}"
    stem = re.sub(r"[^\w+.-]", "_", f"{'+'.join(s['runtimes'])}-{shapes}-t{s['threads']}-{'+'.join(s['variants'])}")
    older = [n for n in bundle.manifest.files if re.fullmatch(rf"bench/{re.escape(stem)}-[0-9a-f]{{12}}\.json", n)]
    with disk_errors(bundle.root), tempfile.TemporaryDirectory(prefix=".bench-", dir=bundle.root) as folder:
        path = Path(folder) / "result.json"
        path.write_text(json.dumps(result, indent=2) + "\n", "utf-8")
        added = bundle.add_file(path, "bench", stem)
    for name in older:
        if name != added:
            del bundle.manifest.files[name]


def latest_bench(bundle: Bundle) -> dict[str, Any]:
    """Return the newest measurement of each runtime, variant and shape: {"machine", "measurements", "failures"}.

    Newest first; the machine is that of the newest result, {} when nothing was measured.
    """
    names = [n for n in bundle.manifest.files if n.startswith("bench/") and n.endswith(".json")]
    results = [json.loads(bundle.path(name).read_text("utf-8")) for name in names]
    results.sort(key=lambda r: r["created"], reverse=True)
    merged: dict[tuple[Any, ...], dict[str, Any]] = {}
    failures: list[dict[str, Any]] = []
    for result in results:
        newer = {key[:4] for key in merged} | {_cell(f) for f in failures}
        failures += [f for f in result["failures"] if _cell(f) not in newer]
        for m in result["measurements"]:
            merged.setdefault((*_cell(m), m["variant"]), m)
    machine = results[0]["machine"] if results else {}
    return {"machine": machine, "measurements": list(merged.values()), "failures": failures}


def _cell(entry: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(entry[key] for key in ("runtime", "batch", "seq", "threads"))
