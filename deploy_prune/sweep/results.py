"""What a sweep found: a row a cell in results.parquet, and means over seeds with the front. No torch."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from .. import __version__
from ..disk import disk_errors, write_atomically
from ..errors import MissingExtraError, VerdictError
from ..runtime_bench.stats import half_width
from .settings import SweepSettings

TEXT, REAL, WHOLE = "string", "float64", "int64"
COLUMNS = {
    **dict.fromkeys(("model", "task", "budget"), TEXT),
    "keep": REAL,
    "seed": WHOLE,
    **dict.fromkeys(("criterion", "compensate", "status", "reason", "metric"), TEXT),
    **dict.fromkeys(("quality_dense", "quality_sliced", "agreement", "kl", "rmse", "cosine"), REAL),
    **dict.fromkeys(("kept_flops", "kept_params"), REAL),
    **dict.fromkeys(("flops", "flops_dense", "params", "params_dense", "seq_len", "samples", "declined"), WHOLE),
    **dict.fromkeys(("plan_hash", "weights_hash"), TEXT),
    **dict.fromkeys(("runtime", "bench_on"), TEXT),
    **dict.fromkeys(("batch", "seq", "bench_threads"), WHOLE),
    **dict.fromkeys(("latency_ms", "latency_ms_dense", "ratio", "ratio_low", "ratio_high"), REAL),
    **dict.fromkeys(("bench_host", "bench_cpu"), TEXT),
    "threads": WHOLE,
    **{f"seconds_{name}": REAL for name in ("load", "calibrate", "score", "search", "rearrange", "compensate")},
    **dict.fromkeys(("seconds_evaluate", "seconds", "seconds_bench"), REAL),
    "host": TEXT,
    "pid": WHOLE,
    "key": TEXT,
}
BY = ("model", "task", "keep", "criterion", "compensate", "runtime", "bench_on")
MEANS = ("quality_sliced", "agreement", "kl", "rmse", "cosine", "kept_flops", "kept_params", "flops", "ratio")
QUALITIES = ("quality_sliced", "agreement", "cosine")  # the first that was measured is the height of the front
Mean = tuple[float, float | None]  # and the half width of its interval


@dataclass(frozen=True)
class Point:
    """Place one model, pruned in one way or dense (no keep), by cost and quality; `half` is the quality's interval."""

    model: str
    method: str
    keep: float | None
    cost: float
    quality: float
    half: float | None
    front: bool = False


@dataclass(frozen=True)
class Front:
    """Hold the points of one task, and of one runtime where latency was measured; `cost` names what x is."""

    task: str
    where: str
    cost: str
    quality: str
    points: tuple[Point, ...]


@dataclass(frozen=True)
class Sweep:
    """Hold a finished sweep: its rows, their means, the fronts, what it took, and its files."""

    rows: list[dict[str, Any]]
    summary: list[dict[str, Any]]
    fronts: list[Front]
    account: dict[str, Any]
    files: list[Path]

    @property
    def failed(self) -> list[dict[str, Any]]:
        return [row for row in self.rows if row["status"] == "failed"]

    def check(self) -> None:
        """Raise VerdictError where a cell has failed."""
        if self.failed:
            raise VerdictError(
                f"{len(self.failed)} of {len(self.rows)} rows failed; the first: {self.failed[0]['reason']}",
                hint="results.md lists them. The same command computes them again, and only them.",
            )

    def to_dict(self) -> dict[str, Any]:
        """Return the sweep as one JSON document."""
        return {
            **self.account,
            "rows": len(self.rows),
            "failed": [{name: row[name] for name in (*BY, "seed", "reason")} for row in self.failed],
            "summary": self.summary,
            "fronts": [asdict(front) for front in self.fronts],
            "files": [str(file) for file in self.files],
        }


def finish(settings: SweepSettings, rows: Sequence[Mapping[str, Any]], account: dict[str, Any], out: Path) -> Sweep:
    """Write results.parquet, results.md and report.html; return the sweep."""
    from .report import as_html, as_markdown  # needs this module

    whole = [{name: row.get(name) for name in COLUMNS} for row in rows]
    files = [out / name for name in ("results.parquet", "results.md", "report.html")]
    summary = summarise(whole)
    sweep = Sweep(whole, summary, fronts(whole, summary), account, files)
    write_parquet(whole, {"settings": settings.model_dump(mode="json"), **account}, files[0])
    write_atomically(files[1], as_markdown(sweep))
    write_atomically(files[2], as_html(sweep))
    return sweep


