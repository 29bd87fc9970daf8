"""Several processes prune one model together: the same plan and weights for any number, and clear ends."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from killing import identity, kept_files, stages_of
from runs_tiny import checkpoint, data
from safetensors.torch import load_file

from deploy_prune import parallel
from deploy_prune.bundle import Bundle

WORKER = Path(__file__).with_name("team_worker.py")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


def together(processes: int, *words: str) -> subprocess.CompletedProcess[str]:
    """Run Python's words in so many processes."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *(torchrun if processes > 1 else []), *words]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=500)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return what one process prunes."""
    folder = tmp_path_factory.mktemp("alone")
    done = together(1, str(WORKER), "prune", str(folder))
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("processes", [2, 3, 4])
def test_any_number_of_processes_finds_the_same_plan_and_weights(alone: Path, processes: int, tmp_path: Path) -> None:
    done = together(processes, str(WORKER), "prune", str(tmp_path))
    assert done.returncode == 0, done.stderr
    expected = json.loads((alone / "hashes.json").read_text())
    assert json.loads((tmp_path / "hashes.json").read_text()) == expected
    assert len(set(expected.values())) == len(expected)
    for name in expected:
        one, many = (load_file(folder / f"{name}.safetensors") for folder in (alone, tmp_path))
        assert one.keys() == many.keys()
        for key, value in one.items():
            assert torch.allclose(value.double(), many[key].double(), rtol=0, atol=1e-6), f"{name} {key}"


def test_processes_train_one_student(tmp_path: Path) -> None:
    """The gradients of the parts are averaged: the loss is that of one process, and every copy ends the same."""
    losses = {}
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        folder.mkdir()
        done = together(processes, str(WORKER), "recover", str(folder))
        assert done.returncode == 0, done.stderr
        records = [json.loads((folder / f"record-{rank}.json").read_text()) for rank in range(processes)]
        states = [load_file(folder / f"student-{rank}.safetensors") for rank in range(processes)]
        for state in states[1:]:
            assert all(torch.equal(value, states[0][name]) for name, value in state.items())
        assert all(r["kept"] and r["steps"] == records[0]["steps"] for r in records)
        losses[processes] = records[0]["loss_before"], records[0]["loss_after"]
    assert losses[2] == pytest.approx(losses[1], rel=0.02)
    assert losses[1][1] < 0.9 * losses[1][0]


def test_a_killed_process_ends_the_run_and_the_next_one_goes_on(tmp_path: Path) -> None:
    checkpoint(tmp_path / "model", num_hidden_layers=2)  # of which each process scores one
    data(tmp_path / "data", train=160)
    words = ["prune", str(tmp_path / "model"), "--task", "text-classification", "--data", str(tmp_path / "data")]
    whole = together(2, "-m", "deploy_prune", *words, "--out", str(tmp_path / "whole"))
    assert whole.returncode == 0, whole.stderr
    assert whole.stdout.count("Bundle:") == 1
    out = tmp_path / "b"
    words += ["--out", str(out)]
    killed = together(2, str(WORKER), "die", *words)
    assert killed.returncode != 0
    said = " ".join(killed.stderr.split())
    assert "Process 1 of 2 lost another process" in said or "Process 1 of 2 was told to end" in said
    assert "Run it again: what is finished is kept and used." in said
    assert not out.exists()
    assert kept_files(out) == 1
    again = together(2, "-m", "deploy_prune", *words)
    assert again.returncode == 0, again.stderr
    assert stages_of(Bundle.open(out)) == ["calibrate"]
    assert identity(Bundle.open(out)) == identity(Bundle.open(tmp_path / "whole"))
    assert kept_files(out) == 0


def test_too_few_rows_for_the_processes_are_refused(tmp_path: Path) -> None:
    checkpoint(tmp_path / "model", num_hidden_layers=1)
    data(tmp_path / "data", train=96)
    words = ["prune", str(tmp_path / "model"), "--task", "text-classification", "--data", str(tmp_path / "data")]
    done = together(2, "-m", "deploy_prune", *words, "--out", str(tmp_path / "b"))
    assert done.returncode != 0
    assert "2 processes need 4 batches of samples at least, and there are 3." in " ".join(done.stderr.split())
    assert not (tmp_path / "b").exists()


def test_the_first_process_tells_its_error_once(tmp_path: Path) -> None:
    done = together(2, "-m", "deploy_prune", "prune", str(tmp_path / "none"), "--task", "sst2", "--out", "b")
    assert done.returncode != 0
    assert done.stderr.count("No model folder at") == 1
    assert "Error in process 2" not in done.stderr


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=40))
def test_a_sum_over_sections_is_a_fixed_tree(values: list[float]) -> None:
    found = parallel.SectionSum((), torch.device("cpu"))
    parts = [0.0] * parallel.SECTIONS
    for number in parallel.own(len(values)):
        section = number % parallel.SECTIONS
        found.add(section, torch.tensor(values[number], dtype=torch.float64))
        parts[section] += values[number]
    assert float(found.total()) == (parts[0] + parts[1]) + (parts[2] + parts[3])


@pytest.mark.parametrize("processes", range(1, 12))
def test_every_batch_belongs_to_one_process(monkeypatch: pytest.MonkeyPatch, processes: int) -> None:
    monkeypatch.setattr(parallel, "size", lambda: processes)
    dealt = []
    for rank in range(processes):
        monkeypatch.setattr(parallel, "rank", lambda rank=rank: rank)
        dealt += parallel.own(50)
    assert sorted(dealt) == list(range(50))


def test_sections_come_in_order() -> None:
    found = parallel.SectionSum((), torch.device("cpu"))
    found.add(2, torch.tensor(1.0))
    with pytest.raises(RuntimeError, match="section 1 comes after 2"):
        found.add(1, torch.tensor(1.0))
