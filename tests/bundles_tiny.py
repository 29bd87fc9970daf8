"""Tiny models of every family with random weights, plans that leave ragged and empty layers, and bundles of them."""

from __future__ import annotations

import atexit
import json
import shutil
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tasks_tiny import tiny_tokenizer

from deploy_prune.archs import check_config
from deploy_prune.bundle import VARIANTS, Bundle, GoldenCase, Manifest
from deploy_prune.checkpoint import load_dense, save_sliced
from deploy_prune.costs import encoder_flops
from deploy_prune.heads import Head
from deploy_prune.masking import mask_model
from deploy_prune.signature import signature_of
from deploy_prune.slicing import slice_model
from deploy_prune.units import SlicePlan

LAYERS, HIDDEN, HEADS, NEURONS, VOCAB = 2, 32, 4, 64, 160
SHAPES = ((1, 1), (1, 7), (4, 13), (2, 24))  # of the golden cases
_CLASSES = {
    "classification": "SequenceClassification",
    "regression": "SequenceClassification",
    "token": "TokenClassification",
    "qa": "QuestionAnswering",
}
_NAMES = {"bert": "Bert", "roberta": "Roberta", "distilbert": "DistilBert", "electra": "Electra", "mpnet": "MPNet"}
_IMAGE_NAMES = {"vit": "ViT", "deit": "DeiT", "dinov2": "Dinov2"}
IMAGE = (3, 8, 8)  # of image models: channels, height, width; 16 patches
PROCESSOR = {
    "image_processor_type": "ViTImageProcessor",
    "size": {"height": 8, "width": 8},
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}


def tiny_model(family: str = "bert", head: str = "classification", seed: int = 0) -> Any:
    """Make a model of 2 layers, d = 32, 4 heads, 64 neurons, in evaluation mode."""
    if family in _IMAGE_NAMES:
        return _tiny_image_model(_IMAGE_NAMES[family], seed)
    name = _NAMES[family]
    sizes: dict[str, Any] = {"vocab_size": VOCAB, "max_position_embeddings": 66}
    if family == "distilbert":
        sizes |= {"dim": HIDDEN, "n_layers": LAYERS, "n_heads": HEADS, "hidden_dim": NEURONS}
    else:
        sizes |= {"hidden_size": HIDDEN, "num_hidden_layers": LAYERS}
        sizes |= {"num_attention_heads": HEADS, "intermediate_size": NEURONS}
    if family == "electra":
        sizes["embedding_size"] = 16
    if head in ("regression", "token"):
        sizes["num_labels"] = 1 if head == "regression" else 3
    config = getattr(transformers, f"{name}Config")(initializer_range=0.2, **sizes)
    cls = getattr(transformers, f"{name}Model" if head == "embedding" else f"{name}For{_CLASSES[head]}")
    torch.manual_seed(seed)
    model = cls(config).eval()
    if head == "embedding" and getattr(model, "pooler", None) is not None:
        model.pooler = None
    return model


