"""On a really fine-tuned model and real files, where DEPLOY_PRUNE_DATA names them."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import transformers
from models_tiny import tiny_model

from deploy_prune.bundle import Bundle
from deploy_prune.calibration import sample_indices
from deploy_prune.checkpoint import load_dense, load_variant
from deploy_prune.config import ALLOW_CODE, load_recipe
from deploy_prune.costs import Budget
from deploy_prune.fidelity import fidelity
from deploy_prune.heads import Head
from deploy_prune.pipeline import run
from deploy_prune.predict import predict
from deploy_prune.pruner import Pruner
from deploy_prune.runtime_bench.flops import count_onnx
from deploy_prune.stages import Options
from deploy_prune.tasks import load_task

ROOT = Path(os.environ.get("DEPLOY_PRUNE_DATA", ""))
pytestmark = [
    pytest.mark.data,
    pytest.mark.skipif(not os.environ.get("DEPLOY_PRUNE_DATA"), reason="DEPLOY_PRUNE_DATA is not set"),
]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return run(
        load_recipe(
            model=str(ROOT / "checkpoints" / "minilm-sst2"),
            task="sst2",
            data=str(ROOT / "data" / "glue" / "SST-2"),
            samples=512,
            out=str(tmp_path_factory.mktemp("sst2") / "b"),
        ),
        bench=False,
    )


def test_half_of_sst2_is_sliced_exactly(bundle: Bundle) -> None:
    manifest = bundle.manifest
    counts = manifest.counts
    assert counts["sliced"]["encoder_flops"] <= 0.5 * counts["dense"]["encoder_flops"]
    assert counts["sliced"]["encoder_flops"] >= 0.499 * counts["dense"]["encoder_flops"]
    assert manifest.fidelity["sliced_to_virtual"]["max_abs"] <= 1e-5
    assert manifest.fidelity["sliced_to_virtual"]["agreement"] == 1.0
    assert manifest.quality["dense"]["n"] == 872
    assert manifest.quality["dense"]["value"] == pytest.approx(0.893, abs=0.003)
    assert manifest.quality["sliced"]["value"] > 0.86
    assert manifest.quality["sliced"] == manifest.quality["virtual"]


def test_flops_of_the_exported_graphs(bundle: Bundle) -> None:
    graphs = [a for a in bundle.manifest.artifacts if a.format == "onnx"]
    assert [a.variant for a in graphs] == ["dense", "virtual", "sliced"]
    for artifact in graphs:
        path = bundle.path(artifact.path)
        names = [i.name for i in onnx.load(path, load_external_data=False).graph.input]
        shapes = {name: (1, int(bundle.manifest.budget["seq_len"])) for name in names}
        assert count_onnx(path, shapes) == bundle.manifest.counts[artifact.variant]["flops"]


def test_checkpoint_in_fp16_computes_in_fp32(bundle: Bundle) -> None:
    dense = load_variant(bundle, "dense")
    assert {p.dtype for p in dense.parameters()} == {torch.float32}
    assert bundle.manifest.counts["dense"]["weight_bytes"] == 4 * bundle.manifest.counts["dense"]["params"]


PAPER = Options(compensate="mask-tuning", search="paper")


def test_refit_is_five_times_closer_than_mask_tuning() -> None:
    """Both as they run by default: the paper's three stages, and ours."""
    dense = load_dense(str(ROOT / "checkpoints" / "minilm-sst2"), "classification")
    task = load_task(
        "sst2",
        tokenizer=dense.processor,
        config=dense.model.config,
        data=ROOT / "data" / "glue" / "SST-2",
    )
    head = Head("classification")
    pruner = Pruner(dense.model, head, task.train.encode(sample_indices(len(task.train), 2048, 0)))
    evaluation = task.evaluation.rows()
    expected = predict(dense.model, head, evaluation)

    def distance(options: Options) -> float:
        sliced = pruner.prune(Budget(0.5), options).sliced
        assert sliced is not None
        kl = fidelity("classification", expected, predict(sliced, head, evaluation))["kl"]
        assert kl is not None
        return kl

    assert distance(Options()) <= distance(PAPER) / 5


