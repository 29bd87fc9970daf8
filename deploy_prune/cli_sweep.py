"""The command that fills a table of many models, tasks, budgets, seeds and methods."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import screen
from .config import load_settings
from .flags import Json

app = typer.Typer()


@app.command()
def sweep(
    config: Annotated[Path, typer.Option("--config", "-c", help="The recipe (TOML): docs/sweep.md names its keys.")],
    out: Annotated[Path, typer.Option(help="Folder of the results; what it holds is not computed again.")],
    address: Annotated[
        str | None, typer.Option(help="Address of a Ray cluster, or auto (default: a cluster of this machine alone).")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Jobs at once (default: as many as there are cores for).")
    ] = None,
    wait_minutes: Annotated[
        float, typer.Option(min=0, help="Wait so long for a node that jobs can run on, if all such leave the cluster.")
    ] = 10.0,
    as_json: Json = False,
) -> None:
    """Prune models x tasks x budgets x seeds x methods on all cores or a Ray cluster, and perhaps measure each; write
    results.parquet (a row a cell), results.md and report.html with the Pareto front. Exit 1 if a cell failed.

    After a kill the same command goes on where it was.

    [bold]Examples[/bold]

      deploy-prune sweep -c recipes/sweep-small.toml --out sweeps/small

      deploy-prune sweep -c recipes/paper-table.toml --out sweeps/paper --address auto
    """
    from .sweep import SweepSettings, run_sweep
    from .sweep.report import as_markdown

    settings = load_settings(SweepSettings, config, "sweep")
    with screen.Bars() as bars:
        found = run_sweep(settings, out, address=address, workers=workers, wait_minutes=wait_minutes, reporter=bars)
    if as_json:
        screen.print_json(found.to_dict())
        if found.failed:
            raise typer.Exit(1)
        return
    screen.out.print(as_markdown(found), highlight=False, markup=False, soft_wrap=True)
    for file in found.files:
        screen.out.print(str(file), soft_wrap=True, highlight=False, markup=False)
    found.check()
