"""Keep what was measured: a result's files in a bundle or beside a path, the newest of each cell, lines that say it."""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..bundle import Bundle
from ..disk import disk_errors
from ..errors import InputError
from ..npz import read_npz
from .timing import Samples

SCHEMA_VERSION = "2.0"
BASELINE = "dense"


def raw_runs(samples: Mapping[str, Samples], where: Mapping[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    """Name the samples of a cell, by model: wall, processor and (where told) device ns of every run, and its round."""
    for model, own in samples.items():
        stem = _stem({**where, "model": model})
        lengths = [len(turn) for turn in own.wall_ns]
        yield f"{stem}/wall_ns", np.array(own.flat(), np.int64)
        yield f"{stem}/cpu_ns", np.array(own.flat("cpu"), np.int64)
        if own.device_ns:
            yield f"{stem}/device_ns", np.array(own.flat("device"), np.int64)
        yield f"{stem}/round", np.repeat(np.arange(len(lengths)), lengths).astype(np.int32)


def _stem(entry: Mapping[str, Any]) -> str:
    """Name the samples of a model in a cell."""
    return "{runtime}/{batch}x{seq}/t{threads}/{model}".format_map(entry)


def samples_beside(out: Path) -> Path:
    """Return the file for every run beside a result's own. Raises InputError where they would be one file."""
    samples = out.with_suffix(".npz")
    if samples == out:
        raise InputError(
            f"The result cannot be written to {out}: its samples go there.",
            hint=f"Name it {out.with_suffix('.json').name}; the samples then lie beside it, in {out.name}.",
        )
    return samples


def keep_samples(samples: Mapping[str, np.ndarray], path: Path) -> str:
    """Write every run's ns beside a result, as bundles hold them; return the file's name."""
    with disk_errors(path):
        np.savez_compressed(path, allow_pickle=False, **samples)
    return path.name


def store_result(bundle: Bundle, result: dict[str, Any], samples: dict[str, np.ndarray]) -> None:
    """Add a result and its samples to a bundle in place of older ones of the same settings; the caller commits."""
    s = result["settings"]
    parts = [s["runtimes"], s["batches"], s["seqs"], s["threads"], s["models"]]
    digest = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:8]
    stem = re.sub(r"[^\w+.-]", "_", f"{'+'.join(s['runtimes'])[:80]}-{digest}")
    older = [n for n in bundle.manifest.files if re.fullmatch(rf"bench/{re.escape(stem)}-[0-9a-f]{{12}}\.\w+", n)]
    with disk_errors(bundle.root), tempfile.TemporaryDirectory(prefix=".bench-", dir=bundle.root) as folder:
        raw, path = Path(folder) / "samples.npz", Path(folder) / "result.json"
        np.savez_compressed(raw, allow_pickle=False, **samples)
        result["samples"] = bundle.add_file(raw, "bench", stem)
        path.write_text(json.dumps(result, indent=2) + "\n", "utf-8")
        added = {bundle.add_file(path, "bench", stem), result["samples"]}
    for name in older:
        if name not in added:
            del bundle.manifest.files[name]


def latest_bench(bundle: Bundle) -> dict[str, Any]:
    """Return the newest measurement of each model in each cell.

    As {"machine", "created", "measurements", "noise", "failures"}, newest first, by the manifest's order: a clock may
    have been set back. All of a cell are against one baseline, the dense model where it was ever measured there: ratios
    to two baselines do not compare. Machine and date are those of the newest result, {} and "" when nothing was
    measured. A measurement also names its "baseline", its "samples", the bundle's file of its raw runs, and its "cpu".
    Results of an older schema are left out.
    """
    names = [n for n in bundle.manifest.files if n.startswith("bench/") and n.endswith(".json")]
    results = [json.loads(bundle.path(name).read_text("utf-8")) for name in names]
    results = [r for r in reversed(results) if r.get("schema_version") == SCHEMA_VERSION]
    baselines: dict[tuple[Any, ...], str] = {}
    for result in results:
        for m in result["measurements"]:
            if result["baseline"] == BASELINE or _cell(m) not in baselines:
                baselines[_cell(m)] = result["baseline"]
    merged: dict[tuple[Any, ...], dict[str, Any]] = {}
    noise: dict[tuple[Any, ...], dict[str, Any]] = {}
    failures: list[dict[str, Any]] = []
    for result in results:
        newer = {key[:4] for key in merged} | {_cell(f) for f in failures}
        failures += [f for f in result["failures"] if _cell(f) not in newer]
        own = {"samples": result.get("samples"), "baseline": result["baseline"], "cpu": result["machine"]["cpu"]}
        for m in result["measurements"]:
            if result["baseline"] == baselines[_cell(m)]:
                merged.setdefault((*_cell(m), m["model"]), m | own)
        for n in result["noise"]:
            if result["baseline"] == baselines.get(_cell(n)):
                noise.setdefault(_cell(n), n)
    machine = results[0]["machine"] if results else {}
    return {
        "machine": machine,
        "created": results[0]["created"] if results else "",
        "measurements": list(merged.values()),
        "noise": list(noise.values()),
        "failures": failures,
    }


def _cell(entry: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(entry[key] for key in ("runtime", "batch", "seq", "threads"))


def stored_runs(bundle: Bundle, measurements: Iterable[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """Read every run's ms of measurements that `latest_bench` gave, by model; those without samples are left out."""
    found = {}
    for m in measurements:
        if m.get("samples"):
            name = f"{_stem(m)}/wall_ns"
            found[m["model"]] = read_npz(bundle.path(m["samples"]), [name])[name] / 1e6
    return found


def place_title(entry: Mapping[str, Any]) -> str:
    """Say where an entry of a result was measured; convolutional networks have no tokens to speak of."""
    tokens = f", {entry['seq']} tokens" if entry["seq"] > 1 else ""
    return f"{entry['runtime']}, batch {entry['batch']}{tokens}, {entry['threads']} threads"


def sensed_line(m: Mapping[str, Any]) -> str:
    """Say what the hardware told of a measurement's runs: the device's time and memory, energy; "" for no sensor."""
    said = []
    if device := m.get("device_ms"):
        said.append(f"{device['median']:.2f} ms on the device" + (", CUDA graphs" if m.get("cuda_graphs") else ""))
    if m.get("device_bytes"):
        said.append(f"{m['device_bytes'] / 1e6:.0f} MB of its memory")
    for part, key in (("the processor", "cpu_joules_per_run"), ("the GPU", "gpu_joules_per_run")):
        if m.get(key) is not None:
            said.append(f"{m[key]:.3g} J a run in {part}")
    return ", ".join(said)
