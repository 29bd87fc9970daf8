"""The command that looks for what meets a latency and a quality."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import typer
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from . import screen
from .flags import Json, settings_command
from .tune import TuneSettings

app = typer.Typer()


@app.command()
@settings_command(
    TuneSettings, "tune", file=typer.Option("--config", "-c", help="The settings as a TOML file; flags override it.")
)
def tune(
    model: Annotated[
        str, typer.Argument(help="Hub id or folder of the dense checkpoint; 'demo' is the built-in one.")
    ] = "demo",
    *,
    settings: TuneSettings,
    as_json: Json = False,
) -> None:
    """Find what to keep, and in which form, so that a latency is reached at the least loss of quality.

    Every candidate is measured beside the dense model, and evaluated by the very file that would be shipped; the winner
    is written as a bundle. Exit code 1 where nothing meets both limits. Run again, it goes on with OUT.tune's trials.

    [bold]Examples[/bold]

      deploy-prune tune ./my-bert --task sst2 --data glue/SST-2 --target-latency-ms 5 --max-quality-loss 1

      deploy-prune tune ./my-bert --target-latency-ms 5 --runtimes ort-cpu,openvino --lut lut.json --trials 40
    """
    from .tune.run import tune as search

    with screen.Bars() as bars:
        found = search(model, settings, bars)
    if not as_json:
        print_tuned(found.document)
    found.check()
    assert found.bundle is not None
    if as_json:
        screen.print_json({"bundle": str(found.bundle.root), **found.document})
        return
    screen.out.print(f"Trials: {found.path}", soft_wrap=True, highlight=False)
    screen.out.print(f"Bundle: {found.bundle.root}", soft_wrap=True, highlight=False)


def print_tuned(document: Mapping[str, Any]) -> None:
    """Print the front, why the winner won, and which limit the nearest others failed."""
    records = {r["number"]: r for r in document["trials"]}
    where = f"batch {document['batch']}, {document['seq_len']} tokens, {document['threads']} threads"
    title = f"The front: quality against latency ({where})"
    grid = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for name in ("#", "keep", "align", "form", "ms", "interval", str(document["metric"] or "quality"), "points lost"):
        side: Literal["left", "right"] = "left" if name == "form" else "right"
        grid.add_column(name, justify=side, overflow="fold", no_wrap=name == "interval")
    for number in document["front"]:
        r = records[number]
        latency, won = r["latency"], number == document["winner"]
        cells = (
            str(number),
            f"{r['keep']:.2f}",
            str(r["align"]),
            r["form"],
            f"{latency['median_ms']:.3g}",
            f"{latency['low_ms']:.3g}-{latency['high_ms']:.3g}",
            f"{r['value']:.4f}",
            f"{r['loss']:.2f}",
        )
        grid.add_row(*map(escape, cells), style="bold" if won else None)
    if document["front"]:
        screen.out.print(grid)
    counts = ", ".join(f"{n} {state}" for state, n in document["counts"].items())
    said = [f"Candidates: {counts}.", *(f"Left out: {line}" for line in document["left_out"])]
    said += [document["why"]] if document["why"] else []
    said += [f"Failed: {line}" for line in document["near_misses"]]
    said += [f"Not made: {line}" for line in document["not_made"]]
    for line in said:
        screen.out.print(line, soft_wrap=True, highlight=False, markup=False)
