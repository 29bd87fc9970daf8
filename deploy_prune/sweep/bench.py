"""What a worker does on a node that is kept quiet: measure one sliced model beside the dense one."""

from __future__ import annotations

import socket
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..measuring import time_bundles
from ..runtime_bench.bench import Place
from ..runtime_bench.machine import cpu_model, default_threads
from ..runtime_bench.stats import ratio_of_medians, summarise_ms
from .job import reason_of
from .settings import SweepSettings


def measure(spec: Mapping[str, Any], sliced: Mapping[str, bytes], dense: Mapping[str, bytes]) -> dict[str, Any]:
    """Return a cell's latencies by the spec's settings, runtime and length; "reason" alone where that cannot be done.

    The models are the files of their bundles by path: they come through Ray's object store, so nodes share no disk.
    """
    settings = SweepSettings.model_validate(spec["settings"])
    started = time.perf_counter()
    place = Place(
        spec["runtime"],
        settings.bench_batch,
        settings.bench_seq or spec["seq_len"],
        settings.bench_threads or default_threads(),
    )
    try:
        with tempfile.TemporaryDirectory(prefix="deploy-prune-bench-") as folder:
            roots = {name: Path(folder) / name for name in ("dense", "sliced")}
            for root, files in zip(roots.values(), (dense, sliced), strict=True):
                unpack(files, root)
            samples = time_bundles(roots, place, settings.bench_seconds)
        ratio = ratio_of_medians(samples["sliced"], samples["dense"])
    except Exception as error:  # told to the driver, which lists the cell as failed
        return {"reason": reason_of(error)}
    return {
        "batch": place.batch,
        "seq": place.seq,
        "bench_threads": place.threads,
        "latency_ms": summarise_ms(samples["sliced"])["median"],
        "latency_ms_dense": summarise_ms(samples["dense"])["median"],
        "ratio": ratio.value,
        "ratio_low": ratio.low,
        "ratio_high": ratio.high,
        "seconds_bench": time.perf_counter() - started,
        "bench_host": socket.gethostname(),
        "bench_cpu": cpu_model(),
    }


def unpack(files: Mapping[str, bytes], root: Path) -> None:
    """Write files by their paths below a new folder."""
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
