"""Sweeps on a small Ray cluster of this machine: whatever dies on the way, the table is the same."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from runs_tiny import channel_checkpoint, checkpoint, data, image_checkpoint, image_data

from deploy_prune.cli import invoke
from deploy_prune.config import load_settings
from deploy_prune.demo import DEMOS
from deploy_prune.errors import InputError, SystemStateError, VerdictError
from deploy_prune.experiments import Lab, Setting
from deploy_prune.latency_table import KindTable, LatencyTable
from deploy_prune.progress import Progress, Silent
from deploy_prune.stages import Options
from deploy_prune.sweep import Sweep, SweepSettings, run_sweep
from deploy_prune.sweep.cluster import _LOCAL, _QUIET, Patience, bench_options, connected
from deploy_prune.sweep.driver import Bench, Driver

pytest.importorskip("pyarrow", reason="the extra sweep is not installed")
LABEL = "edge-box"
SMALL = Path(__file__).resolve().parents[1] / "recipes" / "sweep-small.toml"
CELLS = {"keeps": [0.8, 0.5], "seeds": [0, 1], "compensate": ["refit", "none"], "samples": 64}
NOT_RESULTS = ("host", "pid", "bench_host", "bench_cpu", "latency_ms", "latency_ms_dense")
NOT_RESULTS = (*NOT_RESULTS, "ratio", "ratio_low", "ratio_high")


@dataclass(frozen=True)
class Place:
    """A tiny model and its data."""

    model: Path
    data: Path

    def entry(self, **more: Any) -> dict[str, Any]:
        return {"model": str(self.model), "data": str(self.data), "task": "text-classification", **more}

    def settings(self, **more: Any) -> SweepSettings:
        return SweepSettings.model_validate({**CELLS, "entries": [self.entry()], **more})


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    root = tmp_path_factory.mktemp("sweep")
    return Place(checkpoint(root / "model", num_hidden_layers=2), data(root / "data"))


@pytest.fixture(scope="module")
def demo_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with a tiny model in the place of the demo digits-vit."""
    root = tmp_path_factory.mktemp("cache")
    folder = root / f"digits-vit-{DEMOS['digits-vit'].version}"
    image_checkpoint(folder / "model")
    (folder / "data").mkdir()
    rng = np.random.default_rng(0)
    for name, count in (("train", 96), ("validation", 48)):
        images = rng.integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)
        np.savez(folder / "data" / f"{name}.npz", images=images, labels=rng.integers(0, 3, count))
    (folder / "demo.json").write_text("{}")
    return root


@pytest.fixture(scope="module")
def cluster(demo_cache: Path) -> Iterator[Any]:
    """Two workers, and beside them a node that only measures; all sweeps of this file run on this Ray cluster."""
    before = dict(os.environ)
    os.environ |= _QUIET | _LOCAL | {"DEPLOY_PRUNE_CACHE": str(demo_cache)}
    pytest.importorskip("ray", reason="the extra sweep is not installed")
    from ray.cluster_utils import Cluster

    with tempfile.TemporaryDirectory(prefix="dp-ray-", ignore_cleanup_errors=True) as folder:
        os.environ["RAY_TMPDIR"] = folder
        made = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
        made.add_node(num_cpus=0, resources={LABEL: 1})
        try:
            with connected(made.address, 0):
                yield made
        finally:
            made.shutdown()
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="module")
def undisturbed(place: Place, cluster: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Sweep, Path]:
    out = tmp_path_factory.mktemp("undisturbed")
    return run_sweep(place.settings(), out), out


def table(sweep: Sweep) -> list[dict[str, Any]]:
    return results_of(sweep.rows)


