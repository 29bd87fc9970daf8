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
from deploy_prune.config import load_settings
from deploy_prune.costs import Budget
from deploy_prune.heads import Head
from deploy_prune.pruner import prune_rows
from deploy_prune.stages import Options
from deploy_prune.sweep import SweepSettings
from deploy_prune.sweep.cells import expand, jobs_of
from deploy_prune.sweep.results import COLUMNS, write_parquet

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = ROOT / "benchmarks"
LONG = ("squad_v2", "squad", "qqp")


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


def test_the_docs_tell_which_jobs_are_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import scale

    costs = scale.read_costs(ROOT / "docs" / "results" / "scale.jsonl")
    settings = load_settings(SweepSettings, ROOT / "recipes" / "paper-table.toml", "sweep")
    hours: dict[tuple[str, str | None, int], float] = {}
    evaluating: dict[str, float] = {}
    for job in jobs_of(expand(settings)):
        entry = settings.entries[job.entry]
        before, cells = scale.job_seconds(job, settings, costs, "paper", 10.0)
        hours[entry.label, entry.task, job.seed] = (before + sum(cells)) / 3600
        rows, length = scale.TASKS[str(entry.task)]
        seconds = rows * length * costs["bert-base", "paper"].evaluate_per_token
        evaluating[str(entry.task)] = (1 + len(cells)) * seconds / 3600  # of BERT-base
    v2, squad, qqp = (f"{hours['BERT-base', task, 0]:.1f}" for task in LONG)
    parts = [f"{evaluating[task]:.1f}" for task in LONG]
    said = " ".join((ROOT / "docs" / "scale.md").read_text("utf-8").split())
    assert f"BERT-base takes {v2} hours on SQuAD v2, {squad} on SQuAD and {qqp} on QQP" in said
    assert f"of seven budgets is {parts[0]}, {parts[1]} and {parts[2]} hours" in said
    assert f"beyond {int(sum(hours.values()) / max(hours.values()))} workers the others wait for these thirty" in said
    assert {task for (_, task, _), took in hours.items() if took > 10} == set(LONG)


def test_the_docs_tell_the_overhead_that_was_measured() -> None:
    kept = json.loads((ROOT / "docs" / "results" / "sweep-overhead.json").read_text("utf-8"))
    assert len(kept["by_cell"]) == kept["cells"] == 28
    assert sum(cell["seconds"] for cell in kept["by_cell"]) == pytest.approx(kept["cell_seconds"])
    overhead = kept["workers"] * kept["wall_seconds"] / kept["cell_seconds"] - 1
    assert overhead == pytest.approx(kept["overhead"])
    assert overhead <= 0.05
    said = " ".join((ROOT / "docs" / "sweep.md").read_text("utf-8").split())
    seconds, wall = (f"{kept[name]:.1f} s" for name in ("cell_seconds", "wall_seconds"))
    assert f"28 cells took {seconds} together, {wall} on two workers, an overhead of {100 * overhead:.1f} %" in said


def test_the_overhead_of_a_sweep_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    pytest.importorskip("pyarrow", reason="the extra sweep is not installed")
    import scale

    cell = {"model": "m", "task": "t", "criterion": "auto", "compensate": "refit", "seed": 0, "seconds": 2.0}
    rows = [{**cell, "keep": keep, "key": key, "runtime": r} for keep, key in ((0.5, "a"), (0.8, "b")) for r in "xy"]
    account = {"workers": 2, "cells": 2, "cell_seconds": 4.0, "job_seconds": 4.2, "wall_seconds": 2.5, "overhead": 0.25}
    about = {**account, "reused": 0, "settings": {"threads": 1}}
    write_parquet([dict.fromkeys(COLUMNS) | row for row in rows], about, tmp_path / "results.parquet")
    scale.overhead(tmp_path, tmp_path / "kept.json")
    kept = json.loads((tmp_path / "kept.json").read_text())
    assert {name: kept[name] for name in account} == account
    assert kept["by_cell"] == [{**cell, "keep": keep} for keep in (0.5, 0.8)], "once, in however many runtimes"
    assert kept["machine"]["cpu"]
    assert not {"busy", "load_1min", "memory_available_bytes"} & kept["machine"].keys(), "as it is now, not as it was"
    write_parquet([], about | {"reused": 1}, tmp_path / "results.parquet")
    with pytest.raises(SystemExit, match="kept from before"):
        scale.overhead(tmp_path, tmp_path / "kept.json")


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
