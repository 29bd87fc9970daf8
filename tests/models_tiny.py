"""Tiny models of every supported family, with weights large enough that every unit matters."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import transformers

from deploy_prune.tasks.base import Row
from deploy_prune.units import MaskSet, UnitGroup

TEXT_FAMILIES = ("bert", "roberta", "xlm-roberta", "electra", "distilbert", "mpnet")
IMAGE_FAMILIES = ("vit", "deit", "dinov2") + (("dinov2-gated",) if transformers.__version__ >= "5" else ())
FAMILIES = TEXT_FAMILIES + IMAGE_FAMILIES
HEADS = {
    "classification": "AutoModelForSequenceClassification",
    "regression": "AutoModelForSequenceClassification",
    "token": "AutoModelForTokenClassification",
    "qa": "AutoModelForQuestionAnswering",
    "embedding": "AutoModel",
}
IMAGE_CLASSES = {
    "vit": "ViTForImageClassification",
    "deit": "DeiTForImageClassificationWithTeacher",
    "dinov2": "Dinov2ForImageClassification",
}
VOCABULARY = 60
IMAGE = (3, 8, 8)  # channels, height, width
MAX_POSITIONS = 48


def tiny_config(family: str, head: str = "classification", **changes: Any) -> Any:
    """Return a config of 3 layers, 4 heads of 8, 24 neurons."""
    labels = {"regression": 1, "token": 5, "qa": 2}.get(head, 3)
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_hidden_layers": 3,
        "intermediate_size": 24,
    }
    if family in IMAGE_FAMILIES:
        name, _, gated = family.partition("-")
        sizes |= {"image_size": 8, "patch_size": 2, "num_labels": 3}
        if name == "dinov2":
            sizes |= {"mlp_ratio": 1, "use_swiglu_ffn": bool(gated)}
        return transformers.CONFIG_MAPPING[name](**(sizes | changes))
    if family == "distilbert":
        sizes = {"dim": 32, "n_heads": 4, "n_layers": 3, "hidden_dim": 24}
    if family == "electra":
        sizes["embedding_size"] = 16
    sizes |= {"vocab_size": VOCABULARY, "max_position_embeddings": MAX_POSITIONS, "num_labels": labels}
    return transformers.CONFIG_MAPPING[family](**(sizes | changes))


def tiny_model(family: str, head: str = "classification", seed: int = 0, **changes: Any) -> Any:
    """Return a model in evaluation mode whose weights are drawn from a seed."""
    torch.manual_seed(seed)
    config = tiny_config(family, head, **changes)
    if family in IMAGE_FAMILIES:
        model = getattr(transformers, IMAGE_CLASSES[family.partition("-")[0]])._from_config(config)
    else:
        model = getattr(transformers, HEADS[head]).from_config(config)
    for name, parameter in model.named_parameters():
        if not any(part in name.lower() for part in ("layernorm", "layer_norm", "norm1", "norm2")):
            torch.nn.init.normal_(parameter, std=0.25)
    if head == "embedding" and getattr(model, "pooler", None) is not None:
        model.pooler = None
    return model.eval()


def heads_of(family: str) -> tuple[str, ...]:
    """Return the kinds of head that models of a family have."""
    return ("classification",) if family in IMAGE_FAMILIES else tuple(HEADS)


def image_tokens(family: str) -> int:
    """Return how many tokens a tiny model makes of an image: 16 patches and its special tokens."""
    return 18 if family == "deit" else 17


def tiny_rows(
    count: int, head: str = "classification", seed: int = 0, longest: int = 14, *, family: str = "bert"
) -> list[Row]:
    """Return rows of random tokens and lengths, or of random pixels, with labels of the head's kind."""
    rng = np.random.default_rng(seed)
    rows: list[Row] = []
    if family in IMAGE_FAMILIES:
        for _ in range(count):
            pixels = rng.normal(size=IMAGE).astype(np.float32)
            rows.append(Row({"pixel_values": pixels}, int(rng.integers(3)), tokens=image_tokens(family)))
        return rows
    for _ in range(count):
        length = int(rng.integers(3, longest + 1))
        features = {
            "input_ids": rng.integers(3, VOCABULARY, length),
            "attention_mask": np.ones(length, dtype=np.int64),
        }
        label: Any = {
            "classification": lambda: int(rng.integers(3)),
            "regression": lambda: float(rng.normal()),
            "token": lambda n=length: rng.integers(5, size=n),
            "qa": lambda n=length: tuple(sorted(rng.integers(n, size=2).tolist())),
            "embedding": lambda: None,
        }[head]()
        rows.append(Row(features, label))
    return rows


def padded_inputs(seed: int = 0, batch: int = 3, length: int = 9) -> dict[str, torch.Tensor]:
    """Return one batch with padding in all rows but the first."""
    rng = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (batch, length), generator=rng)
    mask = torch.ones_like(ids)
    for row in range(1, batch):
        mask[row, length - 2 * row :] = 0
    return {"input_ids": ids * mask + (1 - mask), "attention_mask": mask}


def tiny_inputs(family: str, seed: int = 0, batch: int = 3, length: int = 9) -> dict[str, torch.Tensor]:
    """Return one batch: token ids with padding, or images."""
    if family not in IMAGE_FAMILIES:
        return padded_inputs(seed, batch, length)
    return {"pixel_values": torch.randn(batch, *IMAGE, generator=torch.Generator().manual_seed(seed))}


def random_masks(groups: tuple[UnitGroup, ...], seed: int, *, scales: bool = True, empty: bool = True) -> MaskSet:
    """Return ragged masks: about half of the units, some groups empty, some whole, values around 1."""
    rng = np.random.default_rng(seed)
    masks = MaskSet()
    for number, g in enumerate(groups):
        kept = rng.random(g.size) < 0.5
        kept[int(rng.integers(g.size))] = True
        if empty and number % 5 == seed % 5:
            kept[:] = False
        if number % 5 == (seed + 2) % 5:
            kept[:] = True
        masks[g.name] = kept * (rng.uniform(0.5, 1.5, g.size) if scales else 1.0)
    return masks
