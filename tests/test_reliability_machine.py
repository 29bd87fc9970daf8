"""What a run survives of its machine: full and read-only disks, a second run, clocks that jump, a lack of memory."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from killing import identity
from runs_tiny import checkpoint, data

from deploy_prune.bundle import Bundle
from deploy_prune.cli import invoke
from deploy_prune.config import BenchSettings
from deploy_prune.errors import SystemStateError
from deploy_prune.runtime_bench.bench import bench_bundle
from deploy_prune.stages import Recorder


class Place:
    """A folder with a small checkpoint and its data."""

    def __init__(self, root: Path) -> None:
        self.model = checkpoint(root / "model", num_hidden_layers=2)
        self.data = data(root / "data", evaluation=64)

    def words(self, out: Path, *more: str, command: str = "prune") -> list[str]:
        given = [command, str(self.model), "--data", str(self.data), "--task", "text-classification"]
        return [*given, "--out", str(out), "--samples", "64", *more]

    def run(self, out: Path, *more: str, command: str = "prune") -> int:
        return invoke(self.words(out, *more, command=command))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("place"))


@pytest.fixture(scope="module")
def published(place: Place, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("published") / "b"
    assert place.run(out) == 0
    return out


@contextmanager
def small_disk(folder: Path, options: str) -> Iterator[Path]:
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if not p.name.endswith(".lock"))


@pytest.mark.parametrize("old", [False, True])
def test_a_disk_that_is_full_at_any_moment_leaves_what_was_there(
    old: bool, place: Place, published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The disk has room for more and more of a bundle; weights, golden rows, manifest, code each are once too much."""
    size = sum(p.stat().st_size for p in published.rglob("*"))
    codes = []
    for share in (0.02, 0.2, 0.5, 0.8, 0.95, 4):
        room = int(share * size) + (2 * size if old else 0)
        with small_disk(tmp_path / f"disk{share}", f"size={room}") as disk:
            if old:
                shutil.copytree(published, disk / "b")
            before = snapshot(disk / "b")
            codes.append(place.run(disk / "b", "--keep-flops", "0.7"))
            said = " ".join(capsys.readouterr().err.split())
            if codes[-1]:
                assert codes[-1] == 4
                assert "disk is full" in said
                assert snapshot(disk / "b") == before
                assert names(disk) == (["b"] if old else [])
            else:
                Bundle.open(disk / "b")
    assert codes[:2] == [4, 4] or old
    assert codes[-1] == 0


@pytest.mark.parametrize("form", ["onnx", "pt2"])
def test_a_disk_that_fills_up_during_the_export(
    form: str, place: Place, published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    size = sum(p.stat().st_size for p in published.rglob("*"))
    with small_disk(tmp_path / "disk", f"size={size + (48 << 10)}") as disk:
        shutil.copytree(published, disk / "b")
        before = snapshot(disk / "b")
        assert invoke(["export", str(disk / "b"), "--format", form, "--variants", "dense"]) == 4
        assert "disk is full" in " ".join(capsys.readouterr().err.split())
        assert {k: v for k, v in snapshot(disk / "b").items() if not k.startswith(".")} == before
        Bundle.open(disk / "b")


def test_a_read_only_disk(place: Place, published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with small_disk(tmp_path / "disk", "size=10m") as disk:
        shutil.copytree(published, disk / "b")
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        before = snapshot(disk)
        for words in (place.words(disk / "b"), place.words(disk / "c"), ["export", str(disk / "b")]):
            assert invoke(words) == 4
            assert "No permission to write" in " ".join(capsys.readouterr().err.split())
        assert snapshot(disk) == before
        assert invoke(["inspect", str(disk / "b")]) == 0  # reading needs no lock


def test_two_runs_on_one_bundle(place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "b"
    first = subprocess.Popen(
        [sys.executable, "-m", "deploy_prune", *place.words(out, "--recover-minutes", "0.03")],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    try:
        until = time.monotonic() + 120
        while not (tmp_path / ".b.staging").is_dir():  # it holds the lock
            assert first.poll() is None, first.stdout and first.stdout.read()
            assert time.monotonic() < until
            time.sleep(0.02)
        assert place.run(out) == 4
        assert "Another run is writing" in " ".join(capsys.readouterr().err.split())
        assert first.poll() is None
    finally:
        said = first.communicate(timeout=300)[0]
    assert first.returncode == 0, said
    Bundle.open(out)
    assert place.run(out) == 0


def test_clocks_that_jump_change_nothing(
    place: Place, published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jumps, real = iter(range(10**9)), time.time
    monkeypatch.setattr(time, "time", lambda: real() + (-1) ** next(jumps) * 10**8)  # three years, to and fro
    assert place.run(tmp_path / "b") == 0
    made = Bundle.open(tmp_path / "b")
    assert identity(made) == identity(Bundle.open(published))
    assert all(0 <= s.seconds < 600 for s in made.manifest.stages)


GREEDY = """
import os, resource, signal
def limited(bundle, variant, *, threads=None, precision=None):
    resource.setrlimit(resource.RLIMIT_AS, (1 << 32, 1 << 32))
    return bytearray(1 << 40)
class Doomed:
    input_names, output_names, provider = ("input_ids",), ("logits",), "none"
    def __enter__(self): return self
    def __exit__(self, *rest): pass
    def __getattr__(self, name): os.kill(os.getpid(), signal.SIGKILL)
def killed(bundle, variant, *, threads=None, precision=None):
    return Doomed()
"""


def test_a_cell_that_runs_out_of_memory_is_a_failure_of_its_own(
    published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One runtime is refused its memory, another is killed as the system does it; the others are measured."""
    shutil.copytree(published, tmp_path / "b")
    (tmp_path / "greedy.py").write_text(GREEDY)
    info = tmp_path / "greedy-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: greedy\nVersion: 1.0\n")
    points = "[deploy_prune.runtimes]\nlimited = greedy:limited\nkilled = greedy:killed\n"
    (info / "entry_points.txt").write_text(points)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    from deploy_prune.runtimes import available_runtimes

    available_runtimes.cache_clear()
    quick = {"seconds": 0.05, "min_rounds": 2, "warmup_seconds": 0.05, "models": ("sliced",), "control": False}
    try:
        result = bench_bundle(
            Bundle.open(tmp_path / "b"), BenchSettings(runtimes=("limited", "killed", "torch"), **quick)
        )
    finally:
        available_runtimes.cache_clear()
    assert [m["runtime"] for m in result["measurements"]] == ["torch"]
    refused, killed = result["failures"]
    assert (refused["runtime"], refused["kind"]) == ("limited", "MemoryError")
    assert (killed["runtime"], killed["kind"]) == ("killed", "Died")
    assert "SIGKILL" in killed["reason"]


def fill_gpu() -> None:
    raise torch.cuda.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize("ask", [lambda: np.zeros(1 << 50), lambda: torch.zeros(1 << 60), fill_gpu])
def test_a_stage_without_memory_says_so(ask: Callable[[], Any]) -> None:
    recorder = Recorder(torch.device("cpu"))
    with pytest.raises(SystemStateError, match=r"Out of (device )?memory in the stage"), recorder.stage("score"):
        ask()
    with pytest.raises(RuntimeError, match="another reason"), recorder.stage("score"):
        raise RuntimeError("another reason")