def _tiny_image_model(name: str, seed: int) -> Any:
    sizes: dict[str, Any] = {"hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
    sizes |= {"mlp_ratio": 2, "layerscale_value": 0.5} if name == "Dinov2" else {"intermediate_size": NEURONS}
    config = getattr(transformers, f"{name}Config")(initializer_range=0.2, image_size=8, patch_size=2, **sizes)
    torch.manual_seed(seed)
    return getattr(transformers, f"{name}ForImageClassification")(config).eval()


def input_names(family: str) -> list[str]:
    if family in _IMAGE_NAMES:
        return ["pixel_values"]
    names = ["input_ids", "attention_mask"]
    return [*names, "token_type_ids"] if family in ("bert", "electra") else names


def tiny_plan(model: Any, *, empty: bool = True, seed: int = 0) -> tuple[Any, SlicePlan]:
    """Return the groups and a ragged plan; with `empty`, layer 0 has no neurons and layer 1 no heads."""
    groups = check_config(model.config).groups(model)
    rng = np.random.default_rng(seed)
    masks = {}
    for g in groups:
        mask = np.zeros(g.size)
        gone = empty and (g.layer, g.kind) in ((0, "neuron"), (1, "head"))
        count = 0 if gone else 3 if g.kind == "head" else 29
        mask[rng.permutation(g.size)[:count]] = rng.uniform(0.5, 1.5, count)
        masks[g.name] = mask
    return groups, SlicePlan.from_masks(groups, masks)


def tiny_inputs(names: list[str], batch: int, seq: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Return random inputs (batch, seq), the first row padded where it is long enough; or random images."""
    rng = np.random.default_rng(seed)
    if names == ["pixel_values"]:
        return {"pixel_values": rng.normal(size=(batch, *IMAGE)).astype(np.float32)}
    inputs = {"input_ids": rng.integers(4, VOCAB, (batch, seq)), "attention_mask": np.ones((batch, seq), np.int64)}
    if seq > 4:
        inputs["attention_mask"][0, -3:] = 0
    inputs["token_type_ids"] = rng.integers(0, 2, (batch, seq))
    return {name: inputs[name] for name in names}


def run_torch(model: Any, head: Head, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    with torch.no_grad():
        out = head.outputs(model, {name: torch.from_numpy(array) for name, array in inputs.items()})
    return {name: array.numpy() for name, array in out.items()}


def make_bundle(root: Path, family: str = "bert", kind: str = "classification") -> tuple[Bundle, dict[str, Any]]:
    """Write a bundle by hand, without artifacts, and return it with its three models."""
    source = root.with_name(root.name + "-source")
    names = input_names(family)
    tiny_model(family, kind).save_pretrained(source)
    if family in _IMAGE_NAMES:
        (source / "preprocessor_config.json").write_text(json.dumps(PROCESSOR), "utf-8")
    else:
        tiny_tokenizer(model_input_names=names).save_pretrained(source)
    dense = load_dense(str(source), kind)  # type: ignore[arg-type]
    groups, plan = tiny_plan(dense.model)
    models = {
        "dense": dense.model,
        "virtual": mask_model(dense.model, groups, plan),
        "sliced": slice_model(dense.model, groups, plan),
    }
    root.mkdir(parents=True)
    bundle = Bundle(root, Manifest())
    for path in save_sliced(models["sliced"], dense.processor, root / "sliced"):
        bundle.register(str(path.relative_to(root)))
    (root / "plan.json").write_text(json.dumps(plan.to_dict()), "utf-8")
    bundle.register("plan.json")
    head = Head(kind)  # type: ignore[arg-type]
    for index, shape in enumerate(SHAPES):
        inputs = tiny_inputs(names, *shape, seed=index)
        bundle.add_golden(GoldenCase(inputs, {v: run_torch(models[v], head, inputs) for v in VARIANTS}))
    manifest = bundle.manifest
    manifest.model = {"source": str(source), "sha256": dense.sha256, "model_type": family}
    manifest.model |= signature_of(dense.model.config, names).entry()
    manifest.model["architecture"] = type(dense.model).__name__
    manifest.task = {"name": "tiny", "head": kind, "pooling": "mean", "labels": ["no", "yes"], "metric": "accuracy"}
    length = manifest.model.get("tokens", 12)
    manifest.budget = {"kind": "flops", "keep": 0.5, "seq_len": length}
    manifest.plan = {"hash": plan.hash, "layers": plan.layer_counts()}
    for variant, model in models.items():
        params = sum(p.numel() for p in model.parameters())
        encoder = encoder_flops(groups, length, plan if variant == "sliced" else None)
        counts = {"flops": encoder, "encoder_flops": encoder, "params": params, "weight_bytes": 4 * params}
        manifest.counts[variant] = counts
    bundle.commit()
    return bundle, models


def make_exported(
    root: Path,
    family: str = "bert",
    kind: str = "classification",
    *,
    formats: Sequence[str] = ("onnx",),
    variants: Sequence[Any] = ("dense", "sliced"),
) -> Bundle:
    """Write a bundle with the files of some formats and variants."""
    from deploy_prune.export import export_bundle

    bundle, models = make_bundle(root, family, kind)
    export_bundle(bundle, formats=list(formats), variants=tuple(variants), models=models).check()
    bundle.commit()
    return bundle


@cache
def _exported(formats: tuple[str, ...]) -> Path:
    """Make one exported BERT bundle for all tests of the session."""
    folder = Path(tempfile.mkdtemp(prefix="deploy-prune-tests-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return make_exported(folder / "bundle", formats=formats, variants=VARIANTS).root


def exported_bundle(tmp_path: Path, *formats: str) -> Bundle:
    """Return a copy of an exported BERT bundle that the test may change; its source stays where it was."""
    shutil.copytree(_exported(formats or ("onnx",)), tmp_path / "bundle")
    return Bundle.open(tmp_path / "bundle")
