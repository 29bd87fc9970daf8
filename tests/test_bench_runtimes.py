"""The bench over runtimes that other packages add: ones that die, compile, tell the device's time, or take too long."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from bundles_tiny import exported_bundle

from deploy_prune.bundle import Bundle
from deploy_prune.config import BenchSettings
from deploy_prune.runtime_bench.bench import bench_bundle, bench_paths
from deploy_prune.runtime_bench.isolate import Worker, WorkerError

QUICK: dict[str, Any] = {"seconds": 0.1, "min_rounds": 5, "warmup_seconds": 0.1, "threads": (1,)}


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return exported_bundle(tmp_path)


def quick(bundle: Bundle, **settings: Any) -> dict[str, Any]:
    return bench_bundle(bundle, BenchSettings(**(QUICK | settings)))


AddRuntime = Callable[[str, str], None]


@pytest.fixture
def add_runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[AddRuntime]:
    """Add a runtime by an entry point, as another package would, from the code of a module with `open_it`."""
    from deploy_prune.runtimes import available_runtimes

    def add(name: str, code: str) -> None:
        (tmp_path / f"{name}.py").write_text(code)
        info = tmp_path / f"{name}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[deploy_prune.runtimes]\n{name} = {name}:open_it\n")
        monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
        monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
        available_runtimes.cache_clear()

    yield add
    available_runtimes.cache_clear()


def test_a_runtime_that_dies_is_a_failure(bundle: Bundle, add_runtime: AddRuntime) -> None:
    add_runtime("deadly", "import os\ndef open_it(bundle, variant, *, threads=None, precision=None): os._exit(9)\n")
    result = quick(bundle, runtimes=("deadly", "ort-cpu"), models=("dense",))
    assert [m["runtime"] for m in result["measurements"]] == ["ort-cpu"]
    (failure,) = result["failures"]
    assert (failure["runtime"], failure["model"], failure["kind"]) == ("deadly", "dense", "Died")
    assert "exit code 9" in failure["reason"]


ODD_RUNTIME = """
import numpy as np
from deploy_prune.runtimes.base import Runner

class Odd(Runner):
    provider, compiles_in_first_run, compiled = "odd", {compiles}, False

    def __init__(self, variant): self.variant = variant
    def _activate(self): self.kept = np.ones(30 << 20, np.uint8)
    def _deactivate(self): pass
    def _infer(self, feeds):
        if not self.compiled and self.compiles_in_first_run:
            np.ones(200 << 20, np.uint8)
        self.compiled = True
        self.device_ns = 1_000_000 if self.variant == "dense" else 500_000
        return {{"y": np.ones(60 << 20, np.uint8)[:1]}}

def open_it(bundle, variant, *, threads=None, precision=None): return Odd(variant)
"""


@pytest.mark.parametrize("compiles", [False, True])
def test_what_a_run_adds_is_told_from_what_opening_and_compiling_took(
    bundle: Bundle, add_runtime: AddRuntime, compiles: bool
) -> None:
    """A compiler's memory once counted as what a run of its model adds."""
    add_runtime("odd", ODD_RUNTIME.format(compiles=compiles))
    m, _ = quick(bundle, runtimes=("odd",), models=("dense", "sliced"))["measurements"]
    mb = {name: m[name] / (1 << 20) for name in ("resident_bytes", "activation_bytes", "peak_rss_bytes")}
    assert 25 < mb["resident_bytes"] < 50
    assert 50 < mb["activation_bytes"] < 90
    added = mb["peak_rss_bytes"] - m["baseline_rss_bytes"] / (1 << 20)
    assert added > 220 if compiles else added < 150


def test_the_devices_own_time_is_kept_of_every_run_and_compared(bundle: Bundle, add_runtime: AddRuntime) -> None:
    add_runtime("odd", ODD_RUNTIME.format(compiles=False))
    settings = BenchSettings(**QUICK, runtimes=("odd",), seqs=(12,), models=("dense", "sliced"))
    result, samples = bench_paths([bundle.root], settings)
    sliced = next(m for m in result["measurements"] if m["variant"] == "sliced")
    dense = next(m for m in result["measurements"] if m["variant"] == "dense")
    assert (dense["device_ms"]["median"], sliced["device_ms"]["median"]) == (1.0, 0.5)
    assert sliced["device_ratio"]["value"] == 0.5
    kept = next(ns for name, ns in samples.items() if name.endswith(f"{sliced['model']}/device_ns"))
    assert (
        len(kept)
        == sliced["runs"]
        == len(samples[next(n for n in samples if n.endswith(f"{sliced['model']}/wall_ns"))])
    )


def test_a_scenario_that_dies_ends_the_others_with_its_own_reason(
    bundle: Bundle, add_runtime: AddRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one after it once failed on a dead process, and that stood for the reason."""
    add_runtime("odd", ODD_RUNTIME.format(compiles=False))
    asked: list[tuple[str, float | None]] = []
    real = Worker.call

    def call(self: Worker, method: str, *, within: float | None = None, **arguments: Any) -> Any:
        if method == "scenario":
            asked.append((arguments["name"], within))
            raise WorkerError("It took too long.", kind="TimeoutError")
        return real(self, method, within=within, **arguments)

    monkeypatch.setattr(Worker, "call", call)
    scenarios = ("single-stream", "offline")
    result = quick(bundle, runtimes=("odd",), models=("dense",), scenarios=scenarios)
    assert asked == [("single-stream", 600 + 3 * 0.1)]
    assert [f["reason"] for f in result["failures"]] == ["It took too long."]
