"""A bundle's ONNX as optimum's users load it (optimum-onnx lives beside transformers 4.57)."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from runs_tiny import checkpoint, data

from deploy_prune.config import load_recipe
from deploy_prune.pipeline import run

optimum = pytest.importorskip("optimum.onnxruntime", reason="optimum-onnx is not installed")


def test_sliced_onnx_loads_in_optimum(tmp_path: Path) -> None:
    recipe = load_recipe(
        model=str(checkpoint(tmp_path / "model")),
        task="text-classification",
        data=str(data(tmp_path / "data")),
        out=str(tmp_path / "b"),
    )
    bundle = run(recipe, bench=False)
    folder = tmp_path / "optimum"
    folder.mkdir()
    artifact = next(a for a in bundle.manifest.artifacts if a.variant == "sliced")
    shutil.copy(bundle.path(artifact.path), folder / "model.onnx")
    shutil.copy(tmp_path / "model" / "config.json", folder)
    model = optimum.ORTModelForSequenceClassification.from_pretrained(folder)
    for case in bundle.golden():
        found = model(**{k: torch.from_numpy(v) for k, v in case.inputs.items()}).logits.numpy()
        assert np.abs(found - case.outputs["sliced"]["logits"]).max() <= 1e-4
