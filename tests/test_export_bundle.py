"""A bundle gets the files that compute what its golden outputs say, and says what it did not get, and why."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from bundles_tiny import exported_bundle, input_names, make_bundle, tiny_inputs

from deploy_prune.bundle import VARIANTS, Bundle, GoldenCase
from deploy_prune.checkpoint import load_variant
from deploy_prune.errors import InputError, VerdictError
from deploy_prune.export import Evaluation, Options, check_parity, export_bundle, verify_bundle
from deploy_prune.export.registry import Kind
from deploy_prune.heads import Head
from deploy_prune.predict import predict
from deploy_prune.runtimes import open_runner
from deploy_prune.tasks.base import Row, Split, TaskData


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
    (artifact,) = export_bundle(bundle, variants=["sliced"]).artifacts
    bundle.commit()
    assert [a.variant for a in bundle.manifest.artifacts] == list(VARIANTS)
    assert artifact.path != old
    assert not (bundle.root / old).exists()
    Bundle.open(bundle.root)


def test_a_wrong_model_is_a_verdict_and_is_left_out(tmp_path: Path) -> None:
    bundle = exported_bundle(tmp_path)
    bundle.manifest.task["labels"] = ["negative", "positive"]  # other metadata: nothing is taken over
    old = next(a for a in bundle.manifest.artifacts if a.variant == "sliced")
    _, models = make_bundle(tmp_path / "other")
    made = export_bundle(bundle, variants=["dense", "sliced"], models={**models, "sliced": models["dense"]})
    bundle.commit()
    assert [a.variant for a in made.artifacts] == ["dense"]
    with pytest.raises(VerdictError, match=r"sliced onnx-opset23-fp32: .* batch x sequence .* off by"):
        made.check()
    assert old in Bundle.open(bundle.root).manifest.artifacts  # the earlier file stays
    assert not [name for name in tree(bundle.root) if name.startswith(".export")]


def test_unknown_format_or_precision(tmp_path: Path) -> None:
    bundle = exported_bundle(tmp_path)
    with pytest.raises(InputError, match="There are: auto, onnx"):
        export_bundle(bundle, formats=["coreml"])
    with pytest.raises(InputError, match="There are: bf16"):
        export_bundle(bundle, precisions=["fp7"])


def test_large_weights_lie_beside_the_file(tmp_path: Path) -> None:
    bundle = exported_bundle(tmp_path)
    export_bundle(bundle, variants=["sliced"], options=Options(external_data_above_bytes=1000))
    bundle.commit()
    (data,) = [n for n in bundle.manifest.files if n.endswith(".data")]
    moved = Bundle.open(shutil.move(bundle.root, tmp_path / "moved"))
    case = moved.golden()[3]
    with open_runner(moved, "ort-cpu", "sliced") as runner:
        np.testing.assert_allclose(runner.infer(case.inputs)["logits"], case.outputs["sliced"]["logits"], atol=1e-5)
    export_bundle(moved, variants=["sliced"])  # small again: the data file goes with the entry it belonged to
    moved.commit()
    assert data not in moved.manifest.files
    assert not (moved.root / data).exists()


def no_work(*_: Any, **__: Any) -> Any:
    raise AssertionError("this should have been taken over")


def test_the_same_weights_and_options_are_no_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = exported_bundle(tmp_path)
    before = bundle.manifest.model_dump_json()
    monkeypatch.setattr("deploy_prune.checkpoint.load_variant", no_work)
    made = export_bundle(bundle)
    assert (made.reused, len(made.artifacts)) == (3, 3)
    assert bundle.manifest.model_dump_json() == before


def test_a_later_bundle_takes_over_from_the_one_it_replaces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = exported_bundle(tmp_path)
    export_bundle(first, variants=["sliced"], options=Options(external_data_above_bytes=1000))
    first.commit()
    shutil.copytree(first.root, tmp_path / "second")
    second = Bundle.open(tmp_path / "second")
    second.manifest.artifacts = []
    monkeypatch.setattr("deploy_prune.checkpoint.load_variant", no_work)
    made = export_bundle(second, variants=["sliced"], options=Options(external_data_above_bytes=1000), previous=[first])
    second.commit()
    assert made.reused == 1
    assert verify_bundle(Bundle.open(second.root)).failures == {}
    with open_runner(second, "ort-cpu", "sliced") as runner:
        assert runner.infer(second.golden()[1].inputs)["logits"].shape == (1, 2)


@pytest.mark.parametrize(
    "change",
    [
        lambda b: b.manifest.files.update({"sliced/model.safetensors": "0" * 64}),
        lambda b: b.manifest.plan.update({"hash": "0" * 64}),
        lambda b: b.manifest.task.update({"labels": ["a", "b"]}),
    ],
    ids=["weights", "plan", "labels"],
)
def test_whatever_the_file_depends_on_makes_it_anew(change: Any, tmp_path: Path) -> None:
    bundle = exported_bundle(tmp_path)
    change(bundle)
    assert export_bundle(bundle, variants=["sliced"]).reused == 0


def test_lower_precisions_lie_beside_and_static_int8_needs_data(tmp_path: Path) -> None:
    bundle = exported_bundle(tmp_path)
    made = export_bundle(bundle, formats=["onnx"], precisions=["fp32", "fp16", "bf16", "int8"])
    bundle.commit()
    found = {(a.variant, a.precision, a.scheme) for a in made.artifacts}
    assert found == {("virtual", "fp32", None)} | {
        (v, p, s) for v in ("dense", "sliced") for p, s in (("fp32", None), ("fp16", None), ("int8", "dynamic"))
    }
    assert all(a.parity.status == "passed" and a.parity.agreement is not None for a in made.artifacts)
    lines = made.left_out()
    assert any("onnx bf16" in line for line in lines)
    assert any("static int8 (qdq) needs calibration data" in line for line in lines)
    assert any("virtual model is a control" in line for line in lines)
    with open_runner(bundle, "ort-cpu", "sliced", precision="int8") as runner:
        assert runner.infer(bundle.golden()[0].inputs)["logits"].shape == (1, 2)


def test_quality_of_a_lower_precision_is_measured(tmp_path: Path) -> None:
    bundle = exported_bundle(tmp_path)
    head, model = Head("classification"), load_variant(bundle, "sliced")
    rows = [Row(tiny_row(seed)) for seed in range(40)]
    outputs = predict(model, head, rows)
    labels = [int(out["logits"].argmax()) for out in outputs]
    evaluation = Evaluation(tiny_data(rows, labels), rows, head, 0)
    made = export_bundle(
        bundle, precisions=["int8"], variants=["sliced"], evaluation=evaluation, options=Options(calibration_rows=16)
    )
    assert {a.scheme for a in made.artifacts} == {"dynamic", "qdq"}
    for artifact in made.artifacts:
        assert artifact.quality is not None
        assert artifact.quality["fp32"] == 1.0
        assert artifact.quality["value"] == artifact.quality["to_fp32"]["agreement"] >= 0.8
        assert 0 < artifact.quality["to_fp32"]["kl"] < 0.1
    static = next(a for a in made.artifacts if a.scheme == "qdq")
    assert static.calibration == {"method": "minmax", "rows": 16}  # type: ignore[attr-defined]
    fixed = Options(shape=(1, 16))  # ONNX Runtime once refused static int8 of a fixed shape
    made = export_bundle(bundle, precisions=["int8"], variants=["sliced"], evaluation=evaluation, options=fixed)
    made.check()
    assert [(a.scheme, a.parity.status, a.quality) for a in made.artifacts] == [
        ("dynamic", "passed", None),
        ("qdq", "passed", None),
    ]


def test_a_file_made_without_data_is_measured_later(tmp_path: Path) -> None:
    bundle = exported_bundle(tmp_path)
    (first,) = export_bundle(bundle, precisions=["fp16"], variants=["sliced"]).artifacts
    assert first.quality is None
    rows = [Row(tiny_row(seed)) for seed in range(8)]
    evaluation = Evaluation(tiny_data(rows, [0] * 8), rows, Head("classification"), 0)
    again = export_bundle(bundle, precisions=["fp16"], variants=["sliced"], evaluation=evaluation)
    assert again.artifacts[0].quality is not None
    assert export_bundle(bundle, precisions=["fp16"], variants=["sliced"], evaluation=evaluation).reused == 1


def test_a_tool_that_breaks_fails_its_own_file_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = exported_bundle(tmp_path)

    def broken(*_: Any) -> Any:
        raise RuntimeError("the converter fell over\nand over")

    monkeypatch.setattr("deploy_prune.export.lower.to_fp16", broken)
    made = export_bundle(bundle, formats=["onnx", "pt2"], precisions=["fp16"], variants=["sliced"])
    assert [a.format for a in made.artifacts] == ["pt2"]
    with pytest.raises(
        VerdictError, match="onnx-opset23-fp16: The build failed: RuntimeError: the converter fell over"
    ):
        made.check()


def test_fixed_shapes_are_kinds_of_their_own(tmp_path: Path) -> None:
    bundle = exported_bundle(tmp_path)
    (fixed,) = export_bundle(bundle, variants=["sliced"], options=Options(shape=(2, 9))).artifacts
    bundle.commit()
    assert fixed.shape == (2, 9)
    assert fixed.parity.status == "passed"  # golden rows of 13 and 24 tokens are cut to 9
    assert "-2x9-" in fixed.path
    assert len([a for a in bundle.manifest.artifacts if a.variant == "sliced"]) == 2
    with open_runner(bundle, "ort-cpu", "sliced") as runner:  # the one with free axes
        assert runner.inputs[0].shape == ("batch", "sequence")
    found = verify_bundle(Bundle.open(bundle.root))
    assert found.failures == {}
    assert len(found.artifacts) == 4
    stored = next(a for a in found.artifacts if a.shape)
    assert stored.parity == fixed.parity  # of the same rows, cut alike
    with pytest.raises(InputError, match="66 positions, not 67"):
        export_bundle(bundle, variants=["sliced"], options=Options(shape=(1, 67)))


def test_verify_runs_files_of_a_shape_that_no_golden_row_fits(tmp_path: Path) -> None:
    """It once left them out and showed the parity of the export."""
    bundle = exported_bundle(tmp_path)
    small = Options(shape=(1, 1))
    (dense,) = export_bundle(bundle, variants=["dense"], options=small).artifacts
    (sliced,) = export_bundle(bundle, variants=["sliced"], options=small).artifacts
    sliced.path, sliced.sha256 = dense.path, dense.sha256
    assert list(verify_bundle(bundle).failures) == ["sliced onnx-opset23-fp32-1x1"]


def test_verify_finds_a_file_that_computes_something_else(tmp_path: Path) -> None:
    bundle = exported_bundle(tmp_path)
    dense, sliced = (next(a for a in bundle.manifest.artifacts if a.variant == v) for v in ("dense", "sliced"))
    sliced.path, sliced.sha256 = dense.path, dense.sha256
    found = verify_bundle(bundle)
    assert list(found.failures) == ["sliced onnx-opset23-fp32"]
    with pytest.raises(VerdictError, match="off by"):
        found.check()


def test_kinds_have_readable_names() -> None:
    assert Kind("onnx", "opset23", "int8", "qdq", (1, 128)).label == "onnx-opset23-int8-qdq-1x128"


def tiny_row(seed: int) -> dict[str, np.ndarray]:
    return {name: array[0] for name, array in tiny_inputs(input_names("bert"), 1, 3 + seed % 9, seed).items()}


def tiny_data(rows: list[Row], labels: list[int]) -> TaskData:
    class Labelled(Split):
        name, labelled = "validation", True

        def __len__(self) -> int:
            return len(rows)

        def encode(self, indices: Sequence[int]) -> list[Row]:
            return [rows[i] for i in indices]

        def rows(self) -> list[Row]:
            return rows

        def score(self, outputs: Sequence[Any], dense: Sequence[Any] | None = None) -> dict[str, float]:
            return {
                "accuracy": float(np.mean([o["logits"].argmax() == y for o, y in zip(outputs, labels, strict=True)]))
            }

    return TaskData("tiny", "classification", "accuracy", Labelled(), {"validation": Labelled()})


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
    assert parity(off, golden, "qa").max_abs == 0.0
    with pytest.raises(VerdictError, match=r"\(1, 2\) is off by 1"):
        parity(off, golden, "classification")


def test_agreement_counts_what_a_user_reads_off() -> None:
    spans = np.array([[0.0, 5e-5, 9.0], [1.0, 0.0, 0.0]], np.float32)  # the 9 stands on padding
    moved = np.array([[6e-5, 0.0, 9.0], [1.0, 0.0, 0.0]], np.float32)
    assert parity(moved, case(spans, [[1, 1, 0], [1, 1, 1]]), "qa").agreement == 0.5
    words = np.array([[[0.0, 5e-5], [1.0, 0.0], [1.0, 0.0]]], np.float32)
    moved = np.array([[[5e-5, 0.0], [1.0, 0.0], [0.0, 1.0]]], np.float32)
    assert parity(moved, case(words, [[1, 1, 0]]), "token").agreement == 0.5
    assert parity(words[0], case(words[0], [[1], [1], [1]]), "classification").agreement == 1.0
    assert parity(words[0], case(words[0], [[1], [1], [1]]), "embedding").agreement is None


@pytest.mark.parametrize("bad", [np.nan, np.inf, 2e-4])
def test_nan_inf_and_anything_above_the_tolerance_fail(bad: float) -> None:
    golden = case(np.zeros((1, 2), np.float32), [[1, 1]])
    assert parity(np.full((1, 2), 9e-5, np.float32), golden, "classification").status == "passed"
    with pytest.raises(VerdictError, match="off by"):
        parity(np.array([[0.0, bad]], np.float32), golden, "classification")


def test_large_outputs_may_round_by_more() -> None:
    golden = case(np.full((1, 2), 200.0, np.float32), [[1, 1]])
    assert parity(np.full((1, 2), 200.001, np.float32), golden, "regression").status == "passed"
    with pytest.raises(VerdictError, match="off by"):
        parity(np.full((1, 2), 200.003, np.float32), golden, "regression")


def test_a_wrong_shape_fails_and_no_golden_outputs_means_not_run() -> None:
    golden = case(np.zeros((1, 2), np.float32), [[1, 1]])
    with pytest.raises(VerdictError, match=r"is \(2, 1\), expected \(1, 2\)"):
        parity(np.zeros((2, 1), np.float32), golden, "classification")
    golden.outputs.clear()
    result = parity(np.zeros((1, 2), np.float32), golden, "classification")
    assert result.status == "not_run"
    assert "no golden outputs" in result.reason