def results_of(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows without what no two runs have in common: times, and where it was."""
    return [{k: v for k, v in r.items() if k not in NOT_RESULTS and not k.startswith("seconds")} for r in rows]


class Watching(Silent):
    """Call a function once, when the first cell is kept, or some looks later; at most `looks` may follow."""

    def __init__(self, cells: Path, act: Any, later: int = 0, looks: int = 1000) -> None:
        self.cells, self.act, self.notes = cells, act, list[str]()
        self.later, self.looks = later, looks

    @contextmanager
    def stage(self, name: str) -> Iterator[Progress]:
        yield self._look

    def _look(self, share: float) -> None:
        found = sorted(self.cells.glob("*.json"))
        if not found:
            return
        self.later, self.looks = self.later - 1, self.looks - 1
        assert self.looks > 0, "it goes on for ever"
        if self.later < 0 and self.act is not None:
            act, self.act = self.act, None
            act(json.loads(found[0].read_text())["result"])

    def note(self, text: str) -> None:
        self.notes.append(text)


def kill(result: dict[str, Any]) -> None:
    """Kill the worker that has told of a cell, in the middle of the next one."""
    os.kill(result["pid"], signal.SIGKILL)


def test_one_row_a_cell(undisturbed: tuple[Sweep, Path]) -> None:
    from pyarrow import parquet

    sweep, out = undisturbed
    found = parquet.read_table(out / "results.parquet")
    assert found.to_pylist() == sweep.rows
    assert found.num_rows == 8
    assert {row["status"] for row in sweep.rows} == {"done"}
    cells = [(r["seed"], r["keep"], r["criterion"], r["compensate"]) for r in sweep.rows]
    assert cells == [(s, k, "auto", c) for s in (0, 1) for k in (0.8, 0.5) for c in ("refit", "none")]
    for row in sweep.rows:
        assert row["model"] == "model"
        assert 0 < row["kept_flops"] <= row["keep"]
        assert row["params"] < row["params_dense"]
        assert row["flops"] == pytest.approx(row["kept_flops"] * row["flops_dense"])
    about = json.loads(found.schema.metadata[b"deploy_prune"])
    assert about["cells"] == 8
    assert about["workers"] == 2
    assert about["cell_seconds"] == pytest.approx(sum(row["seconds"] for row in sweep.rows))
    assert about["overhead"] == pytest.approx(2 * about["wall_seconds"] / about["cell_seconds"] - 1)
    assert about["wall_seconds"] * 2 > about["job_seconds"] > about["cell_seconds"]
    assert (out / "report.html").read_text().count("<h2>") == 2
    assert "8 cells, 0 of them kept from before" in (out / "results.md").read_text()


def test_cells_are_what_pruning_alone_gives(undisturbed: tuple[Sweep, Path], place: Place) -> None:
    row = undisturbed[0].rows[-2]
    lab = Lab(Setting(str(place.model), "text-classification", str(place.data), samples=64, device="cpu"))
    found, sliced = lab.prune(row["keep"], row["seed"], Options(compensate="refit", seed=row["seed"]))
    assert found.hash == row["plan_hash"]
    compared = lab.compare(sliced)
    assert compared["kl"] == pytest.approx(row["kl"], rel=1e-5)  # this process may have other threads
    assert compared["value"] == pytest.approx(row["quality_sliced"])


def test_calibration_is_shared(undisturbed: tuple[Sweep, Path]) -> None:
    sweep, _ = undisturbed
    for seed in (0, 1):
        own = [row for row in sweep.rows if row["seed"] == seed]
        assert sum(row["seconds_calibrate"] > 0 for row in own) == 1
        assert sum(row["seconds_load"] > 0 for row in own) == 1
        assert len({row["pid"] for row in own}) == 1


def test_a_killed_worker_changes_nothing(undisturbed: tuple[Sweep, Path], place: Place, tmp_path: Path) -> None:
    watching = Watching(tmp_path / "cells", kill)
    sweep = run_sweep(place.settings(), tmp_path, reporter=watching)
    assert watching.act is None, "it was killed"
    assert sweep.account["restarts"] == 1
    assert any("A worker was lost" in note for note in watching.notes)
    assert table(sweep) == table(undisturbed[0])


def test_the_small_recipe_gives_the_same_table_when_a_worker_is_killed(cluster: Any, tmp_path: Path) -> None:
    from pyarrow import parquet

    assert invoke(["sweep", "-c", str(SMALL), "--out", str(tmp_path / "whole"), "--workers", "2"]) == 0
    whole = parquet.read_table(tmp_path / "whole" / "results.parquet").to_pylist()
    assert len(whole) == 16
    assert {row["status"] for row in whole} == {"done"}
    settings = load_settings(SweepSettings, SMALL, "sweep")
    killed = run_sweep(settings, tmp_path / "killed", reporter=Watching(tmp_path / "killed" / "cells", kill))
    assert killed.account["restarts"] == 1
    assert results_of(killed.rows) == results_of(whole)


def test_a_cell_that_costs_its_worker_is_a_row_with_the_reason(place: Place, tmp_path: Path) -> None:
    settings = place.settings(max_retries=0, seeds=[0])
    sweep = run_sweep(settings, tmp_path, workers=1, reporter=Watching(tmp_path / "cells", kill))
    assert len(sweep.failed) == 1
    assert "its worker was lost 1 time(s)" in sweep.failed[0]["reason"]
    assert sum(row["status"] == "done" for row in sweep.rows) == 3
    with pytest.raises(VerdictError, match="1 of 4 rows failed"):
        sweep.check()
    again = run_sweep(settings, tmp_path)
    assert (again.account["reused"], again.failed) == (3, [])


def test_a_killed_driver_leaves_its_cells(undisturbed: tuple[Sweep, Path], place: Place, tmp_path: Path) -> None:
    recipe, out = tmp_path / "sweep.toml", tmp_path / "out"
    entry = "\n".join(f'{key} = "{value}"' for key, value in place.entry().items())
    recipe.write_text("\n".join(f"{k} = {json.dumps(v)}" for k, v in CELLS.items()) + f"\n[[entries]]\n{entry}\n")
    command = [sys.executable, "-m", "deploy_prune", "sweep", "-c", str(recipe), "--out", str(out), "--workers", "1"]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    driver = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        while not list(out.glob("cells/*.json")):
            assert driver.poll() is None, driver.communicate()[1]
            time.sleep(0.005)
        started = psutil.Process(driver.pid).children(recursive=True)
        agents = [p for p in started if p.name().endswith("Agent")]
        left = {f for p in started for word in p.cmdline() for f in re.findall(r"/[^=]*/dp-ray-\w+", word)}
        listening = {c.laddr.ip for p in started for c in connections(p)}
    finally:
        driver.kill()
        driver.communicate()
    assert listening, "a cluster of its own"
    assert {ip.removeprefix("::ffff:") for ip in listening} == {"127.0.0.1"}
    kept = len(list(out.glob("cells/*.json")))
    assert 0 < kept < 8
    computing = [p for p in started if p not in agents]
    _, alive = psutil.wait_procs(computing, timeout=60)
    for process in agents:  # they notice it after a minute or two
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    assert not alive, "its cluster ends with it"
    assert len(left) == 1
    shutil.rmtree(left.pop(), ignore_errors=True)
    sweep = run_sweep(place.settings(), out)
    assert sweep.account["reused"] == kept
    assert table(sweep) == table(undisturbed[0])


def connections(process: psutil.Process) -> list[Any]:
    try:
        return [c for c in process.net_connections(kind="inet") if c.status == psutil.CONN_LISTEN]
    except psutil.NoSuchProcess:
        return []


def test_failures_are_rows(place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "sweep.toml"
    lines = ["keeps = [0.8, 0.01]", "samples = 64"]
    for more in ({}, {"name": "absent", "data": str(tmp_path / "absent")}):
        entry = place.entry(**more)
        lines += ["[[entries]]", *(f'{key} = "{value}"' for key, value in entry.items())]
    recipe.write_text("\n".join(lines))
    words = ["sweep", "-c", str(recipe), "--out", str(tmp_path / "out")]
    assert invoke([*words, "--json"]) == 1
    said = json.loads(capsys.readouterr().out)
    reasons = {(f["model"], f["keep"]): f["reason"] for f in said["failed"]}
    assert set(reasons) == {("model", 0.01), ("absent", 0.8), ("absent", 0.01)}
    assert "smallest" in reasons["model", 0.01] or "budget" in reasons["model", 0.01]
    assert "absent" in reasons["absent", 0.8]
    assert said["rows"] == 4
    assert invoke(words) == 1
    captured = capsys.readouterr()
    assert "3 of 4 rows failed" in captured.err
    assert "Failed:" in captured.out
    assert "4 cells, 1 of them kept from before" in captured.out


def test_budgets_may_be_of_parameters_or_latency(place: Place, cluster: Any, tmp_path: Path) -> None:
    few: dict[str, Any] = {"keeps": [0.6], "seeds": [0], "compensate": ["none"]}
    (row,) = run_sweep(place.settings(**few, budget="params"), tmp_path).rows
    units = 2 * (4 * 32 * 32 + 3 * 32 + 2 * 24 * 32 + 24)  # of two layers, without the biases that stay
    assert 0.5 * units < units - (row["params_dense"] - row["params"]) <= 0.6 * units
    kinds = {}
    for kind, size, width, ms in (("head", 4, 8, 1.0), ("neuron", 24, 1, 3.0)):
        straight = [0.0, ms]
        times = {"ms": straight, "low_ms": straight, "high_ms": straight}
        kinds[kind] = KindTable(size=size, width=width, counts=[0, size], **times)
    shape: dict[str, Any] = {"hidden": 32, "layers": 2, "base_ms": 1.0, "dense_ms": 9.0, "kinds": kinds}
    lut = LatencyTable(runtime="torch", batch=1, seq=8, **shape)
    (tmp_path / "lut.json").write_text(lut.model_dump_json())
    entries = [place.entry(lut=str(tmp_path / "lut.json"))]
    (row,) = run_sweep(place.settings(**few, budget="latency", entries=entries), tmp_path).rows
    assert row["reason"] is None
    (tmp_path / "lut.json").write_text(lut.model_copy(update={"layers": 3}).model_dump_json())
    (other,) = run_sweep(place.settings(**few, budget="latency", entries=entries), tmp_path).rows
    assert "measured on 3 layers" in other["reason"], "another table is another cell"


def test_convolutional_networks_are_swept_too(cluster: Any, tmp_path: Path) -> None:
    model = channel_checkpoint(tmp_path / "model", "resnet")
    entry = {"model": str(model), "data": str(image_data(tmp_path / "images.npz", size=16))}
    few = {"keeps": [0.8], "samples": 64, "compensate": ["fold+batch-norm"]}
    sweep = run_sweep(SweepSettings.model_validate({"entries": [entry], **few}), tmp_path / "out")
    (row,) = sweep.rows
    assert row["reason"] is None
    assert row["task"] == "image-classification", "inferred"
    assert row["kept_flops"] <= 0.8


@pytest.mark.parametrize("changed", ["samples", "evaluation", "weights"])
def test_other_cells_are_not_taken_for_those_asked_for(changed: str, place: Place, tmp_path: Path) -> None:
    own = Place(checkpoint(tmp_path / "model", num_hidden_layers=2), data(tmp_path / "data"))
    few: dict[str, Any] = {"keeps": [0.8], "seeds": [0], "compensate": ["none"]}
    out = tmp_path / "out"
    assert run_sweep(own.settings(**few), out).account["reused"] == 0
    assert run_sweep(own.settings(**(few | {"keeps": [0.8, 0.6]})), out).account["reused"] == 1
    if changed == "samples":
        few["samples"] = 80
    elif changed == "weights":
        checkpoint(own.model, num_hidden_layers=2, seed=1)
    else:
        data(own.data, evaluation=20)
    assert run_sweep(own.settings(**few), out).account["reused"] == 0


def test_models_are_measured_here_and_on_labelled_nodes(place: Place, cluster: Any, tmp_path: Path) -> None:
    few: dict[str, Any] = {"keeps": [0.5], "seeds": [0], "compensate": ["none"], "bench_threads": 1}
    bench = {"bench_runtimes": ["torch"], "bench_seconds": 0.05}
    here = run_sweep(place.settings(**few, **bench), tmp_path)
    (row,) = here.rows
    assert (row["runtime"], row["bench_on"], row["seq"]) == ("torch", "this machine", row["seq_len"])
    assert row["ratio_low"] <= row["ratio"] <= row["ratio_high"]
    assert row["latency_ms"] == pytest.approx(row["ratio"] * row["latency_ms_dense"])
    assert [front.where for front in here.fronts] == ["torch on this machine"]
    assert not list((tmp_path / "models").iterdir()), "what is measured needs no files"
    again = run_sweep(place.settings(**few, **bench), tmp_path)
    assert again.account["reused"] == 1
    assert again.rows == here.rows, "nothing was measured twice"
    there = run_sweep(place.settings(**few, **bench, bench_on=[LABEL]), tmp_path)
    assert there.rows[0]["bench_on"] == LABEL
    assert there.rows[0]["ratio"] > 0
    assert table(there)[0] | {"bench_on": None} == table(here)[0] | {"bench_on": None}


def test_a_runtime_that_cannot_run_is_a_row_with_the_reason(place: Place, tmp_path: Path) -> None:
    few: dict[str, Any] = {"keeps": [0.5], "seeds": [0], "compensate": ["none"], "bench_threads": 1}
    sweep = run_sweep(place.settings(**few, bench_runtimes=["torch"], bench_seq=4096), tmp_path)
    (row,) = sweep.failed
    assert row["plan_hash"] is not None
    assert "positions" in row["reason"]


def test_files_are_made_for_the_runtimes_that_are_asked_for(place: Place, cluster: Any, tmp_path: Path) -> None:
    """What another sweep's failed measurements left in models/ is not taken for them."""
    few: dict[str, Any] = {"keeps": [0.5], "seeds": [0], "compensate": ["none"], "bench_threads": 1}
    left = run_sweep(place.settings(**few, bench_runtimes=["torch"], bench_seq=4096), tmp_path)
    assert len(left.failed) == 1
    assert len(list((tmp_path / "models").iterdir())) == 2
    now = run_sweep(place.settings(**few, bench_runtimes=["ort-cpu"], bench_seconds=0.05), tmp_path)
    (row,) = now.rows
    assert row["reason"] is None
    assert now.account["reused"] == 0, "its files were made anew"
    assert (row["plan_hash"], row["weights_hash"]) == (left.rows[0]["plan_hash"], left.rows[0]["weights_hash"])


@pytest.mark.parametrize("moment", ["before its first measurement", "during a measurement"])
def test_a_labelled_node_that_leaves_is_the_reason(moment: str, place: Place, cluster: Any, tmp_path: Path) -> None:
    label = f"leaving-{moment.split()[0]}"
    node = cluster.add_node(num_cpus=0, resources={label: 1})
    settings = place.settings(
        keeps=[0.5],
        compensate=["none"],
        bench_threads=1,
        bench_runtimes=["torch"],
        bench_seconds=300.0,
        bench_on=[label],
    )
    later = 0 if moment.startswith("before") else 20  # two looks at every event or second
    watching = Watching(tmp_path / "cells", lambda result: cluster.remove_node(node), later, looks=120)
    sweep = run_sweep(settings, tmp_path, reporter=watching)
    assert watching.act is None, "it left"
    reasons = {row["reason"] for row in sweep.rows}
    assert reasons == {f"No node of the Ray cluster has the label '{label}' any more."}
    assert len(sweep.rows) == 2
    assert all(row["plan_hash"] for row in sweep.rows), "the cells are there"


def test_jobs_do_not_wait_for_ever_for_a_node_when_the_last_has_left(
    place: Place, cluster: Any, tmp_path: Path
) -> None:
    settings = place.settings(threads=3, compensate=["none"])  # the other nodes have no three CPUs
    node = cluster.add_node(num_cpus=3)
    watching = Watching(tmp_path / "cells", lambda result: cluster.remove_node(node))
    with pytest.raises(SystemStateError, match=r"had 3 CPUs for 0\.05 minutes") as caught:
        run_sweep(settings, tmp_path, wait_minutes=0.05, reporter=watching)
    assert "the same command goes on behind what is finished" in caught.value.hint
    assert 0 < len(list((tmp_path / "cells").iterdir())) < 4
    told = [note for note in watching.notes if note.startswith("No node of the Ray cluster has 3 CPUs any more")]
    assert len(told) == 1
    assert "unfinished job(s) wait. If none comes, the sweep ends in 0.05 minutes" in told[0]


def test_a_node_that_comes_in_time_ends_the_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    said, free, clock = Watching(Path(), None), [0, 0, 2, 0, 0, 0], [0.0, 50.0, 70.0, 80.0, 139.0, 141.0]
    monkeypatch.setattr("deploy_prune.sweep.cluster.room", lambda threads, device: free.pop(0))
    monkeypatch.setattr("time.monotonic", lambda: clock[-len(free) - 1])
    patience = Patience(1, "cuda", minutes=1.0, reporter=said)
    for _ in range(5):
        patience.look(7)
    assert [note.split(":")[0] for note in said.notes] == [
        "No node of the Ray cluster has 1 CPU and a GPU any more",
        "The Ray cluster has a node for the jobs again.",
        "No node of the Ray cluster has 1 CPU and a GPU any more",
    ]
    with pytest.raises(SystemStateError, match="for 1 minutes: 7 unfinished"):
        patience.look(7)
    patience.look(0)


def test_nothing_is_measured_beside_cells_on_the_same_node(
    place: Place, cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A measurement here begins when all jobs have ended; it is alone, and has all CPUs."""
    begun = []
    start = Driver._measure

    def watched(driver: Driver, bench: Bench) -> None:
        begun.append((bench, len(driver.running), len(driver.queue), len(driver.measuring)))
        start(driver, bench)

    def instant(spec: Any, sliced: Any, dense: Any) -> dict[str, float]:
        return {"latency_ms": 1.0, "latency_ms_dense": 2.0, "ratio": 0.5}

    monkeypatch.setattr(Driver, "_measure", watched)
    monkeypatch.setattr("deploy_prune.sweep.bench.measure", instant)
    few: dict[str, Any] = {"keeps": [0.5, 0.8], "compensate": ["none"], "bench_runtimes": ["torch"]}
    sweep = run_sweep(place.settings(**few), tmp_path)
    assert [row["ratio"] for row in sweep.rows] == [0.5] * 4
    assert sorted(bench.number for bench, *_ in begun) == [0, 1, 2, 3]
    assert {tuple(others) for _, *others in begun} == {(0, 0, 0)}

    import ray

    options = bench_options(None)
    assert options["num_cpus"] == 2, "all that this node has"
    assert options["scheduling_strategy"].node_id == ray.get_runtime_context().get_node_id()
    assert options["scheduling_strategy"].soft is False
    assert bench_options(LABEL) == {"num_cpus": 0, "num_gpus": 0, "resources": {LABEL: 1}}


def test_equal_models_of_two_entries_are_measured_once(
    place: Place, cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They have one key, and the files are gone when the first one is measured."""

    def instant(spec: Any, sliced: Any, dense: Any) -> dict[str, Any]:
        if not (sliced and dense):
            return {"reason": "there are no files"}
        return {"latency_ms": 1.0, "latency_ms_dense": 2.0, "ratio": 0.5, "bench_host": uuid.uuid4().hex}

    monkeypatch.setattr("deploy_prune.sweep.bench.measure", instant)
    entries = [place.entry(name=name) for name in ("one", "other")]
    few: dict[str, Any] = {"keeps": [0.5], "seeds": [0], "compensate": ["none"], "bench_runtimes": ["torch"]}
    sweep = run_sweep(place.settings(**few, entries=entries), tmp_path)
    assert [(row["model"], row["reason"], row["ratio"]) for row in sweep.rows] == [
        ("one", None, 0.5),
        ("other", None, 0.5),
    ]
    assert len({row["bench_host"] for row in sweep.rows}) == 1, "one measurement"
    assert not list((tmp_path / "models").iterdir())


def test_jobs_for_gpus_go_to_nodes_that_have_them_one_to_a_gpu(
    place: Place, cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray is told of a GPU that is none: a stand-in for the job says where it ran."""

    def job(spec: Any) -> Iterator[dict[str, Any]]:
        import ray

        context = ray.get_runtime_context()
        yield {"event": "begun", "node": context.get_node_id()}
        where = [context.get_node_id(), context.get_accelerator_ids()["GPU"], os.environ.get("CUDA_VISIBLE_DEVICES")]
        for cell in spec["cells"]:
            yield {"event": "failed", "number": cell["number"], "reason": json.dumps([*where, spec["seed"]])}

    monkeypatch.setattr("deploy_prune.sweep.job.run_job", job)
    settings = place.settings(device="cuda")
    with pytest.raises(InputError, match="No node of the Ray cluster has 1 CPU and a GPU"):
        run_sweep(settings, tmp_path)
    node = cluster.add_node(num_cpus=2, num_gpus=1)
    try:
        sweep = run_sweep(settings, tmp_path)
    finally:
        cluster.remove_node(node)
    assert sweep.account["workers"] == 1, "two CPUs, and one GPU"
    ran = {row["reason"] for row in sweep.rows}
    assert ran == {json.dumps([node.node_id, ["0"], "0", seed]) for seed in (0, 1)}


def test_labels_must_be_there(place: Place, cluster: Any, tmp_path: Path) -> None:
    bench = {"bench_runtimes": ["torch"]}
    with pytest.raises(InputError, match="has the label 'moon'"):
        run_sweep(place.settings(**bench, bench_on=["moon"]), tmp_path)
    with pytest.raises(InputError, match="has CPUs"):
        run_sweep(place.settings(**bench, bench_on=["CPU"]), tmp_path)
    with pytest.raises(InputError, match="No node of the Ray cluster has 64 CPUs"):
        run_sweep(place.settings(threads=64), tmp_path)


def test_one_sweep_at_a_time(place: Place, cluster: Any, tmp_path: Path) -> None:
    from deploy_prune.disk import locked

    with locked(tmp_path / "out"), pytest.raises(SystemStateError, match="Another run"):
        run_sweep(place.settings(), tmp_path / "out")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="not a folder"):
        run_sweep(place.settings(), tmp_path / "file")
