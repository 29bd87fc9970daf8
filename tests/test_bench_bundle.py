"""The bench measures what it can, says what it could not, and replaces what it measured before."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from bundles_tiny import exported_bundle

from deploy_prune.bundle import VARIANTS, Bundle
from deploy_prune.errors import InputError
from deploy_prune.runtime_bench.bench import bench_bundle, latest_bench
from deploy_prune.runtime_bench.cells import make_feeds
from deploy_prune.runtimes import open_runner

QUICK = {"max_seconds_per_cell": 0.1, "min_rounds": 5, "threads": 1}


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return exported_bundle(tmp_path)


def bench_files(bundle: Bundle) -> list[str]:
    return [name for name in bundle.manifest.files if name.startswith("bench/")]


def test_both_runtimes_measure_every_variant(bundle: Bundle) -> None:
    said: list[str] = []
    result = bench_bundle(bundle, progress=said.append, **QUICK)  # type: ignore[arg-type]
    bundle.commit()
    assert result["failures"] == []
    keys = [(m["runtime"], m["variant"], m["batch"], m["seq"]) for m in result["measurements"]]
    assert keys == [(r, v, 1, 12) for r in ("ort-cpu", "torch") for v in VARIANTS]
    for m in result["measurements"]:
        assert 0 < m["latency_ms"]["min"] <= m["latency_ms"]["median"] <= m["latency_ms"]["p95"]
        assert m["ratio_to_dense"]["low"] <= m["ratio_to_dense"]["value"] <= m["ratio_to_dense"]["high"]
        assert m["samples"] >= 5
        assert m["peak_rss_bytes"] > m["baseline_rss_bytes"] > 0
    dense = result["measurements"][0]
    assert dense["ratio_to_dense"] == {"value": 1.0, "low": 1.0, "high": 1.0}
    assert dense["provider"] == "CPUExecutionProvider"
    assert result["machine"]["threads"] == 1
    assert {"numpy", "onnxruntime", "torch"} <= set(result["machine"]["versions"])
    assert said[0] == "latency ort-cpu 1x12"
    (name,) = bench_files(bundle)
    assert json.loads(bundle.path(name).read_text()) == result
    Bundle.open(bundle.root)


def test_the_same_settings_replace_and_others_are_merged(bundle: Bundle) -> None:
    def run(seq: int) -> dict:  # type: ignore[type-arg]
        return bench_bundle(bundle, runtimes=["ort-cpu"], seqs=[seq], variants=["sliced"], **QUICK)  # type: ignore[arg-type]

    run(4), run(9)
    last = run(4)
    bundle.commit()
    assert len(bench_files(bundle)) == 2
    assert len(list((bundle.root / "bench").iterdir())) == 2
    merged = latest_bench(bundle)
    assert [m["seq"] for m in merged["measurements"]] == [4, 9]
    assert merged["measurements"][0] == last["measurements"][0]
    assert last["measurements"][0]["ratio_to_dense"] is None  # nothing dense in that session
    assert merged["machine"] == last["machine"]


def test_a_failing_variant_does_not_stop_the_others(bundle: Bundle) -> None:
    broken = next(a for a in bundle.manifest.artifacts if a.variant == "virtual")
    bundle.path(broken.path).write_bytes(b"nonsense")
    result = bench_bundle(bundle, runtimes=["ort-cpu"], **QUICK)  # type: ignore[arg-type]
    assert [m["variant"] for m in result["measurements"]] == ["dense", "sliced"]
    (failure,) = result["failures"]
    assert (failure["runtime"], failure["variant"], failure["stage"]) == ("ort-cpu", "virtual", "latency")
    assert "cannot load" in failure["reason"]
    assert "Traceback" in failure["traceback"]
    assert latest_bench(bundle)["failures"] == [failure]


def test_a_length_without_positions_is_a_failure_with_its_reason(bundle: Bundle) -> None:
    result = bench_bundle(bundle, runtimes=["ort-cpu"], seqs=[67, 8], variants=["dense"], **QUICK)  # type: ignore[arg-type]
    assert [m["seq"] for m in result["measurements"]] == [8]
    assert [f["reason"] for f in result["failures"]] == ["The model has 66 positions, not 67."]


def test_a_runtime_that_dies_is_a_failure(bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Add a runtime by an entry point, as another package would; it kills its process."""
    (tmp_path / "deadly.py").write_text(
        "import os\ndef open_it(bundle, variant, *, threads=None, precision=None): os._exit(9)\n"
    )
    info = tmp_path / "deadly-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: deadly\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[deploy_prune.runtimes]\ndeadly = deadly:open_it\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    from deploy_prune.runtimes import available_runtimes

    available_runtimes.cache_clear()
    try:
        result = bench_bundle(bundle, runtimes=["deadly", "ort-cpu"], variants=["dense"], **QUICK)  # type: ignore[arg-type]
    finally:
        available_runtimes.cache_clear()
    assert [m["runtime"] for m in result["measurements"]] == ["ort-cpu"]
    (failure,) = result["failures"]
    assert (failure["runtime"], failure["variant"], failure["kind"]) == ("deadly", None, "Died")
    assert "exit code 9" in failure["reason"]


def test_bad_settings_are_refused_before_anything_runs(bundle: Bundle) -> None:
    for options, words in (
        ({"runtimes": ["tvm"]}, "No runtime 'tvm'"),
        ({"variants": ["half"]}, "No variant 'half'"),
        ({"batches": [0]}, "batch or length of 0"),
        ({"seqs": [-1]}, "batch or length of -1"),
    ):
        with pytest.raises(InputError, match=words):
            bench_bundle(bundle, **options)  # type: ignore[arg-type]
    assert bench_files(bundle) == []


def test_feeds_are_the_same_each_time_and_hold_no_padding(bundle: Bundle) -> None:
    with open_runner(bundle, "ort-cpu", "dense") as runner:
        first, second = make_feeds(bundle, runner, 3, 50), make_feeds(bundle, runner, 3, 50)
    assert set(first) == set(runner.input_names)
    assert all((first[n] == second[n]).all() for n in first)
    assert first["input_ids"].shape == (3, 50)
    assert (first["attention_mask"] == 1).all()
    assert 0 not in first["input_ids"]  # the pad token of this model
    assert first["input_ids"].max() < 160
