"""The reference that pruning is timed against computes what the package's mask tuning computes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from models_tiny import tiny_model, tiny_rows

from deploy_prune.archs import arch_of
from deploy_prune.batches import Batches
from deploy_prune.costs import Budget
from deploy_prune.heads import Head
from deploy_prune.pruner import prune_rows
from deploy_prune.stages import Options

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.mark.parametrize("keep", [0.5, 0.7])
def test_reference_and_mask_tuning_agree(keep: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from reference import run_reference

    model, head = tiny_model("bert"), Head("classification")
    rows = sorted(tiny_rows(96), key=lambda r: -r.length)  # so that both cut the same mini-batches
    groups = arch_of(model).groups(model)
    masks, timing = run_reference(model, groups, head, list(Batches(rows, head, 0)), keep, 10)
    options = Options(criterion="fisher-batch", search="paper", rearrange="batch", compensate="mask-tuning-exact")
    plan = prune_rows(model, head, rows, Budget(keep, 10), options=options).plan
    for g in groups:
        assert np.flatnonzero(masks[g.name]).tolist() == list(plan[g.name].kept)
        assert masks[g.name][masks[g.name] != 0] == pytest.approx(plan[g.name].scales, abs=2e-3)
    assert any(np.ptp(plan[g.name].scales) > 0.01 for g in groups if plan[g.name].count > 1)
    assert timing.lsmr_iterations > 0


def test_the_benchmark_runs(tmp_path: Path) -> None:
    words = ["--shape", "tiny", "--samples", "64", "--length", "12", "--out", str(tmp_path / "b.json")]
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "prune.py"), *words], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "reference / default" in done.stdout
    results = json.loads((tmp_path / "b.json").read_text())["results"]
    assert set(results) == {"default", "mask tuning", "reference"}
    assert all(r["peak_growth_bytes"] >= 0 for r in results.values())
    assert all(r["total"] > 0 for r in results.values())


def test_the_benchmark_of_several_processes_runs(tmp_path: Path) -> None:
    words = ["time", "--shape", "tiny", "--samples", "128", "--length", "12", "--rounds", "1"]
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "parallel.py"), *words, "--out", str(tmp_path / "p.json")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "two processes against one on two threads" in done.stdout
    document = json.loads((tmp_path / "p.json").read_text())
    assert set(document["runs"]) == {"1 x 1", "2 x 1", "1 x 2"}
    assert all(ratio > 0 for ratio in document["ratios"].values())


def test_the_benchmark_of_growth_runs_and_simulates_a_sweep(tmp_path: Path) -> None:
    measured, recipe = tmp_path / "scale.jsonl", BENCHMARKS.parent / "recipes" / "paper-table.toml"
    words = [["measure", str(measured), "--shape", "tiny", "--samples", "64,128", "--length", "8"]]
    words += [["table", str(measured)]]
    for line in words:
        done = subprocess.run(
            [sys.executable, str(BENCHMARKS / "scale.py"), *line], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
    assert "another budget" in done.stdout
    entries = [json.loads(line) for line in measured.read_text().splitlines()]
    assert [(e["method"], e["samples"]) for e in entries] == [(m, s) for m in ("paper", "default") for s in (64, 128)]
    assert all(e["second"]["calibrate"] == 0 < e["first"]["calibrate"] for e in entries)
    measured.write_text("".join(json.dumps(e | {"shape": "bert-base"}) + "\n" for e in entries))
    line = ["sweep", str(measured), str(recipe), "--workers", "1,160"]
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "scale.py"), *line], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "160 jobs" in done.stdout


@given(
    st.lists(st.tuples(st.floats(0.1, 5), st.lists(st.floats(0.1, 5), min_size=1, max_size=4)), min_size=1, max_size=9),
    st.integers(1, 5),
)
def test_a_simulated_schedule_is_possible(jobs: list[tuple[float, list[float]]], workers: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        from scale import simulate

    took = [before + sum(cells) for before, cells in jobs]
    calm = simulate(jobs, workers, 0, 0)
    assert (calm.deaths, calm.lost) == (0, 0.0)
    assert calm.makespan >= max(max(took), sum(took) / workers) - 1e-9
    assert calm.makespan <= sum(took) / workers + max(took) + 1e-9  # Graham's bound
    troubled = simulate(jobs, workers, 50.0, 0)
    assert (troubled.lost > 0) == (troubled.deaths > 0)
