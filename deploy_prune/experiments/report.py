"""Write an experiment's rows: JSON with the machine, CSV, a Markdown table of means, an SVG figure."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..disk import write_atomically
from ..errors import MissingExtraError
from ..runtime_bench.stats import half_width
from .catalogue import Experiment


def document_of(name: str, experiment: Experiment, lab: Any, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what NAME.json holds."""
    setting = {**vars(lab.setting), "model": Path(lab.setting.model).name, "data": None, "lut": None}
    setting["rival"] = setting["rival"] and Path(setting["rival"]).name
    return {
        "experiment": name,
        "title": experiment.title,
        "setting": setting,
        "dense": lab.dense_row,
        "evaluated": {"split": lab.data.evaluation.name, "rows": len(lab.data.evaluation)},
        "machine": lab.machine(),
        "by": list(experiment.by),
        "columns": list(experiment.columns),
        "figure": experiment.figure,
        "rows": list(rows),
    }


def write(document: Mapping[str, Any], out: Path, stem: str) -> list[Path]:
    """Write the four files and return their paths; the figure only where there is one to draw."""
    files = {".json": json.dumps(document, indent=1) + "\n", ".csv": as_csv(document), ".md": as_markdown(document)}
    if document["figure"]:
        files[".svg"] = as_svg(document)
    for suffix, text in files.items():
        write_atomically(out / f"{stem}{suffix}", text)
    return [out / f"{stem}{suffix}" for suffix in files]


def summarise(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return a row per cell: mean, half width of its 95% t-interval (null for one run) and number of runs."""
    cells: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in document["rows"]:
        cells.setdefault(tuple(row[key] for key in document["by"]), []).append(row)
    summary = []
    for key, rows in cells.items():
        cell: dict[str, Any] = dict(zip(document["by"], key, strict=True)) | {"runs": len(rows)}
        for column in document["columns"]:
            values = [float(r[column]) for r in rows if r.get(column) is not None]
            cell[column] = None if not values else (float(np.mean(values)), half_width(values))
        summary.append(cell)
    return summary


def as_csv(document: Mapping[str, Any]) -> str:
    """Return every row with its plain values."""
    rows = [{k: v for k, v in row.items() if not isinstance(v, dict | list)} for row in document["rows"]]
    names = list(dict.fromkeys(name for row in rows for name in row))
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, names)
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


def as_markdown(document: Mapping[str, Any]) -> str:
    """Return the table of means, with a line that says on what."""
    setting, dense, machine = document["setting"], document["dense"], document["machine"]
    summary = summarise(document)
    columns = [c for c in document["columns"] if any(cell[c] is not None for cell in summary)]
    names = [dense["metric"] if c == "value" else c for c in columns]
    value = "-" if dense["value"] is None else f"{dense['value']:.4f}"
    runs = {cell["runs"] for cell in summary}
    lines = [
        f"{setting['model']}, {setting['task']}: dense {dense['metric']} {value}"
        f" on {document['evaluated']['rows']} rows; {setting['samples']} samples,"
        f" {'/'.join(map(str, sorted(runs)))} run(s) per cell, means with 95% t-intervals;"
        f" {machine['cpu']}, {machine['threads']} threads.",
        "",
        "| " + " | ".join([*document["by"], *names]) + " |",
        "|" + "---|" * (len(document["by"]) + len(names)),
    ]
    for cell in summary:
        shown = [f"{cell[k]:g}" if isinstance(cell[k], float) else str(cell[k]) for k in document["by"]]
        lines.append("| " + " | ".join([*shown, *(_shown(c, cell[c]) for c in columns)]) + " |")
    return "\n".join(lines) + "\n"


def _shown(column: str, cell: tuple[float, float | None] | None) -> str:
    if cell is None:
        return "-"
    mean, half = cell
    digits = 1 if column in ("seconds", "total") else 4
    text = f"{mean:.1e}" if column == "max_abs" else f"{mean:.{digits}f}"
    return text if half is None or column in ("seconds", "max_abs") else f"{text} ± {half:.{digits}f}"


def as_svg(document: Mapping[str, Any]) -> str:
    """Return the figure: a line per value of its third column, with intervals."""
    try:
        import matplotlib
    except ImportError as error:
        raise MissingExtraError("matplotlib", "ci") from error
    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "deploy_prune"  # the same figure gives the same file
    from matplotlib import pyplot

    x, y, series = document["figure"]
    figure, axes = pyplot.subplots(figsize=(6.4, 4.0), layout="constrained")
    summary = summarise(document)
    for name in dict.fromkeys(cell[series] for cell in summary):
        points = [(_place(c[x]), *c[y]) for c in summary if c[series] == name and _place(c[x]) is not None and c[y]]
        points.sort()
        bars = [half or 0.0 for _, _, half in points]
        axes.errorbar([p[0] for p in points], [p[1] for p in points], yerr=bars, marker="o", capsize=3, label=str(name))
    dense, metric = document["dense"]["value"], document["dense"]["metric"]
    if y == "value" and dense is not None:
        axes.axhline(dense, color="0.5", linestyle="--", label="dense")
    axes.set(xlabel=x.replace("_", " "), ylabel=metric if y == "value" else y.replace("_", " "))
    axes.set_title(f"{document['title']}: {document['setting']['model']}, {document['setting']['task']}")
    axes.grid(alpha=0.3)
    axes.legend()
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    pyplot.close(figure)
    return buffer.getvalue()


def _place(value: Any) -> float | None:
    """Return where a cell lies on the x axis: its own value, or the mean of a measured column."""
    return value[0] if isinstance(value, tuple) else value
