"""Read what the hardware counts of itself: energy (RAPL, NVML), GPU memory, clocks and temperature. No torch.

What cannot be read is None: containers hide RAPL, machines without a driver have no NVML.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

_RAPL = Path("/sys/class/powercap")


def cpu_energy_uj() -> dict[str, int] | None:
    """Return the energy counter of each processor package in microjoules, or None."""
    found = {}
    for zone in sorted(_RAPL.glob("intel-rapl:?")):  # their sub-zones have a second number
        try:
            if (zone / "name").read_text("ascii").startswith("package"):  # not psys, which holds the packages
                found[zone.name] = int((zone / "energy_uj").read_text("ascii"))
        except OSError:
            return None
    return found or None


def energy_between(before: dict[str, int] | None, after: dict[str, int] | None) -> float | None:
    """Return the joules between two readings, counters that wrapped around taken into account."""
    if before is None or after is None:
        return None
    joules = 0.0
    for name, start in before.items():
        used = after[name] - start
        if used < 0:
            used += int((_RAPL / name / "max_energy_range_uj").read_text("ascii"))
        joules += used / 1e6
    return joules


@cache
def _nvml() -> Any:
    """Return NVML, initialised, or None without the package, a driver or a GPU."""
    try:
        import pynvml

        pynvml.nvmlInit()
        return pynvml if pynvml.nvmlDeviceGetCount() else None
    except Exception:  # NVML's errors and a missing library alike: there is nothing to read
        return None


def _told(ask: Callable[..., Any], *of_what: Any) -> Any:
    """Return what a GPU answers, or None where it does not support the question (laptops, virtual GPUs)."""
    try:
        return ask(*of_what)
    except _nvml().NVMLError:
        return None


def gpu_energy_mj(index: int = 0) -> int | None:
    """Return a GPU's energy counter in millijoules, or None."""
    nvml = _nvml()
    if nvml is None:
        return None
    return _told(nvml.nvmlDeviceGetTotalEnergyConsumption, nvml.nvmlDeviceGetHandleByIndex(index))


def gpu_memory_bytes(pid: int, index: int = 0) -> int | None:
    """Return the bytes of GPU memory that a process holds, or None."""
    nvml = _nvml()
    if nvml is None:
        return None
    processes = _told(nvml.nvmlDeviceGetComputeRunningProcesses, nvml.nvmlDeviceGetHandleByIndex(index))
    return next((p.usedGpuMemory for p in processes or () if p.pid == pid), None)


def describe_gpus() -> list[dict[str, Any]]:
    """Return name, driver, memory, clocks, temperature and power limit of every GPU; what one does not tell is None."""
    nvml = _nvml()
    if nvml is None:
        return []
    found = []
    for index in range(nvml.nvmlDeviceGetCount()):
        gpu = nvml.nvmlDeviceGetHandleByIndex(index)
        memory, limit = _told(nvml.nvmlDeviceGetMemoryInfo, gpu), _told(nvml.nvmlDeviceGetPowerManagementLimit, gpu)
        found.append(
            {
                "name": nvml.nvmlDeviceGetName(gpu),
                "driver": nvml.nvmlSystemGetDriverVersion(),
                "memory_bytes": None if memory is None else int(memory.total),
                "sm_clock_mhz": _told(nvml.nvmlDeviceGetClockInfo, gpu, nvml.NVML_CLOCK_SM),
                "memory_clock_mhz": _told(nvml.nvmlDeviceGetClockInfo, gpu, nvml.NVML_CLOCK_MEM),
                "temperature_c": _told(nvml.nvmlDeviceGetTemperature, gpu, nvml.NVML_TEMPERATURE_GPU),
                "power_limit_w": None if limit is None else limit / 1000,
            }
        )
    return found
