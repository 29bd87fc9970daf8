"""The recipes whose results the docs show run, here on tiny models."""

from __future__ import annotations

import io
import json
import re
import shutil
import sys
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles_tiny import exported_bundle
from models_tiny import tiny_model
from runs_tiny import checkpoint, data

from deploy_prune.archs import arch_of
from deploy_prune.checkpoint import load_dense
from deploy_prune.config import ALLOW_CODE, load_recipe
from deploy_prune.costs import encoder_flops
from deploy_prune.experiments import Setting, run_experiment
from deploy_prune.pipeline import run
from deploy_prune.runtime_bench.slowdown import slow_down
from deploy_prune.units import SlicePlan

RECIPES = Path(__file__).resolve().parents[1] / "recipes" / "experiments"


@pytest.fixture(autouse=True)
def recipes_path(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(RECIPES))
    yield
    for name in ("shapes", "gate_trials", "tables", "cnn", "cnn_models", "cnn_rival", "merge", "glyphs"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("keep", [0.7, 0.5, 0.3])
def test_ragged_plans_keep_their_share(keep: float) -> None:
    import shapes

    model = tiny_model("bert", num_hidden_layers=12, intermediate_size=128)
    groups = arch_of(model).groups(model)
    plan = SlicePlan.from_masks(groups, shapes.ragged_masks(groups, keep, 32))
    share = encoder_flops(groups, 32, plan) / encoder_flops(groups, 32)
    assert share == pytest.approx(keep, abs=0.03)
    counts = [layer["neurons"] for layer in plan.layer_counts()]
    assert counts == sorted(counts, reverse=True)
    assert 1 <= counts[-1] < counts[0] / 2
    aligned = SlicePlan.from_masks(groups, shapes.ragged_masks(groups, keep, 32, align=16))
    assert all(g.count % 16 == 0 for g in aligned.groups if g.kind == "neuron")


def test_shapes_are_made_measured_and_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import shapes
    import tables

    model = checkpoint(tmp_path / "model")
    shapes.make(model, tmp_path / "bundles", length=12)
    out = tmp_path / "cells.jsonl"
    for _ in range(2):  # the second time nothing is left to do
        shapes.measure(
            tmp_path / "bundles", out, runtimes="ort-cpu", batches="1,2", seqs="8", threads=1, seconds=0.1, rounds=2
        )
    results = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(r["settings"]["batches"], len(r["measurements"])) for r in results] == [([1], 9), ([2], 9)]
    assert all(m["flops"] for r in results for m in r["measurements"])
    capsys.readouterr()
    shapes.keep(out, tmp_path / "tiny-shapes.json")
    rows = tables.shapes_table(tmp_path / "tiny-shapes.json").splitlines()[2:]
    assert [len(row.split(" | ")) for row in rows if "---" not in row] == [15, 15, 15]
    assert [row.split(" | ")[1] for row in rows[2:]] == ["1 x 8", "2 x 8"]
    shapes.profile(tmp_path / "bundles", batch=1, seq=8, threads=1)
    assert "| all | " in capsys.readouterr().out


def test_the_tables_of_the_results_are_those_of_their_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tables

    shutil.copytree(tables.DOCS, tmp_path / "docs")
    page = tmp_path / "docs" / "results.md"
    committed = page.read_text()
    page.write_text(re.sub(r"(<!-- (\S+) -->).*?(<!-- /\2 -->)", r"\1\n\3", committed, flags=re.S))
    assert len(page.read_text()) < len(committed)
    monkeypatch.setattr(tables, "DOCS", tmp_path / "docs")
    tables.main()
    assert page.read_text() == committed


def test_gate_trials_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import gate_trials

    monkeypatch.setattr(gate_trials, "PLACE", replace(gate_trials.PLACE, seq=16))

    bundle = exported_bundle(tmp_path / "b")
    artifact = next(a for a in bundle.manifest.artifacts if a.format == "onnx" and a.variant == "sliced")
    files = tmp_path / "files"
    files.mkdir()
    (files / "base.onnx").write_bytes(bundle.path(artifact.path).read_bytes())
    slow_down(files / "base.onnx", files / "slow.onnx", 50_000)
    kinds = {"same": {"file": "base.onnx"}, "10 %": {"file": "slow.onnx"}}
    (files / "truth.json").write_text(json.dumps({"kinds": kinds}))
    out = tmp_path / "trials.jsonl"
    for _ in range(2):
        gate_trials.trials(files, out, count=1, seconds=10.0)
    entries = [json.loads(line) for line in out.read_text().splitlines()]
    assert [e["kind"] for e in entries] == ["same", "10 %"]
    assert entries[1]["found"] > 1.5
    assert entries[0]["found"] < entries[1]["found"]
    capsys.readouterr()
    gate_trials.table([out])
    assert len(capsys.readouterr().out.splitlines()) == 4


def test_replays_draw_from_recorded_sessions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import gate_trials

    rng = np.random.default_rng(0)
    lines = []
    for new, control in rng.normal(0, 0.004, (60, 2)):
        clocks = {"new": {"wall": new, "cpu": 2 * new}, "control": {"wall": control, "cpu": 2 * control}}
        lines.append(json.dumps({"load": 0, "seconds": 2.5, "base_ms": {"wall": 40.0, "cpu": 40.0}, **clocks}))
    (tmp_path / "s.jsonl").write_text("\n".join(lines) + "\n")
    gate_trials.replay(tmp_path / "s.jsonl", count=200)
    rows = {r.split(" | ")[0]: r for r in capsys.readouterr().out.splitlines() if r.startswith("| 1")}
    assert rows["| 1"].split(" | ")[1].startswith("0.0 %")
    assert rows["| 1.1"].split(" | ")[1].startswith("100.0 %")


