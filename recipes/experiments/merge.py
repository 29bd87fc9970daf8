"""Put the rows of one experiment's runs, a seed each, into one document, with its table.

python recipes/experiments/merge.py docs/results/vit-s-fashion OUT/vit-s-fashion-vit-*.json

Runs that were ended by the clock are given by their NAME.partial.json.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from deploy_prune.experiments.report import write


def merged(documents: list[dict[str, Any]]) -> dict[str, Any]:
    """Return one document with all rows; dense value and machine are the first one's."""
    first = documents[0]
    for document in documents[1:]:
        if (this := _same(document)) != (wanted := _same(first)):
            raise SystemExit(f"These are no runs of one experiment: {wanted} and {this}.")
    rows = [row for document in documents for row in document["rows"]]
    cells = [(row["seed"], *(row[name] for name in first["by"])) for row in rows]
    if len({*cells}) < len(cells):
        raise SystemExit("A cell comes twice: give each run once.")
    seeds = sorted({seed for document in documents for seed in document["setting"]["seeds"]})
    return first | {"rows": rows, "setting": first["setting"] | {"seeds": seeds}}


def _same(document: dict[str, Any]) -> dict[str, Any]:
    """Return what all runs of an experiment have in common; only `recover` reads the settings of recovery."""
    other = ("seeds",) if document["experiment"] == "recover" else ("seeds", "recover_")
    setting = {name: value for name, value in document["setting"].items() if not name.startswith(other)}
    return {"experiment": document["experiment"], "evaluated": document["evaluated"], "setting": setting}


def main(
    out: Annotated[Path, typer.Argument(help="Folder and stem of the files that are written.")],
    runs: Annotated[list[Path], typer.Argument(help="JSON files of the runs.", exists=True)],
) -> None:
    """Write OUT.json, OUT.csv, OUT.md and, where the experiment has a figure, OUT.svg."""
    documents = [json.loads(run.read_text("utf-8")) for run in sorted(runs)]
    for file in write(merged(documents), out.parent, out.name):
        print(file)


if __name__ == "__main__":
    typer.run(main)
