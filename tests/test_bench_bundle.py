"""The bench measures what it can, says what it could not, and replaces what it measured before."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles_tiny import exported_bundle

from deploy_prune.bundle import VARIANTS, Bundle
from deploy_prune.cli import invoke
from deploy_prune.config import BenchSettings, load_settings
from deploy_prune.errors import InputError
from deploy_prune.export import Options, export_bundle
from deploy_prune.runtime_bench.bench import bench_bundle, bench_paths
from deploy_prune.runtime_bench.report import summary_rows
from deploy_prune.runtime_bench.results import latest_bench, stored_runs
from deploy_prune.runtime_bench.subjects import bundle_feeds, distinct_names, file_feeds, file_subject
from deploy_prune.runtimes import open_onnx, open_runner

QUICK: dict[str, Any] = {"seconds": 0.1, "min_rounds": 5, "warmup_seconds": 0.1, "threads": (1,)}


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return exported_bundle(tmp_path)


def bench_files(bundle: Bundle) -> list[str]:
    return [name for name in bundle.manifest.files if name.startswith("bench/")]


def quick(bundle: Bundle, **settings: Any) -> dict[str, Any]:
    return bench_bundle(bundle, BenchSettings(**(QUICK | settings)))


def test_both_runtimes_measure_every_variant(bundle: Bundle) -> None:
    result = quick(bundle)
    bundle.commit()
    assert result["failures"] == []
    keys = [(m["runtime"], m["model"], m["batch"], m["seq"]) for m in result["measurements"]]
    assert keys == [(r, v, 1, 12) for r in ("ort-cpu", "torch") for v in VARIANTS]
    for m in result["measurements"]:
        ms = m["latency_ms"]
        assert 0 < ms["min"] <= ms["median"] <= ms["p90"] <= ms["p95"] <= ms["p99"] <= ms["max"]
        assert m["ratio"]["low"] <= m["ratio"]["value"] <= m["ratio"]["high"]
        assert m["runs"] >= m["rounds"] >= 5
        assert m["rows_per_second"] == pytest.approx(1000 / ms["mean"])
        assert m["peak_rss_bytes"] >= m["baseline_rss_bytes"] + m["resident_bytes"] > m["baseline_rss_bytes"] > 0
        assert m["difference"] in ((None,) if m["model"] == "dense" else ("faster", "slower", "none"))
    dense = result["measurements"][0]
    assert dense["ratio"] == {"value": 1.0, "low": 1.0, "high": 1.0}
    assert dense["provider"] == "CPUExecutionProvider"
    for noise in result["noise"]:
        assert noise["floor"] == max(noise["ratio"]["high"] - 1, 1 - noise["ratio"]["low"], 0)
    assert result["machine"]["threads"] == 1
    assert {"numpy", "onnxruntime", "torch"} <= set(result["machine"]["versions"])
    raw, name = sorted(bench_files(bundle), key=lambda n: n.endswith("json"))
    assert json.loads(bundle.path(name).read_text()) == result
    assert result["samples"] == raw
    with np.load(bundle.path(raw), allow_pickle=False) as samples:
        wall, rounds = samples["ort-cpu/1x12/t1/sliced/wall_ns"], samples["ort-cpu/1x12/t1/sliced/round"]
        assert len(wall) == len(rounds) == result["measurements"][2]["runs"]
        assert np.median(wall) / 1e6 == pytest.approx(result["measurements"][2]["latency_ms"]["median"])  # to an ulp
        assert rounds[0] == 0
        assert rounds[-1] + 1 == result["measurements"][2]["rounds"]
        assert "ort-cpu/1x12/t1//control/cpu_ns" in samples
    Bundle.open(bundle.root)


def test_every_cell_of_the_matrix_is_measured(bundle: Bundle) -> None:
    shapes = {"batches": (1, 3), "seqs": (4, 9), "threads": (1, 2)}
    result = quick(bundle, runtimes=("ort-cpu",), models=("sliced", "virtual"), control=False, **shapes)
    cells = [(m["batch"], m["seq"], m["threads"], m["model"]) for m in result["measurements"]]
    assert cells == [(b, s, t, m) for b in (1, 3) for s in (4, 9) for t in (1, 2) for m in ("sliced", "virtual")]
    assert result["baseline"] == "sliced"  # no dense one: the first
    assert {n["floor"] for n in result["noise"]} == {None}


def test_lower_precisions_are_measured_where_there_are_files(bundle: Bundle) -> None:
    export_bundle(bundle, precisions=["int8"], variants=["sliced"]).check()
    bundle.commit()
    result = quick(bundle)
    assert result["failures"] == []  # nobody asked for int8 in torch
    measured = {(m["runtime"], m["model"]) for m in result["measurements"]}
    assert measured == {(r, v) for r in ("ort-cpu", "torch") for v in VARIANTS} | {("ort-cpu", "sliced:int8")}
    asked = quick(bundle, models=("sliced:int8", "dense:fp16"))
    assert [m["runtime"] for m in asked["measurements"]] == ["ort-cpu"]
    said = [(f["runtime"], f["model"]) for f in asked["failures"]]
    assert said == [("ort-cpu", "dense:fp16"), ("torch", "sliced:int8"), ("torch", "dense:fp16")]
    assert "--precision fp16" in asked["failures"][0]["traceback"] or "no fp16 onnx" in asked["failures"][0]["reason"]


def test_the_same_settings_replace_and_others_are_merged(bundle: Bundle) -> None:
    def run(seq: int) -> dict[str, Any]:
        return quick(bundle, runtimes=("ort-cpu",), seqs=(seq,), models=("sliced",))

    run(4), run(9)
    last = run(4)
    bundle.commit()
    assert len(bench_files(bundle)) == 4
    assert len(list((bundle.root / "bench").iterdir())) == 4
    merged = latest_bench(bundle)
    assert [m["seq"] for m in merged["measurements"]] == [4, 9]
    where = {"samples": last["samples"], "baseline": "sliced", "cpu": last["machine"]["cpu"]}
    assert merged["measurements"][0] == last["measurements"][0] | where
    assert merged["measurements"][0]["flops"] > 0
    runs = stored_runs(bundle, merged["measurements"][:1])["sliced"]
    assert np.median(runs) == pytest.approx(last["measurements"][0]["latency_ms"]["median"])
    assert merged["machine"] == last["machine"]
    assert [n["seq"] for n in merged["noise"]] == [4, 9]


def test_a_failing_variant_does_not_stop_the_others(bundle: Bundle) -> None:
    broken = next(a for a in bundle.manifest.artifacts if a.variant == "virtual")
    bundle.path(broken.path).write_bytes(b"nonsense")
    result = quick(bundle, runtimes=("ort-cpu",))
    assert [m["model"] for m in result["measurements"]] == ["dense", "sliced"]
    (failure,) = result["failures"]
    assert (failure["runtime"], failure["model"]) == ("ort-cpu", "virtual")
    assert "cannot load" in failure["reason"]
    assert "Traceback" in failure["traceback"]
    assert latest_bench(bundle)["failures"] == [failure]


def test_a_failing_baseline_leaves_the_latencies_of_the_others(bundle: Bundle) -> None:
    broken = next(a for a in bundle.manifest.artifacts if a.variant == "dense")
    bundle.path(broken.path).write_bytes(b"nonsense")
    result = quick(bundle, runtimes=("ort-cpu",))
    assert [(m["model"], m["ratio"], m["difference"]) for m in result["measurements"]] == [
        ("virtual", None, None),
        ("sliced", None, None),
    ]
    assert [f["model"] for f in result["failures"]] == ["dense"]  # the control is not listed beside it


def test_a_length_without_positions_is_a_failure_with_its_reason(bundle: Bundle) -> None:
    result = quick(bundle, runtimes=("ort-cpu",), seqs=(67, 8), models=("dense",))
    assert [m["seq"] for m in result["measurements"]] == [8]
    assert [f["reason"] for f in result["failures"]] == ["The model has 66 positions, not 67."]


def test_the_matrix_of_the_recipes_is_valid_and_flags_override_it() -> None:
    file = Path(__file__).resolve().parents[1] / "recipes" / "bench-cpu.toml"
    settings = load_settings(BenchSettings, file, "bench", seconds="1")
    assert (settings.runtimes, settings.batches, settings.seconds) == (("ort-cpu", "openvino"), (1, 8), 1.0)


def test_bundles_are_compared_with_the_first(bundle: Bundle, tmp_path: Path) -> None:
    other = tmp_path / "other" / bundle.root.name
    shutil.copytree(bundle.root, other)
    result, samples = bench_paths([bundle.root, other], BenchSettings(**QUICK, runtimes=("ort-cpu",)))
    assert f"ort-cpu/1x12/t1/{bundle.root.parent.name}/{bundle.root.name}/sliced/wall_ns" in samples
    names = [f"{path.parent.name}/{path.name}/sliced" for path in (bundle.root, other)]
    assert [m["model"] for m in result["measurements"]] == names
    assert result["baseline"] == names[0]
    assert result["measurements"][1]["ratio"] is not None
    assert {m["seq"] for m in result["measurements"]} == {12}  # the budget's
    assert bench_files(bundle) == []


def test_any_onnx_files_are_compared(tmp_path: Path) -> None:
    """Files that this project did not make: float inputs, and a table that token ids look up in."""
    from onnx import TensorProto, helper, numpy_helper, save_model

    paths = []
    for rows in (7, 11):
        table = numpy_helper.from_array(np.ones((rows, 4), np.float32), "table")
        nodes = [
            helper.make_node("Gather", ["table", "input_ids"], ["looked"]),
            helper.make_node("Add", ["looked", "scale"], ["out"]),
        ]
        inputs = [
            helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["n", "t"]),
            helper.make_tensor_value_info("scale", TensorProto.FLOAT, [4]),
        ]
        outputs = [helper.make_tensor_value_info("out", TensorProto.FLOAT, ["n", "t", 4])]
        graph = helper.make_graph(nodes, "foreign", inputs, outputs, [table])
        path = tmp_path / f"rows{rows}.onnx"
        save_model(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)
        paths.append(path)
    result, _ = bench_paths(paths, BenchSettings(**QUICK))
    assert result["failures"] == []
    assert [(m["runtime"], m["model"], m["seq"]) for m in result["measurements"]] == [
        ("ort-cpu", "rows7", 128),
        ("ort-cpu", "rows11", 128),
    ]
    subject = file_subject("a", paths[0])
    assert subject.rows == {"input_ids": 7}
    with open_onnx(paths[0]) as runner:
        feeds = file_feeds(subject.rows, runner, 2, 50)
        assert runner.infer(feeds)["out"].shape == (2, 50, 4)
    assert feeds["input_ids"].max() == 6
    assert feeds["scale"].std() > 0


def test_the_scenarios_of_mlperf(bundle: Bundle) -> None:
    names = ("single-stream", "offline", "server")
    result = quick(bundle, runtimes=("ort-cpu",), models=("dense", "sliced"), scenarios=names, seconds=2.0)
    assert result["failures"] == []
    for m in result["measurements"]:
        found = m["scenarios"]
        assert tuple(found) == names
        for scenario in found.values():
            assert scenario["samples_per_second"] > 0
            ms = scenario["latency_ms"]
            assert 0 < ms["p50"] <= ms["p90"] <= ms["p99"]
        assert found["single-stream"]["valid"]
        server = found["server"]
        assert server["limit_kept"] == (server["latency_ms"]["p99"] <= server["limit_ms"])
    with pytest.raises(InputError, match="No scenario 'multi'"):
        quick(bundle, scenarios=("multi",))


def test_a_file_of_a_fixed_shape_is_measured_at_that_shape_alone(bundle: Bundle) -> None:
    """It was once run at its own shape and listed under the one asked for."""
    (fixed,) = export_bundle(bundle, variants=["sliced"], options=Options(shape=(1, 9))).artifacts
    path = bundle.path(fixed.path)
    result, _ = bench_paths([path], BenchSettings(**QUICK, seqs=(9, 12)))
    assert [m["seq"] for m in result["measurements"]] == [9]
    assert [f["reason"] for f in result["failures"]] == ["This file is fixed to 1x9."]


def picture_file(path: Path, batch: int | str) -> Path:
    """Write a network of images that this project did not make."""
    from onnx import TensorProto, helper, save_model

    shape = [batch, 3, 4, 4]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in ("pixels", "out")]
    graph = helper.make_graph([helper.make_node("Relu", ["pixels"], ["out"])], "foreign", values[:1], values[1:])
    save_model(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)
    return path


def test_a_file_of_a_fixed_batch_is_measured_at_that_batch_alone(tmp_path: Path) -> None:
    """It once ran at its own batch under the one asked for, with that many times its true rows a second."""
    result, _ = bench_paths([picture_file(tmp_path / "one.onnx", 1)], BenchSettings(**QUICK, batches=(1, 8)))
    assert [(m["batch"], m["seq"]) for m in result["measurements"]] == [(1, 1)]  # and no tokens in its title
    assert [f["reason"] for f in result["failures"]] == ["This file is fixed to batches of 1."]


def test_files_named_as_the_control_and_as_a_variant_are_measured(tmp_path: Path) -> None:
    paths = [picture_file(tmp_path / f"{name}.onnx", "n") for name in ("a", "control", "dense")]
    result, samples = bench_paths(paths, BenchSettings(**QUICK))
    assert [m["model"] for m in result["measurements"]] == ["a", "control", "dense"]
    assert result["baseline"] == "a"
    times = [samples[f"ort-cpu/1x1/t{QUICK['threads'][0]}/{name}/wall_ns"].tolist() for name in ("control", "/control")]
    assert times[0] != times[1]


def test_every_run_of_files_is_kept_beside_the_result(tmp_path: Path) -> None:
    path, out = picture_file(tmp_path / "a.onnx", "n"), tmp_path / "new" / "r.json"
    assert invoke(["bench", str(path), "--seconds", "0.1", "--min-rounds", "2", "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    assert result["samples"] == "r.npz"
    with np.load(out.with_name("r.npz"), allow_pickle=False) as samples:
        threads = result["measurements"][0]["threads"]
        assert len(samples[f"ort-cpu/1x1/t{threads}/a/wall_ns"]) == result["measurements"][0]["runs"]


def test_a_place_that_cannot_be_written_is_told_before_measuring(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = picture_file(tmp_path / "a.onnx", "n")
    monkeypatch.setattr("deploy_prune.runtime_bench.bench.bench", lambda *_: pytest.fail("it measured"))
    for out, words in ((tmp_path, "is a folder"), (path / "x.json", "a.onnx is a file")):
        assert invoke(["bench", str(path), "--out", str(out)]) == 2
        assert words in " ".join(capsys.readouterr().err.split())


def test_a_result_named_as_its_samples_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was once measured, and then overwrote them."""
    path, out = picture_file(tmp_path / "a.onnx", "n"), tmp_path / "r.npz"
    monkeypatch.setattr("deploy_prune.runtime_bench.bench.bench", lambda *_: pytest.fail("it measured"))
    assert invoke(["bench", str(path), "--out", str(out)]) == 2
    assert "Name it r.json" in " ".join(capsys.readouterr().err.split())
    assert not out.exists()


