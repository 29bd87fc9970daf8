"""The command that lets a release pass or not, for CI."""

from __future__ import annotations

import json
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from . import screen
from .config import GateSettings
from .disk import disk_errors, make_room, write_atomically
from .errors import InputError, MissingExtraError
from .flags import Json, settings_command

app = typer.Typer()


@app.command()
@settings_command(
    GateSettings, "gate", file=typer.Option("--config", "-c", help="The settings as a TOML file; flags override it.")
)
def gate(
    new: Annotated[Path, typer.Argument(metavar="BUNDLE | ONNX", show_default=False)],
    settings: GateSettings,
    junit: Annotated[Path | None, typer.Option(help="Write JUnit XML there.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write the verdict, every session in it, as JSON.")] = None,
    history: Annotated[Path | None, typer.Option(help="Append a line of JSON there.")] = None,
    trend: Annotated[Path | None, typer.Option(help="Draw the history (SVG or PNG).")] = None,
    as_json: Json = False,
) -> None:
    """Compare a model with a base in the same job: exit 1 if it is slower, larger or worse than allowed, 4 if the
    machine is too noisy to tell.

    Under GitHub Actions the step summary and the annotations are written as well.

    [bold]Examples[/bold]

      deploy-prune gate bundles/new --base bundles/old --max-slowdown 1.05 --max-quality-loss 0.5

      deploy-prune gate bundles/new --max-latency-ms 12 --max-bytes 20000000

      deploy-prune gate new.onnx --base old.onnx --seq 128 --junit gate.xml
    """
    from .runtime_bench.gate import gate_paths
    from .runtime_bench.gate_report import (
        append_history,
        as_markdown,
        draw_trend,
        github_annotations,
        read_history,
        write_junit,
    )

    if trend is not None and history is None:
        raise InputError("A trend is drawn from a history.", hint="Give --history.")
    if trend is not None and trend.suffix not in (".svg", ".png"):
        raise InputError(f"A trend is drawn as SVG or PNG, not {trend.suffix or trend.name!r}.", hint="Name trend.svg.")
    for path, package in ((junit, "junitparser"), (trend, "matplotlib")):
        if path is not None and find_spec(package) is None:
            raise MissingExtraError(package, "ci")
    make_room(junit, out, history, trend)
    if trend is not None and history is not None and history.is_file():
        read_history(history)  # what a figure cannot be drawn from is told before measuring
    with screen.Bars() as bars, bars.stage("gate") as progress:
        verdict = gate_paths(new, settings, progress)
    name = new.name
    if junit is not None:
        write_junit(verdict, name, junit)
    if out is not None:
        with disk_errors(out):
            write_atomically(out, json.dumps(verdict.to_dict(), indent=1) + "\n")
    if history is not None:
        append_history(verdict, name, history)
        if trend is not None:
            draw_trend(history, trend)
    if summary := os.environ.get("GITHUB_STEP_SUMMARY"):
        with open(summary, "a", encoding="utf-8") as file:
            file.write(as_markdown(verdict, name))
    if os.environ.get("GITHUB_ACTIONS") == "true":
        for line in github_annotations(verdict, name):
            screen.err.print(line, soft_wrap=True, highlight=False, markup=False)
    if as_json:
        screen.print_json(verdict.to_dict())
    else:
        for check in verdict.checks:
            screen.out.print(f"{check.name}: {check.outcome}. {check.text}", soft_wrap=True, highlight=False)
    verdict.check()
