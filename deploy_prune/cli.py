"""The command line: a thin layer over the Python API. Heavy imports happen inside the commands."""

from __future__ import annotations

import errno
import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.markup import escape

from . import __version__, cli_export, cli_gate, cli_lab, cli_serve, cli_sign, cli_sweep, cli_tune, screen
from .bundle import Bundle
from .config import ALLOW_CODE, ALLOW_PICKLE, ENGINES, PROGRAMS, BenchSettings, Recipe, allowed_code
from .disk import disk_errors, locked, make_room, write_atomically
from .errors import DeployPruneError, DismissedError, MissingExtraError, SystemStateError, VerdictError
from .flags import BundleArg, Json, recipe_command, settings_command
from .signature import Signature

app = typer.Typer(
    name="deploy-prune",
    help="Make a fine-tuned transformer really smaller and faster on inference runtimes, without retraining.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

INTERRUPTED = 130
EXTRA_OF = {
    "matplotlib": "ci",
    "optuna": "tune",
    "junitparser": "ci",
    "mlperf_loadgen": "loadgen",
    "fastapi": "serve",
    "minisign": "sign",
    "grpc": "serve",
    "orjson": "serve",
    "prometheus_client": "serve",
    "pythonjsonlogger": "serve",
    "starlette": "serve",
    "tritonclient": "serve",
    "uvicorn": "serve",
    "torch": "cpu",
    "transformers": "cpu",
    "onnx": "cpu",
    "plotly": "cpu",
    "pyarrow": "sweep",
    "ray": "sweep",
    "threadpoolctl": "sweep",
    "onnxruntime": "cpu",
    "scipy": "cpu",
    "openvino": "openvino",
    "nncf": "openvino",
    "tensorrt": "tensorrt",
    "tensorrt_rtx": "rtx",
}


@app.command()
@recipe_command
def run(recipe: Recipe, as_json: bool) -> None:
    """Prune, slice, export, measure and report: everything, into one bundle.

    [bold]Examples[/bold]

      deploy-prune run demo

      deploy-prune run ./my-bert --task sst2 --data glue/SST-2 --keep-flops 0.5 --out bundles/sst2

      deploy-prune run -c recipes/demo.toml --seed 1
    """
    _run(recipe, as_json, export=True, bench=True)


@app.command()
@recipe_command
def prune(recipe: Recipe, as_json: bool) -> None:
    """Prune and slice only; export and bench can follow on the bundle.

    [bold]Example[/bold]

      deploy-prune prune ./my-bert --task sst2 --data glue/SST-2 --out bundles/sst2
    """
    _run(recipe, as_json, export=False, bench=False)


def _run(recipe: Recipe, as_json: bool, *, export: bool, bench: bool) -> None:
    from . import parallel, pipeline
    from .stages import resolve_device

    with parallel.team(resolve_device(recipe.device)):
        if parallel.rank() > 0:
            pipeline.assist(recipe)
            return
        with screen.Bars() as bars:
            bundle = pipeline.run(recipe, bars, export=export, bench=bench)
    _finish(bundle, as_json)


@app.command("slice")
def slice_command(
    model: Annotated[str, typer.Argument(help="Hub id or folder of the dense checkpoint.")],
    masks: Annotated[
        list[Path],
        typer.Option(help="safetensors, npz, or head_mask.pt and neuron_mask.pt (both, or their folder)."),
    ],
    out: Annotated[Path | None, typer.Option(help="Folder of the bundle (default: bundles/MODEL-masks).")] = None,
    task: Annotated[str | None, typer.Option(help="Task, to measure quality with --data.")] = None,
    data: Annotated[str | None, typer.Option(help="File or folder with the task's data.")] = None,
    seq_len: Annotated[int | None, typer.Option(help="Length at which FLOPs are counted (default: 128).")] = None,
    as_json: Json = False,
) -> None:
    """Cut a model by given masks; tuned values are folded into the output projections.

    [bold]Example[/bold]

      deploy-prune slice ./my-bert --masks masks.safetensors --out bundles/mine
    """
    from .pipeline import slice_given

    with screen.Bars() as bars:
        destination = out or Path("bundles") / f"{Path(model).name}-masks"
        bundle = slice_given(model, masks, destination, task=task, data=data, seq_len=seq_len, reporter=bars)
    _finish(bundle, as_json)


app.add_typer(cli_export.app)


@app.command()
@settings_command(
    BenchSettings, "bench", file=typer.Option("--matrix", "-c", help="The settings as a TOML file; flags override it.")
)
def bench(
    paths: Annotated[list[Path], typer.Argument(metavar="BUNDLE | BUNDLES... | ONNX...", show_default=False)],
    settings: BenchSettings,
    out: Annotated[
        Path | None,
        typer.Option(help="File for the result (JSON; of files every run as .npz beside it)."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure models side by side: latency, memory, throughput and energy, each model in a process of its own.

    One bundle: its variants, and the result is stored in it. Several bundles, or any ONNX files: against each
    other; the first one is the baseline.

    [bold]Examples[/bold]

      deploy-prune bench bundles/demo --batch 1,8 --seq 32,128

      deploy-prune bench bundles/demo --matrix recipes/bench-cpu.toml

      deploy-prune bench a.onnx b.onnx --seq 128
    """
    from .runtime_bench.bench import bench_bundle, bench_paths
    from .runtime_bench.report import store_report
    from .runtime_bench.results import keep_samples, samples_beside

    make_room(out)
    alone = len(paths) == 1 and paths[0].suffix != ".onnx"  # a bundle, which holds its samples itself
    beside = None if out is None or alone else samples_beside(out)
    with screen.Bars() as bars, bars.stage("bench") as progress:
        if alone:
            with locked(paths[0]):
                opened = Bundle.open(paths[0])
                result = bench_bundle(opened, settings, progress)
                if result["measurements"]:
                    store_report(opened)
        else:
            result, samples = bench_paths(paths, settings, progress)
            if beside is not None:
                result["samples"] = keep_samples(samples, beside)
    if out is not None:
        with disk_errors(out):
            write_atomically(out, json.dumps(result, indent=2) + "\n")
    if as_json:
        screen.print_json(result)
    else:
        _print_failures(result["failures"])
        screen.print_bench(result)
    if not result["measurements"]:
        raise VerdictError("Nothing could be measured.", hint="The failures above say why.")


@app.command()
def report(
    bundle: BundleArg,
    form: Annotated[
        Literal["html", "md"], typer.Option("--format", help="A page, or Markdown for a pull request.")
    ] = "html",
    out: Annotated[
        Path | None, typer.Option(help="File (default: the bundle's report.html; Markdown is printed).")
    ] = None,
) -> None:
    """Write what a bundle holds as one page with figures, or as Markdown.

    [bold]Examples[/bold]

      deploy-prune report bundles/demo

      deploy-prune report bundles/demo --format md --out report.md
    """
    from .runtime_bench.report import as_markdown, render_report, store_report

    if out is None and form == "html":
        with locked(bundle):
            opened = Bundle.open(bundle)
            store_report(opened)
        screen.out.print(str(opened.path("report.html")), soft_wrap=True, highlight=False, markup=False)
        return
    make_room(out)
    opened = Bundle.open(bundle)
    text = as_markdown(opened) if form == "md" else render_report(opened)
    if out is None:
        print(text, end="")
        return
    with disk_errors(out):
        write_atomically(out, text)
    screen.out.print(str(out), soft_wrap=True, highlight=False, markup=False)


app.add_typer(cli_gate.app)
app.add_typer(cli_serve.app)
app.add_typer(cli_sign.app)
app.add_typer(cli_lab.app)
app.add_typer(cli_sweep.app)
app.add_typer(cli_tune.app)


@app.command()
def inspect_(bundle: BundleArg, as_json: Json = False) -> None:
    """Show a bundle: its plan per layer, costs, quality, artifacts and stages.

    [bold]Example[/bold]

      deploy-prune inspect bundles/demo
    """
    from .inspection import describe, print_bundle

    opened = Bundle.open(bundle)
    if as_json:
        screen.print_json(describe(opened))
    else:
        print_bundle(opened)


app.registered_commands[-1].name = "inspect"


@app.command()
def doctor(as_json: Json = False) -> None:
    """Show runtimes, providers, versions, conflicts and GPUs of this machine.

    [bold]Example[/bold]

      deploy-prune doctor
    """
    from .doctor import examine, print_findings

    findings = examine()
    if as_json:
        screen.print_json(findings)
    else:
        print_findings(findings)


@app.callback(invoke_without_command=True)
def _global(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    allow_code: Annotated[
        list[str] | None,
        typer.Option(
            metavar="MODULE",
            help="Let checkpoints (module.json) call factories of this Python module; pt2, engines: open a bundle's.",
        ),
    ] = None,
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Read .pt and .bin files, by torch's restricted unpickler.")
    ] = False,
) -> None:
    if allow_code:  # in the environment, so that the processes that measure see it
        os.environ[ALLOW_CODE] = ",".join(filter(None, [os.environ.get(ALLOW_CODE, ""), *allow_code]))
    if {*allowed_code()} - {PROGRAMS, ENGINES} and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # as theirs have it: a module may lie in the working folder
    if allow_pickle:
        os.environ[ALLOW_PICKLE] = "1"
    if version:
        print(__version__)
        raise typer.Exit


def _finish(bundle: Bundle, as_json: bool) -> None:
    if as_json:
        screen.print_json({"bundle": str(bundle.root), "manifest": bundle.manifest.model_dump()})
        return
    _summary(bundle)
    screen.out.print(f"Bundle: {bundle.root}", soft_wrap=True, highlight=False)


def _summary(bundle: Bundle) -> None:
    from .runtime_bench.report import summary_rows

    budget, task = bundle.manifest.budget, bundle.manifest.task
    takes = Signature.of_manifest(bundle.manifest.model)
    title = f"{bundle.manifest.model.get('name')}, {task.get('name')}, {takes.length(budget.get('seq_len'))}"
    screen.print_summary(summary_rows(bundle), title, takes.part)


def _print_failures(failures: list[dict[str, Any]]) -> None:
    for f in failures:
        where, reason = f"{f['runtime']} {f['batch']}x{f['seq']} {f['model']}", f["reason"].splitlines()[0]
        screen.err.print(f"[yellow]not measured:[/] {where}: {escape(reason)}")


def main() -> None:
    """Run the command line and exit with its code (see `errors` for the codes)."""
    sys.exit(invoke(sys.argv[1:]))


def invoke(arguments: list[str]) -> int:
    """Run the command line on arguments and return the exit code."""
    as_json = "--json" in arguments
    screen.documents = 0
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        typer.main.get_command(app)(args=arguments, prog_name="deploy-prune")
    except SystemExit as finished:  # how typer ends: 0, 2 for wrong usage, 130 for Ctrl-C
        if finished.code == INTERRUPTED:
            screen.err.print("Interrupted: no bundle was changed; what a run, sweep or tuning has finished is kept.")
        return int(finished.code or 0)
    except DeployPruneError as error:
        return _report(error, as_json)
    except ImportError as error:
        package = (error.name or "").split(".")[0]
        if package not in EXTRA_OF:
            screen.print_internal_error(error)
            return 70
        return _report(MissingExtraError(package, EXTRA_OF[package]), as_json)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return _report(SystemStateError("The disk is full.", hint="Free some space, then run it again."), as_json)
        if isinstance(error, PermissionError):
            hint = "Check whose it is, and its mode: a container or a service may run as another user."
            return _report(SystemStateError(f"No permission for {error.filename}.", hint=hint), as_json)
        screen.print_internal_error(error)
        return 70
    except Exception as error:
        screen.print_internal_error(error)
        return 70
    return 0


def _report(error: DeployPruneError, as_json: bool) -> int:
    rank = int(os.environ.get("RANK", "0"))  # of a process that torchrun started
    if rank == 0 or not isinstance(error, DismissedError):
        screen.print_error(error, as_json and not rank, f" in process {rank + 1}" if rank else "")
    return error.exit_code
