"""Describe the machine that a measurement was made on. No torch."""

from __future__ import annotations

import os
import platform
import re
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

from .sensors import describe_gpus

_LIBRARIES = (
    *("deploy-prune", "numpy", "onnx", "onnxruntime", "onnxruntime-gpu", "openvino", "tensorrt", "tensorrt-rtx"),
    *("torch", "transformers"),
)
# What runtimes choose their kernels by.
_FLAGS = re.compile(r"avx.*|amx.*|fma|f16c|sse4_2|asimd.*|sve.*|i8mm|bf16")
_BUSY_PERCENT = 5.0  # of one core: what foreign processes take above this is worth a line
_LOOK_SECONDS = 0.1


def describe_machine(threads: int) -> dict[str, Any]:
    """Return CPU and its flags, cores, threads used, load, foreign processes, GPUs, memory, system and versions."""
    return {
        "cpu": cpu_model(),
        "cpu_flags": cpu_flags(),
        "governor": _read(Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")),
        "busy": busy_processes(),
        "gpus": describe_gpus(),
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
    for line in (_read(Path("/proc/cpuinfo")) or "").splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def cpu_flags() -> list[str]:
    """Return the instruction sets that kernels are chosen by, sorted."""
    for line in (_read(Path("/proc/cpuinfo")) or "").splitlines():
        if line.startswith(("flags", "Features")):
            return sorted(flag for flag in line.split(":", 1)[1].split() if _FLAGS.fullmatch(flag))
    return []


def busy_processes() -> list[dict[str, Any]]:
    """Return the five busiest processes that are not ours: pid, name and percent of one core."""
    own = {os.getpid()} | {p.pid for p in psutil.Process().children(recursive=True)}
    others = [p for p in psutil.process_iter() if p.pid not in own]
    for process in others:
        _percent(process)  # the first reading only starts the count
    time.sleep(_LOOK_SECONDS)
    found = [(percent, p.pid, name) for p in others if (percent := _percent(p)) > _BUSY_PERCENT and (name := _name(p))]
    return [{"pid": pid, "name": name, "percent": percent} for percent, pid, name in sorted(found, reverse=True)[:5]]


def _percent(process: psutil.Process) -> float:
    try:
        return float(process.cpu_percent())
    except psutil.Error:
        return 0.0


def _name(process: psutil.Process) -> str:
    try:
        return str(process.name())
    except psutil.Error:
        return ""


def _read(path: Path) -> str | None:
    try:
        return path.read_text("utf-8", errors="replace").strip()
    except OSError:
        return None


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
