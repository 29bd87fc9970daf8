"""Turn docs/results/*.json into the tables of docs/results.md, between its markers.

python recipes/experiments/tables.py
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev
from typing import Any

DOCS = Path(__file__).resolve().parents[2] / "docs"
METHODS = (
    "search",
    "+rearrange",
    "+mask tuning",
    "floor: search",
    "floor: +rearrange, mask tuning",
    "floor: +rearrange, refit",
    "floor: refit (default)",
)
COLUMNS = ("metric", "agreement", "kl", "rmse", "seconds")


def table(path: Path) -> str:
    """Return one Markdown table: a row per method and budget, mean over seeds with the standard deviation."""
    document = json.loads(path.read_text("utf-8"))
    metric, rows = document["metric"], document["rows"]
    cells: dict[tuple[float, str], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        cells[row["keep"], row["method"]].append({**row, "metric": row[metric]})
    dense = cells.pop((1.0, "dense"))[0]["metric"]
    columns = [c for c in COLUMNS if any(r.get(c) is not None for part in cells.values() for r in part)]
    machine = document["machine"]
    first = next(iter(cells.values()))[0]
    lines = [
        f"{document['model']}, {document['task']}: dense {metric} {dense:.4f} on {document['evaluated']['rows']} rows;"
        f" {first['samples']} calibration samples, budget at {first['seq_len']} tokens,"
        f" seeds {sorted({r['seed'] for part in cells.values() for r in part})};"
        f" {machine.get('cpu_model', machine.get('cpu'))}, {machine['threads']} threads.",
        "",
        "| keep | method | " + " | ".join(metric if c == "metric" else c for c in columns) + " |",
        "|---|---|" + "---|" * len(columns),
    ]
    for keep in sorted({k for k, _ in cells}, reverse=True):
        for method in METHODS:
            part = cells.get((keep, method))
            if part:
                lines.append(f"| {keep:g} | {method} | " + " | ".join(_cell(part, c) for c in columns) + " |")
    return "\n".join(lines)


def _cell(rows: list[dict[str, Any]], column: str) -> str:
    values = [r[column] for r in rows]
    digits = {"kl": 4, "seconds": 0}.get(column, 4)
    spread = f" ± {stdev(values):.{digits}f}" if len(values) > 1 and column != "seconds" else ""
    return f"{mean(values):.{digits}f}{spread}"


def main() -> None:
    """Rewrite the tables in place."""
    path = DOCS / "results.md"
    text = path.read_text("utf-8")
    for source in sorted((DOCS / "results").glob("*.json")):
        if "rows" not in json.loads(source.read_text("utf-8")):
            continue
        begin, end = f"<!-- {source.stem} -->", f"<!-- /{source.stem} -->"
        if begin not in text:
            raise SystemExit(f"{path} has no place for {source.name}: add {begin} and {end}")
        text = re.sub(f"{begin}.*?{end}", lambda _, b=begin, e=end, s=source: f"{b}\n{table(s)}\n{e}", text, flags=re.S)
    path.write_text(text, "utf-8")


if __name__ == "__main__":
    main()
