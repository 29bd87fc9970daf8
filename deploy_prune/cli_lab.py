"""Commands that measure instead of making a bundle: the field's experiments, and the latency table."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, get_args

import typer

from . import screen
from .config import DEMO_MODELS, Augment
from .errors import InputError
from .flags import Json, choices, numbers, shares

app = typer.Typer()

EXPERIMENT_NAMES = (
    "ablation, tradeoff, latency, structure, depth, criteria, successors, steps, samples, parity, flops, unstructured,"
    " seconds, rival, prediction, vit, cnn or recover."
)


@app.command()
def experiment(
    name: Annotated[str, typer.Argument(help=EXPERIMENT_NAMES)],
    model: Annotated[str, typer.Option(help="Hub id or folder of the dense checkpoint.")],
    task: Annotated[str, typer.Option(help="Task name.")],
    out: Annotated[Path, typer.Option(help="Folder of the tables and figures.")] = Path("experiments"),
    stem: Annotated[str | None, typer.Option(help="Name of the files (default: the experiment's).")] = None,
    data: Annotated[str | None, typer.Option(help="File or folder with the task's data.")] = None,
    keep: Annotated[str, typer.Option(help="Shares of FLOPs to keep (default: the experiment's own).")] = "",
    seeds: Annotated[str, typer.Option(help="Seeds of the calibration samples.")] = "0,1,2",
    samples: Annotated[int, typer.Option(min=64, help="Training rows to calibrate on.")] = 2048,
    max_length: Annotated[int | None, typer.Option(help="Truncate rows to this many tokens.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    runtime: Annotated[str, typer.Option(help="Runtime of latency measurements.")] = "ort-cpu",
    batch: Annotated[int, typer.Option(min=1, help="Their batch size.")] = 1,
    seq: Annotated[int | None, typer.Option(min=1, help="Their length (default: the samples' mean).")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Their threads (default: the physical cores).")] = None,
    lut: Annotated[str | None, typer.Option(help="Latency table of this model, for latency and prediction.")] = None,
    rival: Annotated[str | None, typer.Option(help="Another dense checkpoint of the task, for rival.")] = None,
    recover_epochs: Annotated[float, typer.Option(help="Epochs of recover.")] = 3.0,
    recover_lr: Annotated[str, typer.Option(help="Its peak learning rates.")] = "1e-5",
    recover_samples: Annotated[int, typer.Option(min=64, help="Its training rows.")] = 16_384,
    recover_batch: Annotated[int, typer.Option(min=1, help="Its batch size.")] = 32,
    recover_augment: Annotated[str, typer.Option(help="How it moves images: none, shift, flip.")] = "none",
    recover_depth: Annotated[
        int, typer.Option(min=0, help="Sub-layers that it leaves out afterwards, to recover again.")
    ] = 0,
    as_json: Json = False,
) -> None:
    """Run an experiment over budgets and seeds; write JSON, CSV, a Markdown table and an SVG figure.

    [bold]Example[/bold]

      deploy-prune experiment ablation --model ./my-bert --task sst2 --data glue/SST-2 --keep 0.6,0.5
    """
    from .experiments import Setting, run_experiment

    setting = Setting(
        model=model,
        task=task,
        data=data,
        keeps=tuple(shares("--keep", keep)),
        seeds=tuple(numbers("--seeds", seeds)),
        samples=samples,
        max_length=max_length,
        device=device,
        runtime=runtime,
        batch=batch,
        seq=seq,
        threads=threads,
        lut=lut,
        rival=rival,
        recover_epochs=recover_epochs,
        recover_lr=tuple(shares("--recover-lr", recover_lr)),
        recover_samples=recover_samples,
        recover_batch=recover_batch,
        recover_augment=tuple(choices("--recover-augment", recover_augment, get_args(Augment))),  # type: ignore[arg-type]
        recover_depth=recover_depth,
    )
    with screen.Bars() as bars:
        document, files = run_experiment(name, setting, out, bars, stem)
    if as_json:
        screen.print_json(document)
        return
    screen.out.print(next(f for f in files if f.suffix == ".md").read_text("utf-8"), highlight=False)
    for file in files:
        screen.out.print(str(file), soft_wrap=True, highlight=False)


@app.command()
def probe(
    model: Annotated[str, typer.Argument(help="Hub id or folder of the dense checkpoint; 'demo' is the built-in one.")],
    out: Annotated[Path, typer.Option(help="File of the table.")] = Path("lut.json"),
    runtime: Annotated[str, typer.Option(help="Runtime to measure in.")] = "ort-cpu",
    batch: Annotated[
        str, typer.Option(help="Batch size; several, by commas, are measured each (convolutional networks: one).")
    ] = "1",
    seq: Annotated[
        str, typer.Option(help="Length of texts; several, by commas, are measured each. For images leave it out.")
    ] = "128",
    widths: Annotated[
        int,
        typer.Option(
            min=1,
            help="FFN widths to measure, others being interpolated; of a convolutional network a third of its cuts.",
        ),
    ] = 8,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads (default: the physical cores).")] = None,
    align: Annotated[
        int, typer.Option(min=1, help="Cut channels to multiples of it, for plans made with the same --align.")
    ] = 1,
    seconds: Annotated[float, typer.Option(help="Seconds per measured point.")] = 2.0,
    as_json: Json = False,
) -> None:
    """Measure what every head count and FFN width, or channel, costs on this machine, for --keep-latency.

    A convolutional network is cut in many ways and measured at the size of its images;
    each channel's cost is fitted, and the error on cuts that were held out is told.

    [bold]Examples[/bold]

      deploy-prune probe ./my-bert --batch 1 --seq 128 --out lut.json

      deploy-prune probe ./my-bert --batch 1,8 --seq 16,64,256 --out lut.json

      deploy-prune run ./my-bert --keep-latency 0.5 --lut lut.json
    """
    from .disk import write_atomically
    from .probing import probe as measure

    if not out.parent.is_dir():
        raise InputError(f"No folder {out.parent} for the table.", hint="Make it, or choose another --out.")

    batches, seqs = numbers("--batch", batch), numbers("--seq", seq)
    with screen.Bars() as bars:
        source = model
        if model in DEMO_MODELS:
            from .demo import prepare_demo

            source = str(prepare_demo(model, bars).model)
        with bars.stage("probe") as progress:
            table = measure(
                source,
                runtime=runtime,
                batch=batches,
                seq=seqs,
                widths=widths,
                threads=threads,
                align=align,
                seconds=seconds,
                progress=progress,
            )
    write_atomically(out, table.model_dump_json(indent=1) + "\n")
    if as_json:
        screen.print_json(table.model_dump())
    else:
        screen.print_latency_table(table)
        screen.out.print(f"Table: {out}", soft_wrap=True, highlight=False)
