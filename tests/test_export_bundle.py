"""A bundle gets all of its files, checked against its golden outputs, or none."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from bundles_tiny import exported_bundle, make_bundle

from deploy_prune.bundle import VARIANTS, Bundle, GoldenCase
from deploy_prune.errors import InputError, VerdictError
from deploy_prune.export import check_parity, export_bundle
from deploy_prune.export.onnx import OnnxExporter, onnx_from_torch
from deploy_prune.export.registry import Source, available_exporters
from deploy_prune.runtimes import open_runner


def tree(root: Path) -> set[str]:
    return {str(p.relative_to(root)) for p in root.rglob("*")}


def test_every_variant_is_stored_with_its_parity(tmp_path: Path) -> None:
    bundle = exported_bundle(tmp_path)
    assert [a.variant for a in bundle.manifest.artifacts] == list(VARIANTS)
    for artifact in bundle.manifest.artifacts:
        assert (artifact.format, artifact.dialect, artifact.precision) == ("onnx", "opset23", "fp32")
        assert artifact.scheme is None
        assert artifact.parity.status == "passed"
        assert artifact.parity.max_abs is not None
        assert artifact.parity.max_abs < 1e-5
        assert bundle.manifest.files[artifact.path] == artifact.sha256
        assert artifact.path == f"artifacts/{artifact.variant}-onnx-opset23-fp32-{artifact.sha256[:12]}.onnx"
    props = {p.key: p.value for p in onnx.load(bundle.path(artifact.path)).metadata_props}
    assert json.loads(props["deploy_prune.plan_hash"]) == bundle.plan().hash
    assert json.loads(props["deploy_prune.labels"]) == ["no", "yes"]
    assert props["deploy_prune.variant"] == "sliced"
    assert not [name for name in tree(bundle.root) if name.startswith(".export")]


def test_exporting_again_replaces_the_entry(tmp_path: Path) -> None:
    bundle = exported_bundle(tmp_path)
    bundle.manifest.task["labels"] = ["negative", "positive"]  # other metadata, another hash
    old = next(a.path for a in bundle.manifest.artifacts if a.variant == "sliced")
    (artifact,) = export_bundle(bundle, variants=["sliced"])
    bundle.commit()
    assert [a.variant for a in bundle.manifest.artifacts] == list(VARIANTS)
    assert artifact.path != old
    assert not (bundle.root / old).exists()
    Bundle.open(bundle.root)


def test_a_wrong_model_is_a_verdict_and_leaves_nothing(tmp_path: Path) -> None:
    bundle = exported_bundle(tmp_path)
    before, manifest = tree(bundle.root), bundle.manifest.model_dump_json()
    _, models = make_bundle(tmp_path / "other")
    with pytest.raises(VerdictError, match=r"logits of the exported sliced model at batch x sequence .* off by"):
        export_bundle(bundle, variants=["dense", "sliced"], models={**models, "sliced": models["dense"]})
    assert tree(bundle.root) == before
    assert bundle.manifest.model_dump_json() == manifest


def test_unknown_format_or_precision(tmp_path: Path) -> None:
    bundle = exported_bundle(tmp_path)
    with pytest.raises(InputError, match="There are: onnx"):
        export_bundle(bundle, formats=["coreml"])
    with pytest.raises(InputError, match="There are: fp32"):
        export_bundle(bundle, precisions=["fp7"])


def test_large_weights_lie_beside_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Large(OnnxExporter):
        def export(self, source: Source, path: Path) -> None:
            names = source.input_names
            onnx_from_torch(source.model, source.head, path, input_names=names, external_data_above_bytes=1000)

    monkeypatch.setitem(available_exporters(), "onnx", Large())
    bundle = exported_bundle(tmp_path)
    export_bundle(bundle, variants=["sliced"])
    bundle.commit()
    (data,) = [n for n in bundle.manifest.files if n.endswith(".data")]
    moved = Bundle.open(shutil.move(bundle.root, tmp_path / "moved"))
    case = moved.golden()[3]
    with open_runner(moved, "ort-cpu", "sliced") as runner:
        np.testing.assert_allclose(runner.infer(case.inputs)["logits"], case.outputs["sliced"]["logits"], atol=1e-5)
    monkeypatch.undo()
    export_bundle(moved, variants=["sliced"])  # small again: the data file goes with the entry it belonged to
    moved.commit()
    assert data not in moved.manifest.files
    assert not (moved.root / data).exists()


class Fixed:
    """Answer with given outputs, as a runner would."""

    input_names = ("input_ids", "attention_mask")

    def __init__(self, outputs: dict[str, np.ndarray]) -> None:
        self.outputs = outputs

    def infer(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return self.outputs


def case(logits: np.ndarray, mask: list[list[int]]) -> GoldenCase:
    ids = np.ones((len(mask), len(mask[0])), np.int64)
    return GoldenCase({"input_ids": ids, "attention_mask": np.array(mask)}, {"sliced": {"logits": logits}})


def parity(got: np.ndarray, golden: GoldenCase, head: str) -> Any:
    return check_parity(Fixed({"logits": got}), [golden], "sliced", head=head)  # type: ignore[arg-type]


def test_padding_counts_only_where_outputs_are_per_sequence() -> None:
    golden = case(np.zeros((1, 2), np.float32), [[1, 0]])
    off = np.array([[0.0, 1.0]], np.float32)
    assert parity(off, golden, "token").max_abs == 0.0
    with pytest.raises(VerdictError, match=r"\(1, 2\) is off by 1"):
        parity(off, golden, "classification")


@pytest.mark.parametrize("bad", [np.nan, np.inf, 2e-4])
def test_nan_inf_and_anything_above_the_tolerance_fail(bad: float) -> None:
    golden = case(np.zeros((1, 2), np.float32), [[1, 1]])
    assert parity(np.full((1, 2), 9e-5, np.float32), golden, "classification").status == "passed"
    with pytest.raises(VerdictError, match="off by"):
        parity(np.array([[0.0, bad]], np.float32), golden, "classification")


def test_a_wrong_shape_fails_and_no_golden_outputs_means_not_run() -> None:
    golden = case(np.zeros((1, 2), np.float32), [[1, 1]])
    with pytest.raises(VerdictError, match=r"is \(2, 1\), expected \(1, 2\)"):
        parity(np.zeros((2, 1), np.float32), golden, "classification")
    golden.outputs.clear()
    result = parity(np.zeros((1, 2), np.float32), golden, "classification")
    assert result.status == "not_run"
    assert "no golden outputs" in result.reason