@pytest.mark.parametrize("location", ["model.onnx_data", "weights/all.bin"])
def test_weights_beside_a_file_count_in_its_size(location: str, tmp_path: Path) -> None:
    """Whatever they are called: optimum writes model.onnx_data."""
    import onnx

    path = picture_file(tmp_path / "model.onnx", "n")
    proto = onnx.load(path)
    (tmp_path / location).parent.mkdir(exist_ok=True)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.zeros(5000, np.float32), "unused"))
    onnx.save_model(proto, path, save_as_external_data=True, location=location, size_threshold=0)
    assert open_onnx(path).file_bytes() == path.stat().st_size + 20_000


def test_a_runtime_without_its_machine_fails_alone(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a file in lower precision in the bundle it once ended the bench, and nothing was stored."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    export_bundle(bundle, precisions=["fp16"], variants=["sliced"]).check()
    bundle.commit()
    result = quick(bundle, runtimes=("ort-cpu", "torch-cuda"))
    assert {m["runtime"] for m in result["measurements"]} == {"ort-cpu"}
    failed = [(f["runtime"], f["model"]) for f in result["failures"]]
    assert failed == [("torch-cuda", m) for m in (*VARIANTS, "sliced:fp16")]


def test_ratios_to_two_baselines_are_not_mixed(bundle: Bundle) -> None:
    """The report once called a ratio to sliced one to dense."""
    whole = quick(bundle, runtimes=("ort-cpu",))
    quick(bundle, runtimes=("ort-cpu",), models=("sliced", "virtual"))
    quick(bundle, runtimes=("ort-cpu",), models=("sliced",), seqs=(7,))
    bundle.commit()
    merged = {(m["seq"], m["model"]): m for m in latest_bench(bundle)["measurements"]}
    assert set(merged) == {(12, v) for v in VARIANTS} | {(7, "sliced")}
    assert merged[12, "sliced"]["ratio"] == whole["measurements"][2]["ratio"]
    assert {m["baseline"] for (seq, _), m in merged.items() if seq == 12} == {"dense"}
    (row,) = [r for r in summary_rows(bundle) if r["variant"] == "sliced"]
    assert [(s["seq"], s["ratio"] is None) for s in row["runtimes"]] == [(7, True)]  # the newest shape's


def test_bad_settings_are_refused_before_anything_runs(bundle: Bundle, tmp_path: Path) -> None:
    for options, words in (
        ({"runtimes": ("tvm",)}, "No runtime 'tvm'"),
        ({"models": ("half",)}, "No variant 'half'"),
        ({"models": ("sliced:int4",)}, "No precision 'int4'"),
        ({"models": ("sliced", "sliced")}, "Two models are called 'sliced'"),
    ):
        with pytest.raises(InputError, match=words):
            quick(bundle, **options)
    assert bench_files(bundle) == []
    onnx = bundle.path(bundle.manifest.artifacts[0].path)
    (tmp_path / "text.onnx").write_text("no model")
    for paths, settings, words in (
        ([bundle.root, onnx], {}, "cannot be compared"),
        ([onnx, onnx], {}, "named twice"),
        ([onnx], {"models": ("sliced",)}, "has no variants"),
        ([onnx], {"runtimes": ("torch",)}, "No runtime 'torch'"),
        ([tmp_path / "none.onnx"], {}, "No ONNX file at"),
        ([tmp_path / "text.onnx"], {}, "is no ONNX file"),
    ):
        with pytest.raises(InputError, match=words):
            bench_paths(paths, BenchSettings(**(QUICK | settings)))
    for key, value in (("batches", "0"), ("seqs", "-1"), ("runtimes", ""), ("min_rounds", 1)):
        with pytest.raises(InputError, match=key):
            load_settings(BenchSettings, None, "bench", **{key: [value] if isinstance(value, str) and value else value})


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["/a/x.onnx", "/a/y.onnx"], ["x", "y"]),
        (["/a/x.onnx", "/b/x.onnx"], ["a/x", "b/x"]),
        (["/a/m.v1", "/a/m.v2"], ["m.v1", "m.v2"]),
        (["/a/b/c", "/c"], ["b/c", "//c"]),
    ],
)
def test_names_are_as_short_as_they_can_be(paths: list[str], names: list[str]) -> None:
    assert distinct_names(paths) == names


def test_nothing_measured_is_a_failure_in_json_too(bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    """It once was exit 0."""
    command = [
        "bench",
        str(bundle.root),
        "--runtime",
        "ort-cpu",
        "--models",
        "sliced:int8",
        "--seconds",
        "0.1",
        "--json",
    ]
    assert invoke(command) == 1
    assert json.loads(capsys.readouterr().out)["failures"] != []
    assert bench_files(Bundle.open(bundle.root)) == []  # a signature would be lost, and the report hold a typing error


def test_feeds_are_the_same_each_time_and_hold_no_padding(bundle: Bundle) -> None:
    with open_runner(bundle, "ort-cpu", "dense") as runner:
        first, second = bundle_feeds(bundle, runner, 3, 50), bundle_feeds(bundle, runner, 3, 50)
    assert set(first) == set(runner.input_names)
    assert all((first[n] == second[n]).all() for n in first)
    assert first["input_ids"].shape == (3, 50)
    assert (first["attention_mask"] == 1).all()
    assert 0 not in first["input_ids"]  # the pad token of this model
    assert first["input_ids"].max() < 160
