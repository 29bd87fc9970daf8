"""Describe the machine that a measurement was made on. No torch."""

from __future__ import annotations

import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

_LIBRARIES = ("deploy-prune", "numpy", "onnx", "onnxruntime", "onnxruntime-gpu", "torch", "transformers")


def describe_machine(threads: int) -> dict[str, Any]:
    """Return CPU, cores, threads used, load, memory, system and library versions."""
    return {
        "cpu": cpu_model(),
        "physical_cores": psutil.cpu_count(logical=False),
        "logical_cores": psutil.cpu_count(),
        "usable_cores": usable_cores(),
        "threads": threads,
        "load_1min": psutil.getloadavg()[0],
        "memory_bytes": psutil.virtual_memory().total,
        "memory_available_bytes": psutil.virtual_memory().available,
        "os": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: found for name in _LIBRARIES if (found := _version(name))},
    }


def usable_cores() -> int:
    """Return how many cores this process may use (its affinity, or all of them)."""
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def default_threads() -> int:
    """Return one thread per physical core that this process may use."""
    return max(1, min(usable_cores(), psutil.cpu_count(logical=False) or usable_cores()))


def cpu_model() -> str:
    """Return the processor's name."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text("utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
