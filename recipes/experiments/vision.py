"""Train the vision transformers of the experiments: from scratch, or from a pre-trained encoder.

V=recipes/experiments/vision.py
python $V train fashion_mnist.npz models/vit-s-fashion --task fashion_mnist --epochs 20             # ViT-S, patch 4
python recipes/experiments/encoders.py dinov2-small --out encoders/dinov2-small
python $V train cifar10.npz models/dinov2-cifar --task cifar10 --encoder encoders/dinov2-small --image 112 --lr 2e-4
deploy-prune experiment vit --model models/vit-s-fashion --task fashion_mnist --data fashion_mnist.npz

Images are shifted by up to an eighth and, with --flip, mirrored, anew in every epoch. The last line
printed is the accuracy on the evaluation split.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import transformers
import typer
from torch import Tensor

from deploy_prune.checkpoint import load_dense, load_processor, quiet_transformers
from deploy_prune.heads import Head
from deploy_prune.images import ImageProcessor
from deploy_prune.predict import predict
from deploy_prune.tasks import load_task
from deploy_prune.tasks.base import Split
from deploy_prune.tasks.registry import find_spec

app = typer.Typer(help=__doc__, pretty_exceptions_enable=False)


@app.command()
def train(
    data: Path,
    out: Path,
    task: str = "image-classification",
    encoder: Annotated[Path | None, typer.Option(help="Start from this one; from scratch without.")] = None,
    image: Annotated[int, typer.Option(help="Edge that images are resized to; those of the encoder: 224.")] = 0,
    patch: int = 4,
    hidden: int = 384,
    layers: int = 12,
    heads: int = 6,
    epochs: int = 20,
    batch: int = 256,
    lr: float = 1e-3,
    weight_decay: float = 0.05,
    flip: bool = True,
    bf16: Annotated[bool | None, typer.Option(help="Mixed precision; without the flag on a GPU only.")] = None,
    seed: int = 0,
) -> None:
    """Train on the training split of an image task and save a stock transformers folder."""
    if out.exists():
        raise SystemExit(f"{out} is there already: remove it, or name another folder.")
    names = list(find_spec(task).labels) or [str(name) for name in np.load(data, allow_pickle=False)["classes"]]
    transformers.set_seed(seed)
    with tempfile.TemporaryDirectory() as scratch:
        start = Path(scratch)
        model = _encoder(encoder, names, image, start) if encoder else None
        if model is None:
            model = _from_scratch(np.load(data, allow_pickle=False), names, patch, hidden, layers, heads, start)
        processor: ImageProcessor = load_processor(str(start), model.config)
        loaded = load_task(task, processor=processor, config=model.config, data=data)
        pixels, labels = _tensors(loaded.train)
        gpu = torch.cuda.is_available()
        arguments = transformers.TrainingArguments(
            output_dir=scratch,
            per_device_train_batch_size=batch,
            num_train_epochs=epochs,
            learning_rate=lr,
            lr_scheduler_type="cosine",
            warmup_steps=epochs * len(labels) // batch // 10,
            weight_decay=weight_decay,
            label_smoothing_factor=0.1,
            bf16=gpu if bf16 is None else bf16,
            use_cpu=not gpu,
            seed=seed,
            remove_unused_columns=False,
            dataloader_num_workers=8 if gpu else 0,
            disable_tqdm=True,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
        )
        trainer = transformers.Trainer(
            model=model,
            args=arguments,
            train_dataset=list(range(len(labels))),  # type: ignore[arg-type]
            data_collator=_Collator(pixels, labels, flip),
        )
        trainer.pop_callback(transformers.PrinterCallback)
        trainer.train()
        model.eval()
        with quiet_transformers():
            model.save_pretrained(out)
        processor.save_pretrained(out)
    dense = load_dense(str(out), "classification")
    outputs = predict(dense.model.to(model.device), Head("classification"), loaded.evaluation.rows())
    scores = loaded.evaluation.score(outputs)
    print(f"{out}: {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, {scores}")


class _Collator:
    """Give the pixels of a batch of row numbers, shifted and mirrored at random."""

    def __init__(self, pixels: Tensor, labels: Tensor, flip: bool) -> None:
        self.pixels, self.labels, self.flip = pixels, labels, flip
        self.shift = pixels.shape[-1] // 8

    def __call__(self, rows: list[int]) -> dict[str, Tensor]:
        pixels, size, most = self.pixels[rows], self.pixels.shape[-2:], self.shift
        padded = torch.nn.functional.pad(pixels, (most, most, most, most), mode="replicate")
        moved = torch.randint(0, 2 * most + 1, (len(rows), 2)).tolist()
        cut = [p[:, y : y + size[0], x : x + size[1]] for p, (y, x) in zip(padded, moved, strict=True)]
        if self.flip:
            mirrored = (torch.rand(len(rows)) < 0.5).tolist()
            cut = [p.flip(-1) if m else p for p, m in zip(cut, mirrored, strict=True)]
        return {"pixel_values": torch.stack(cut), "labels": self.labels[rows]}


def _tensors(split: Split) -> tuple[Tensor, Tensor]:
    rows = split.encode(range(len(split)))
    pixels = torch.from_numpy(np.stack([row.features["pixel_values"] for row in rows]))
    return pixels, torch.tensor([int(row.label) for row in rows])


def _encoder(encoder: Path, names: list[str], image: int, start: Path) -> Any:
    """Put a new head on an encoder, and write its config and image processor, at another size if asked."""
    settings = json.loads((encoder / "preprocessor_config.json").read_text())
    if image:
        settings |= {"size": {"shortest_edge": image}, "crop_size": {"height": image, "width": image}}
    with quiet_transformers():
        model = transformers.AutoModelForImageClassification.from_pretrained(
            encoder, dtype=torch.float32, id2label=dict(enumerate(names)), label2id={n: i for i, n in enumerate(names)}
        )
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(start)
    (start / "preprocessor_config.json").write_text(json.dumps(settings) + "\n")
    return model


def _from_scratch(arrays: Any, names: list[str], patch: int, hidden: int, layers: int, heads: int, start: Path) -> Any:
    """Make an untrained ViT for the images of an .npz, normalised by their own mean and deviation."""
    images = next(arrays[n] for n in arrays.files if arrays[n].ndim >= 3)
    images = images[..., None] if images.ndim == 3 else images
    channels, part = images.shape[-1], images[:5000] / 255
    config = transformers.ViTConfig(
        architectures=["ViTForImageClassification"],
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * hidden,
        image_size=images.shape[1],
        patch_size=patch,
        num_channels=channels,
        id2label=dict(enumerate(names)),
        label2id={n: i for i, n in enumerate(names)},
    )
    settings = {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": False,
        "size": {"height": images.shape[1], "width": images.shape[2]},
        "image_mean": [round(float(part[..., c].mean()), 4) for c in range(channels)],
        "image_std": [round(float(part[..., c].std()), 4) for c in range(channels)],
    }
    config.save_pretrained(start)
    (start / "preprocessor_config.json").write_text(json.dumps(settings) + "\n")
    return transformers.ViTForImageClassification(config)


@app.callback()
def main() -> None:
    """Keep `train` a command of its own."""


if __name__ == "__main__":
    app()
