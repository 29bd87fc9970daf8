"""Several processes prune one model together: the same plan and weights for any number, and clear ends."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from killing import identity, kept_files, stages_of
from runs_tiny import checkpoint, data
from safetensors.torch import load_file

from deploy_prune import parallel
from deploy_prune.bundle import Bundle
from deploy_prune.errors import LostProcessError

WORKER = Path(__file__).with_name("team_worker.py")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


def together(processes: int, *words: str) -> subprocess.CompletedProcess[str]:
    """Run Python's words in so many processes."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *(torchrun if processes > 1 else []), *words]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=500)


def unwatched(*words: str, folders: Sequence[Path | None] = (None, None)) -> list[subprocess.CompletedProcess[str]]:
    """Run Python's words in two processes that nobody tells when one has ended, as torchrun would.

    Each may have a working folder of its own: one machine's disk, of which the other knows nothing.
    """
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    command, started = [sys.executable, *words], []
    for rank, folder in enumerate(folders):
        environment = {**ENVIRONMENT, **meeting, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen(command, env=environment, cwd=folder, **pipes))
    try:
        said = [process.communicate(timeout=300) for process in started]
        return [subprocess.CompletedProcess(command, p.returncode, *s) for p, s in zip(started, said, strict=True)]
    finally:
        for process in started:
            process.kill()


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
            assert torch.equal(value, many[key]), f"{name} {key}"


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


@pytest.mark.parametrize("disks", [1, 2])
def test_a_process_that_dies_in_recovery_is_told_and_its_checkpoint_goes_on(disks: int, tmp_path: Path) -> None:
    """The trainer's own exchange of gradients meets the closed connection."""
    folders = [tmp_path / "1", tmp_path / str(disks)]
    for folder in folders[:disks]:
        checkpoint(folder / "model", num_hidden_layers=2)
        data(folder / "data", train=160)
    words = ["prune", "./model", "--task", "text-classification", "--data", "./data"]
    words += ["--recover-epochs", "2", "--out", "b"]
    survivor, killed = unwatched(str(WORKER), "die-in-recovery", *words, folders=folders)
    assert killed.returncode == -signal.SIGKILL
    said = " ".join(survivor.stderr.split())
    assert survivor.returncode == 4, said
    assert "Process 1 of 2 lost another process" in said
    assert "Run it again: what is finished is kept and used." in said
    assert list((folders[0] / ".b.recovery" / "recover").glob("checkpoint-*"))
    for again in unwatched("-m", "deploy_prune", *words, folders=folders):
        assert again.returncode == 0, again.stderr
    bundle = Bundle.open(folders[0] / "b")
    assert {"calibrate", "score", "search", "compensate"} <= set(stages_of(bundle))
    assert next(s for s in bundle.manifest.stages if s.name == "recover").model_dump()["resumed"]
    assert disks == 1 or sorted(p.name for p in folders[1].iterdir()) == ["data", "model"], "nothing is left there"


def test_only_a_lost_connection_is_told_as_a_lost_process() -> None:
    gloo = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:38822"
    for lost in (RuntimeError(gloo), dist.DistBackendError("NCCL communicator was aborted on rank 0.")):
        with pytest.raises(LostProcessError, match="lost another process"), parallel.connected():
            raise lost
    for other in (torch.cuda.OutOfMemoryError("CUDA out of memory."), RuntimeError("shapes cannot be multiplied")):
        with pytest.raises(RuntimeError) as caught, parallel.connected():
            raise other
        assert caught.value is other


def test_a_process_sends_from_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else all would send from the first one, and nccl refuses two processes on one GPU."""
    done: list[Any] = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(torch.cuda, "set_device", done.append)
    monkeypatch.setattr(parallel, "_together", lambda: (dist.HashStore(), 1, 2))
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **how: done.append(backend))
    monkeypatch.setattr(dist, "destroy_process_group", lambda: done.append("end"))
    monkeypatch.setattr(parallel, "_set_pg_timeout", lambda timeout: None)
    own = torch.device("cuda", 1)
    with parallel.team(own):
        assert done == [own, "nccl"], "before the processes meet"
    assert done[2:] == ["end"]
    done.clear()
    with parallel.team(torch.device("cpu")):
        assert done == ["gloo"]


def test_an_out_that_cannot_be_written_is_told_once(tmp_path: Path) -> None:
    checkpoint(tmp_path / "model", num_hidden_layers=1)
    data(tmp_path / "data", train=160)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "notes.txt").write_text("mine")
    words = ["prune", str(tmp_path / "model"), "--task", "text-classification", "--data", str(tmp_path / "data")]
    first, second = unwatched("-m", "deploy_prune", *words, "--out", str(tmp_path / "b"))
    assert (first.returncode, second.returncode) == (2, 2), second.stderr
    assert "is not empty and is not a bundle" in " ".join(first.stderr.split())
    assert "Error" not in second.stderr


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
