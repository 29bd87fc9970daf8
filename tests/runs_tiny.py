"""Tiny checkpoints with tokenizer and data, to run the whole pipeline on in seconds."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import transformers
from conv_tiny import tiny_cnn
from models_tiny import tiny_model
from tasks_tiny import tiny_tokenizer

from deploy_prune.bundle import VARIANTS, Bundle
from deploy_prune.export import verify_bundle
from deploy_prune.images import ImageProcessor
from deploy_prune.module_checkpoint import save_module

WORDS = [
    "good",
    "bad",
    "fine",
    "dull",
    "bright",
    "slow",
    "quick",
    "warm",
    "cold",
    "film",
    "plot",
    "actor",
    "scene",
    "story",
    "music",
    "joke",
    "paris",
    "london",
]


def checkpoint(folder: Path, head: str = "classification", family: str = "bert", **changes: Any) -> Path:
    """Save a stock transformers folder with random weights; mechanics alone are tested on it.

    The tokenizer is one of BERT's kind: it makes token types, which not every family takes.
    """
    tokenizer = tiny_tokenizer(" ".join(WORDS))
    model = tiny_model(family, head, vocab_size=len(tokenizer), pad_token_id=0, **changes)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def image_checkpoint(folder: Path, family: str = "vit", size: int = 8, **changes: Any) -> Path:
    """Save a stock folder of a tiny image classifier whose processor makes images of 3 x `size` x `size`."""
    tiny_model(family, **changes).save_pretrained(folder)
    settings = {"image_processor_type": "ViTImageProcessor", "size": {"height": size, "width": size}}
    settings |= {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.5, 0.4, 0.3]}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return folder


def channel_checkpoint(folder: Path, family: str = "basic", size: int = 16) -> Path:
    """Save a tiny convolutional classifier of three classes whose processor makes images of 3 x `size` x `size`.

    "resnet" is one of transformers, the others are modules whose factories lie in `conv_tiny`.
    """
    settings = {"image_processor_type": "BitImageProcessor", "size": {"shortest_edge": size}}
    settings |= {"crop_size": {"height": size, "width": size}}
    processor = ImageProcessor.from_dict(settings, SimpleNamespace(num_channels=3))
    if family == "resnet":
        torch.manual_seed(0)
        config = transformers.ResNetConfig(
            embedding_size=8, hidden_sizes=[8, 12], depths=[2, 1], layer_type="basic", num_labels=3
        )
        transformers.ResNetForImageClassification(config).save_pretrained(folder)
        processor.save_pretrained(folder)
        return folder
    model = tiny_cnn(family, classes=3)
    names = ("cat", "dog", "eel")
    save_module(
        model, folder, f"conv_tiny.{family}", {"classes": 3}, image=(3, size, size), labels=names, processor=processor
    )
    return folder


def image_data(path: Path, train: int = 96, evaluation: int = 24, size: int = 8) -> Path:
    """Write an .npz of random RGB images of three classes."""
    rng = np.random.default_rng(0)
    arrays = {}
    for name, count in (("train", train), ("test", evaluation)):
        arrays[f"x_{name}"] = rng.integers(0, 256, (count, size, size, 3), dtype=np.uint8)
        arrays[f"y_{name}"] = rng.integers(0, 3, count)
    np.savez(path, **arrays)
    return path


def verified_files(
    bundle: Bundle, formats: Sequence[str] = ("onnx", "openvino", "pt2")
) -> set[tuple[str, str, str, str | None]]:
    """Check that a bundle's files match their models, then and now; return (variant, format, precision, scheme)."""
    artifacts = bundle.manifest.artifacts
    made = {(a.variant, a.format, a.precision, a.scheme) for a in artifacts}
    assert {(v, f, "fp32", None) for v in VARIANTS for f in formats} <= made
    assert all(a.parity.status == "passed" for a in artifacts)
    verified = verify_bundle(bundle)
    verified.check()
    assert len(verified.artifacts) == len(artifacts)
    return made


def sentence(rng: random.Random) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(3, 9)))


def data(folder: Path, head: str = "classification", train: int = 96, evaluation: int = 24, label: bool = True) -> Path:
    """Write train and validation files of the generic task of a head."""
    rng = random.Random(0)
    folder.mkdir(parents=True, exist_ok=True)
    for name, count in (("train", train), ("validation", evaluation)):
        if head == "token":
            lines = []
            for i in range(count):
                words = [*rng.choices(WORDS, k=rng.randint(3, 9)), f"{name[0]}{i}"]
                lines += [f"{w} LABEL_{rng.randrange(5)}" for w in words] + [""]
            (folder / f"{name}.txt").write_text("\n".join(lines))
            continue
        if head == "qa":
            paragraphs = [_paragraph(rng, f"{name}{i}") for i in range(count)]
            document = {"version": "1.1", "data": [{"title": name, "paragraphs": paragraphs}]}
            (folder / f"{name}.json").write_text(json.dumps(document))
            continue
        rows = []
        for i in range(count):
            row: dict[str, Any] = {"text": f"{sentence(rng)} {name[0]}{i}"}
            if head == "pair":
                row = {"text_a": row["text"], "text_b": sentence(rng)}
            if label and head != "embedding":
                row["label"] = rng.random() * 5 if head == "regression" else rng.randrange(3)
            rows.append(json.dumps(row))
        (folder / f"{name}.jsonl").write_text("\n".join(rows) + "\n")
    return folder


def _paragraph(rng: random.Random, identity: str) -> dict[str, Any]:
    words = [*rng.choices(WORDS, k=8), identity]
    context = " ".join(words)
    answer = words[rng.randrange(8)]
    question = {
        "id": identity,
        "question": f"what {rng.choice(WORDS)}",
        "answers": [{"text": answer, "answer_start": context.index(answer)}],
    }
    return {"context": context, "qas": [question]}


def linear_costs(path: Path) -> None:
    """Replace a tiny model's latencies, which are mostly noise, by a straight line."""
    table = json.loads(path.read_text())
    table |= {"base_ms": 1.0, "dense_ms": 7.0}
    for kind in table["kinds"].values():
        kind |= {key: list(np.linspace(0, 1, len(kind["counts"]))) for key in ("ms", "low_ms", "high_ms")}
    path.write_text(json.dumps(table))
