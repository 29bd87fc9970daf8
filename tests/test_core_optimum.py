"""optimum's users: its exporter on sliced models, and its runtime classes on a bundle's ONNX.

optimum-onnx lives beside transformers 4.57 (`make test-transformers4`).
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from bundles_tiny import exported_bundle, make_bundle

from deploy_prune.errors import InputError, MissingExtraError, VerdictError
from deploy_prune.export import Options, export_bundle, plan_kinds
from deploy_prune.export.optimum import missing_optimum

installed = missing_optimum() is None
needs_optimum = pytest.mark.skipif(not installed, reason="optimum-onnx is not installed (it pins transformers < 4.58)")
OPTIMUM = Options(exporter="optimum")


@needs_optimum
@pytest.mark.parametrize(
    ("family", "kind", "name"),
    [
        ("bert", "classification", "ORTModelForSequenceClassification"),
        ("roberta", "qa", "ORTModelForQuestionAnswering"),
        ("distilbert", "token", "ORTModelForTokenClassification"),
    ],
)
def test_sliced_onnx_loads_in_optimum(family: str, kind: str, name: str, tmp_path: Path) -> None:
    from optimum import onnxruntime

    bundle, models = make_bundle(tmp_path / "bundle", family, kind)
    (artifact,) = export_bundle(bundle, variants=["sliced"], models=models).artifacts
    folder = tmp_path / "optimum"
    folder.mkdir()
    shutil.copy(bundle.path(artifact.path), folder / "model.onnx")
    shutil.copy(bundle.path("sliced/config.json"), folder)
    loaded: Any = getattr(onnxruntime, name).from_pretrained(folder)
    for case in bundle.golden():
        found = loaded(**{k: torch.from_numpy(v) for k, v in case.inputs.items()})
        real = case.inputs["attention_mask"].astype(bool)
        for output, expected in case.outputs["sliced"].items():
            difference = np.abs(found[output].numpy() - expected)
            assert (difference if kind == "classification" else difference[real]).max() <= 1e-4


@needs_optimum
@pytest.mark.parametrize(
    ("family", "kind"),
    [("bert", "classification"), ("roberta", "qa"), ("distilbert", "token"), ("mpnet", "classification")],
)
def test_optimum_exports_sliced_models(family: str, kind: str, tmp_path: Path) -> None:
    bundle, models = make_bundle(tmp_path / "bundle", family, kind)
    made = export_bundle(bundle, variants=["dense", "sliced"], models=models, options=OPTIMUM)
    made.check()
    assert [(a.dialect, a.parity.status) for a in made.artifacts] == [("optimum", "passed")] * 2
    assert all(a.parity.max_abs is not None and a.parity.max_abs < 1e-5 for a in made.artifacts)


@needs_optimum
def test_a_wrong_export_is_refused_with_its_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle, models = make_bundle(tmp_path / "bundle")
    monkeypatch.setattr("deploy_prune.export.onnx.onnx_from_optimum", _traced_at_one_length)
    made = export_bundle(bundle, variants=["sliced"], models=models, options=OPTIMUM)
    assert made.artifacts == []
    with pytest.raises(VerdictError, match=r"onnx-optimum-fp32: .*(off by|expected)"):
        made.check()


def _traced_at_one_length(model: Any, head: str, path: Path) -> Any:
    """Write what TorchScript is feared to write: a graph that is right where it was traced alone."""
    from deploy_prune.export.optimum import onnx_from_optimum

    with torch.no_grad():
        model.classifier.bias += 1.0
    try:
        return onnx_from_optimum(model, head, path)  # type: ignore[arg-type]
    finally:
        with torch.no_grad():
            model.classifier.bias -= 1.0


@needs_optimum
def test_a_head_that_optimum_lacks_is_named(tmp_path: Path) -> None:
    bundle, models = make_bundle(tmp_path / "bundle", "bert", "embedding")
    made = export_bundle(bundle, variants=["sliced"], models=models, options=OPTIMUM)
    error = made.failures["sliced onnx-optimum-fp32"]
    assert isinstance(error, InputError)
    assert "no embedding head" in error.message


@pytest.mark.skipif(installed, reason="optimum-onnx is installed")
def test_without_optimum_the_extra_is_named(tmp_path: Path) -> None:
    assert int(transformers.__version__.split(".")[0]) >= 4
    with pytest.raises(MissingExtraError, match=r"deploy-prune\[optimum\]"):
        plan_kinds(["onnx"], ["fp32"], OPTIMUM)
    assert exported_bundle(tmp_path).manifest.artifacts