def test_runs_of_a_seed_each_become_one_document(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import merge

    model, rows = checkpoint(tmp_path / "model"), data(tmp_path / "data")
    setting = Setting(str(model), "text-classification", str(rows), (0.8,), (0, 1), samples=64)
    whole, _ = run_experiment("ablation", setting, tmp_path / "whole")
    for seed in (1, 0):
        run_experiment("ablation", replace(setting, seeds=(seed,)), tmp_path / "parts", stem=f"tiny-ablation-{seed}")
    runs = sorted((tmp_path / "parts").glob("*.json"))
    merge.main(tmp_path / "tiny-ablation", runs)
    assert capsys.readouterr().out.splitlines()[0] == str(tmp_path / "tiny-ablation.json")
    found = json.loads((tmp_path / "tiny-ablation.json").read_text())
    assert found["setting"] == json.loads(json.dumps(whole["setting"]))
    values = [[(r["seed"], r["method"], r["value"], r["kl"]) for r in d["rows"]] for d in (found, whole)]
    assert values[0] == values[1]
    assert "2 run(s) per cell" in (tmp_path / "tiny-ablation.md").read_text()
    with pytest.raises(SystemExit, match="comes twice"):
        merge.main(tmp_path / "twice", [runs[0], runs[0]])
    other = json.loads(runs[1].read_text())
    other["setting"]["recover_lr"] = 1.0  # which an ablation does not read
    runs[1].write_text(json.dumps(other))
    merge.main(tmp_path / "alike", runs)
    other["setting"]["samples"] = 128
    runs[1].write_text(json.dumps(other))
    with pytest.raises(SystemExit, match="no runs of one experiment"):
        merge.main(tmp_path / "mixed", runs)


def test_the_networks_of_the_experiments_are_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    import cnn

    monkeypatch.setenv(ALLOW_CODE, "cnn_models")
    rng = np.random.default_rng(0)
    archive = tmp_path / "mnist.tgz"
    with tarfile.open(archive, "w:gz") as tar:
        for prefix, count in (("train", 160), ("t10k", 40)):
            images, labels = rng.integers(0, 256, count * 784, np.uint8), rng.integers(0, 10, count).astype(np.uint8)
            contents = {"images-idx3": bytes(16) + images.tobytes(), "labels-idx1": bytes(8) + labels.tobytes()}
            for name, content in contents.items():
                info = tarfile.TarInfo(f"package/data/{prefix}-{name}-ubyte")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    cnn.mnist(archive, tmp_path / "mnist.npz")
    cnn.train(tmp_path / "mnist.npz", tmp_path / "lenet", epochs=1, batch=32)
    assert capsys.readouterr().out.startswith("accuracy 0.")
    dense = load_dense(str(tmp_path / "lenet"), "classification")
    assert dense.signature.image == (1, 28, 28)
    assert dense.config.labels[3] == "3"
    settings = Setting(str(tmp_path / "lenet"), "mnist", str(tmp_path / "mnist.npz"), (0.5,), (0,), samples=64)
    document, _ = run_experiment("cnn", settings, tmp_path / "out")
    assert {row["method"] for row in document["rows"]} >= {"+ fold", "obs label-free, refit"}
    given = {"model": settings.model, "task": "mnist", "data": settings.data, "keep_flops": 0.5, "samples": 64}
    quick = {"formats": ("onnx",), "runtimes": ("ort-cpu",), "bench_seconds": 0.2}
    for align in (1, 2):
        run(load_recipe(**given, **quick, align=align, out=str(tmp_path / str(align))))
    cnn.latency(tmp_path / "latency", [tmp_path / "1", tmp_path / "2"])
    rows = json.loads((tmp_path / "latency.json").read_text())["rows"]
    assert [(row["align"], row["runtime"], row["batch"]) for row in rows] == [(1, "ort-cpu", 1), (2, "ort-cpu", 1)]
    assert all(0 < row["ratio_low"] <= row["ratio_to_dense"] <= row["ratio_high"] for row in rows)
    assert all(row["kept_flops"] <= 0.5 for row in rows)


def test_characters_of_fonts_are_images_of_many_classes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ALLOW_CODE, "cnn_models")
    import cnn
    import glyphs
    import matplotlib

    fonts = Path(matplotlib.__file__).parent / "mpl-data" / "fonts"
    for classes in (12, 94):
        glyphs.draw(tmp_path / f"{classes}.npz", [fonts], classes)
        with np.load(tmp_path / f"{classes}.npz") as drawn:
            assert {*drawn["y_train"].tolist()} == {*drawn["y_test"].tolist()} == {*range(classes)}
            assert not {x.tobytes() for x in drawn["x_train"]} & {x.tobytes() for x in drawn["x_test"]}
    cnn.train(tmp_path / "12.npz", tmp_path / "lenet", task="image-classification", epochs=1, batch=8)
    assert "accuracy" in capsys.readouterr().out
    assert load_dense(str(tmp_path / "lenet"), "classification").config.labels[10] == "U+0041"
