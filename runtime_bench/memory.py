"""Read a process's own memory. No torch."""

from __future__ import annotations

import sys
from pathlib import Path


def peak_rss_bytes() -> int:
    """Return the largest resident set this process has had, in bytes, since its start or since `forget_peak`.

    On Linux from VmHWM: getrusage's ru_maxrss also counts what the parent held when it started us.
    """
    if sys.platform == "linux":
        for line in Path("/proc/self/status").read_text("ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)


def forget_peak() -> bool:
    """Begin the peak anew at the present resident set; False where the system does not let us (not Linux)."""
    try:
        Path("/proc/self/clear_refs").write_text("5", "ascii")
    except OSError:
        return False
    return True


def rss_bytes() -> int:
    """Return the resident set of this process now, in bytes."""
    import psutil

    return int(psutil.Process().memory_info().rss)