MECHANICS = {
    "stsb": ("regression", "data/glue/STS-B", {"num_labels": 1}),
    "mrpc": ("classification", "data/glue/MRPC", {"num_labels": 2}),
    "squad": ("qa", "data/squad", {}),
}


@pytest.mark.parametrize("task", MECHANICS)
def test_other_tasks_run_on_real_files(task: str, tmp_path: Path) -> None:
    head, data, changes = MECHANICS[task]
    tokenizer = transformers.AutoTokenizer.from_pretrained(ROOT / "checkpoints" / "minilm-sst2")
    model = tiny_model("bert", head, vocab_size=len(tokenizer), max_position_embeddings=512, **changes)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    made = run(
        load_recipe(
            model=str(tmp_path / "model"),
            task=task,
            data=str(ROOT / data),
            samples=64,
            out=str(tmp_path / "b"),
        ),
        export=False,
        bench=False,
    )
    assert made.manifest.quality["sliced"]["n"] >= 400
    assert made.manifest.fidelity["sliced_to_virtual"]["max_abs"] <= 1e-4


def test_half_of_a_vision_transformer_is_sliced_exactly(tmp_path: Path) -> None:
    with np.load(ROOT / "data" / "vision" / "fashion_mnist.npz", allow_pickle=False) as whole:
        part = {name: whole[name][: 3000 if name.endswith("train") else 2000] for name in whole.files}
    np.savez(tmp_path / "fashion.npz", **part)
    made = run(
        load_recipe(
            model=str(ROOT / "checkpoints" / "vit-fashion"),
            task="fashion_mnist",
            data=str(tmp_path / "fashion.npz"),
            samples=512,
            formats=("onnx",),
            out=str(tmp_path / "b"),
        ),
        bench=False,
    )
    manifest = made.manifest
    assert manifest.model["tokens"] == manifest.budget["seq_len"] == 50
    assert manifest.counts["sliced"]["encoder_flops"] <= 0.5 * manifest.counts["dense"]["encoder_flops"]
    assert manifest.fidelity["sliced_to_virtual"]["max_abs"] <= 1e-5
    assert manifest.fidelity["sliced_to_virtual"]["agreement"] == 1.0
    dense, sliced = (manifest.quality[name]["value"] for name in ("dense", "sliced"))
    assert dense == pytest.approx(0.83, abs=0.02)
    assert sliced > dense - 0.01
    assert [a.parity.status for a in manifest.artifacts] == ["passed"] * 3


def test_resnet56_on_cifar10(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A part of the images; the evidence on all of them is in docs/results.md."""
    recipes = Path(__file__).resolve().parents[1] / "recipes" / "experiments"
    monkeypatch.syspath_prepend(str(recipes))
    monkeypatch.setenv(ALLOW_CODE, "cnn_models")
    import cnn

    cnn.folder("resnet56", ROOT / "checkpoints" / "resnet56-cifar10" / "model.safetensors", tmp_path / "m", "cifar10")
    with np.load(ROOT / "data" / "vision" / "cifar10.npz", allow_pickle=False) as whole:
        part = {name: whole[name][:1000] for name in whole.files if name.startswith(("x_", "y_"))}
    np.savez(tmp_path / "cifar.npz", **part)
    made = run(
        load_recipe(
            model=str(tmp_path / "m"),
            task="cifar10",
            data=str(tmp_path / "cifar.npz"),
            keep_flops=0.7,
            samples=512,
            formats=("onnx",),
            out=str(tmp_path / "b"),
        ),
        bench=False,
    )
    manifest = made.manifest
    assert manifest.counts["sliced"]["flops"] <= 0.7 * manifest.counts["dense"]["flops"]
    assert manifest.fidelity["sliced_to_virtual"]["agreement"] == 1.0
    dense, sliced = (manifest.quality[name]["value"] for name in ("dense", "sliced"))
    assert dense == pytest.approx(0.932, abs=0.02)
    assert sliced > dense - 0.03
    assert [a.parity.status for a in manifest.artifacts] == ["passed"] * 3
