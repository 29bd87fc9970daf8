"""What a measurement's fresh process holds: one model, open in one runtime and fed at one shape."""

from __future__ import annotations

import gc
import os
import time
from typing import Any

from ..runtimes import import_libraries
from .memory import forget_peak, peak_rss_bytes, rss_bytes
from .scenarios import run_scenario
from .sensors import cpu_energy_uj, energy_between, gpu_energy_mj, gpu_memory_bytes
from .subjects import Subject

MEMORY_RUNS = 3


class Cell:
    """Open a model, note what memory that takes, and run it when asked."""

    def __init__(self, *, subject: dict[str, Any], runtime: str, batch: int, seq: int, threads: int | None) -> None:
        model = Subject(**subject)
        import_libraries(runtime)
        before = rss_bytes()
        self.runner = model.open(runtime, threads).__enter__()
        self.feeds = model.feeds(self.runner, batch, seq)
        if self.runner.compiles_in_first_run:  # the compiler's memory is not what a run adds
            self.runner.infer(self.feeds)
        gc.collect()
        loaded, peak_of_loading = rss_bytes(), peak_rss_bytes()
        forgotten = forget_peak()
        for _ in range(MEMORY_RUNS):
            self.runner.infer(self.feeds)
        peak = peak_rss_bytes()
        self.memory = {
            "baseline_rss_bytes": before,
            "resident_bytes": max(loaded - before, 0),
            "activation_bytes": max(peak - loaded, 0) if forgotten else None,
            "peak_rss_bytes": max(peak, peak_of_loading),
            "device_bytes": gpu_memory_bytes(os.getpid()),
            "file_bytes": self.runner.file_bytes(),
        }

    def describe(self) -> dict[str, Any]:
        """Return the provider that computes, whether it replays CUDA graphs, and the memory: of the process with the
        runtime's libraries before the model was opened, what opening it left resident, what running it adds at its
        peak, the process's peak, the GPU's, and the file's.
        """
        return {"provider": self.runner.provider, "cuda_graphs": self.runner.cuda_graphs, **self.memory}

    def scenario(self, name: str, seconds: float) -> dict[str, Any]:
        """Run a scenario of MLPerf's for at least so many seconds (see `scenarios`)."""
        return run_scenario(name, lambda: self.runner.infer(self.feeds), seconds)

    def run(self, runs: int) -> dict[str, Any]:
        """Run so many times; return ns of each by the wall, the processor and (where it can be told) the
        device, and the joules of all where they can be read.
        """
        infer, feeds = self.runner.infer, self.feeds
        wall_ns: list[int] = []
        cpu_ns: list[int] = []
        device_ns: list[int] = []
        cpu_energy, gpu_energy = cpu_energy_uj(), gpu_energy_mj()
        for _ in range(runs):
            cpu, wall = time.process_time_ns(), time.perf_counter_ns()
            infer(feeds)
            wall_ns.append(time.perf_counter_ns() - wall)
            cpu_ns.append(time.process_time_ns() - cpu)
            if self.runner.device_ns is not None:
                device_ns.append(self.runner.device_ns)
        after = gpu_energy_mj()
        return {
            "wall_ns": wall_ns,
            "cpu_ns": cpu_ns,
            "device_ns": device_ns,
            "cpu_joules": energy_between(cpu_energy, cpu_energy_uj()),
            "gpu_joules": None if gpu_energy is None or after is None else (after - gpu_energy) / 1000,
        }