def write_parquet(rows: Sequence[Mapping[str, Any]], about: Mapping[str, Any], path: Path) -> None:
    """Write rows with `COLUMNS`; the schema's metadata hold `about` and the version as JSON under "deploy_prune"."""
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError as error:
        raise MissingExtraError("pyarrow", "sweep") from error
    about = {"version": __version__, **about}
    fields = [pa.field(name, getattr(pa, kind)()) for name, kind in COLUMNS.items()]
    schema = pa.schema(fields, metadata={"deploy_prune": json.dumps(about)})
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with disk_errors(path):
        try:
            parquet.write_table(pa.Table.from_pylist([dict(row) for row in rows], schema=schema), temporary)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def summarise(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return one entry for all seeds of a cell: means with half widths of 95% t-intervals, runs, and failures.

    "latency_ms" is the mean ratio to the dense model times that model's mean latency: ratios are measured side by
    side, so that it does not matter how fast the machine was at that hour.
    """
    dense = dense_latency(rows)
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in BY), []).append(row)
    found = []
    for key, own in groups.items():
        done = [row for row in own if row["status"] == "done"]
        entry: dict[str, Any] = dict(zip(BY, key, strict=True)) | {"runs": len(done), "failed": len(own) - len(done)}
        entry["metric"] = next((row["metric"] for row in done), None)
        for name in MEANS:
            entry[name] = mean_of([row[name] for row in done])
        lost = [r["quality_dense"] - r["quality_sliced"] for r in done if r["quality_sliced"] is not None]
        entry["quality_loss"] = mean_of(lost)
        ms, ratio = dense.get(_place(entry)), entry["ratio"]
        entry["latency_ms"] = (ms * ratio[0], ratio[1] and ms * ratio[1]) if ms and ratio else None
        found.append(entry)
    return found


def mean_of(values: Sequence[float | None]) -> Mean | None:
    """Return the mean and its interval's half width; None where nothing was measured."""
    there = [float(value) for value in values if value is not None]
    return (float(np.mean(there)), half_width(there)) if there else None


def dense_latency(rows: Sequence[Mapping[str, Any]]) -> dict[tuple[Any, ...], float]:
    """Return each dense model's mean latency in ms, by model, task, runtime and node."""
    found: dict[tuple[Any, ...], list[float]] = {}
    for row in rows:
        if row["latency_ms_dense"] is not None:
            found.setdefault(_place(row), []).append(row["latency_ms_dense"])
    return {place: float(np.mean(values)) for place, values in found.items()}


def _place(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("model", "task", "runtime", "bench_on"))


def fronts(rows: Sequence[Mapping[str, Any]], summary: Sequence[Mapping[str, Any]]) -> list[Front]:
    """Return the points of every task and runtime, those on the Pareto front marked, the cheapest first.

    The cost is latency where it was measured, else FLOPs; the dense models are points too.
    """
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for entry in summary:
        if entry["runs"]:
            groups.setdefault((entry["task"], entry["runtime"], entry["bench_on"]), []).append(entry)
    found = []
    for (task, runtime, node), entries in groups.items():
        cost = "flops" if runtime is None else "latency_ms"
        quality = next((name for name in QUALITIES if any(e[name] for e in entries)), None)
        if quality is None:
            continue
        points = [
            Point(e["model"], f"{e['criterion']}, {e['compensate']}", e["keep"], e[cost][0], *e[quality])
            for e in entries
            if e[cost] and e[quality]
        ]
        at = {"task": task, "runtime": runtime, "bench_on": node, "status": "done"}
        own = [row for row in rows if all(row[name] == value for name, value in at.items())]
        for model in dict.fromkeys(row["model"] for row in own):
            same = [row for row in own if row["model"] == model]
            costs = mean_of([row["flops_dense" if runtime is None else "latency_ms_dense"] for row in same])
            best = mean_of([row["quality_dense"] for row in same]) if quality == "quality_sliced" else (1.0, None)
            if costs and best:
                points.append(Point(model, "dense", None, costs[0], best[0], None))
        where = "" if runtime is None else f"{runtime} on {node}"
        name = entries[0]["metric"] if quality == "quality_sliced" else quality
        found.append(Front(task, where, cost, name, tuple(marked(points))))
    return found


def marked(points: Sequence[Point]) -> list[Point]:
    """Return points by cost; a point is on the front if every cheaper one is worse, and every better one dearer."""
    best: tuple[float, float] | None = None  # cost and quality of the last one on the front
    found = []
    for point in sorted(points, key=lambda p: (p.cost, -p.quality)):
        front = best is None or point.quality > best[1] or (point.cost, point.quality) == best
        best = (point.cost, point.quality) if front else best
        found.append(replace(point, front=front))
    return found
