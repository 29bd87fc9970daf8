"""Run a model as MLPerf does, by its own load generator: single stream, offline, or a server with Poisson arrivals.

A sample is one run of the cell's inputs; latencies count from the moment that a sample was due.
"""

from __future__ import annotations

import json
import queue
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..errors import InputError, MissingExtraError

SCENARIOS = {"single-stream": "SingleStream", "offline": "Offline", "server": "Server"}
OFFLINE_MARGIN = 1.5
SERVER_LOAD = 0.7  # arrivals per second times the latency of one
SERVER_LATENCY = 5.0  # times the latency of one: what 99 % of the answers must keep
_MARK = ":::MLLOG"
_SAMPLES = 16  # that the generator draws from; all hold the same inputs


def run_scenario(name: str, infer: Callable[[], object], seconds: float) -> dict[str, Any]:
    """Run a scenario for at least so many seconds and return what the load generator says of it.

    {"valid", "samples_per_second", "latency_ms": {"mean", "p50", "p90", "p99"}}; for the server also
    {"target_per_second", "limit_ms", "limit_kept"}: arrivals at 0.7 of what one stream could do, and five times the
    latency of one for 99 % of them. `valid` asks for more: enough samples to be sure of it. Raises InputError for
    an unknown scenario, MissingExtraError without the generator.
    """
    check_scenarios([name])
    import mlperf_loadgen as loadgen

    latency = _latency_seconds(infer)
    settings = loadgen.TestSettings()
    settings.scenario = getattr(loadgen.TestScenario, SCENARIOS[name])
    settings.mode = loadgen.TestMode.PerformanceOnly
    settings.min_duration_ms = int(1000 * seconds)
    settings.min_query_count = 1
    settings.single_stream_expected_latency_ns = int(1e9 * latency)
    settings.offline_expected_qps = OFFLINE_MARGIN / latency  # else a faster moment ends before its time
    settings.server_target_qps = SERVER_LOAD / latency
    settings.server_target_latency_ns = int(1e9 * SERVER_LATENCY * latency)
    settings.server_target_latency_percentile = 0.99
    with tempfile.TemporaryDirectory(prefix="deploy-prune-loadgen-") as folder:
        logs = loadgen.LogSettings()
        logs.log_output = loadgen.LogOutputSettings()
        logs.log_output.outdir = folder
        logs.log_output.copy_summary_to_stdout = False
        server = _Server(infer, loadgen)
        sut = loadgen.ConstructSUT(server.take, lambda: None)
        library = loadgen.ConstructQSL(_SAMPLES, _SAMPLES, lambda samples: None, lambda samples: None)
        try:
            loadgen.StartTestWithLogSettings(sut, library, settings, logs)
        finally:
            server.stop()
            loadgen.DestroyQSL(library)
            loadgen.DestroySUT(sut)
        found = _read(Path(folder) / "mlperf_log_detail.txt", name)
    if server.error is not None:
        raise server.error
    if name == "server":
        limit_ms = 1000 * SERVER_LATENCY * latency
        found |= {"target_per_second": SERVER_LOAD / latency, "limit_ms": limit_ms}
        found |= {"limit_kept": found["latency_ms"]["p99"] <= limit_ms}
    return found


def check_scenarios(names: Sequence[str]) -> None:
    """Raise InputError for an unknown scenario, MissingExtraError without the load generator."""
    for name in names:
        if name not in SCENARIOS:
            raise InputError(f"No scenario '{name}'.", hint=f"There are: {', '.join(SCENARIOS)}.")
    if find_spec("mlperf_loadgen") is None:
        raise MissingExtraError("mlcommons-loadgen", "loadgen")


class _Server:
    """Answer samples one after another in a thread of its own, so that arrivals never wait for an answer."""

    def __init__(self, infer: Callable[[], object], loadgen: Any) -> None:
        self.infer, self.loadgen = infer, loadgen
        self.error: Exception | None = None
        self.waiting: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self.thread = threading.Thread(target=self._answer, daemon=True)
        self.thread.start()

    def take(self, samples: Sequence[Any]) -> None:
        for sample in samples:
            self.waiting.put(sample.id)

    def stop(self) -> None:
        self.waiting.put(None)
        self.thread.join()

    def _answer(self) -> None:
        while (identity := self.waiting.get()) is not None:
            try:
                if self.error is None:
                    self.infer()
            except Exception as error:  # the generator waits for an answer all the same
                self.error = error
            self.loadgen.QuerySamplesComplete([self.loadgen.QuerySampleResponse(identity, 0, 0)])


def _latency_seconds(infer: Callable[[], object]) -> float:
    infer()
    begun, runs = time.perf_counter(), 0
    while runs < 5 or time.perf_counter() - begun < 0.2:
        infer()
        runs += 1
    return (time.perf_counter() - begun) / runs


def _read(log: Path, name: str) -> dict[str, Any]:
    """Read the results from the generator's detailed log, a line of JSON each."""
    values: dict[str, Any] = {}
    for line in log.read_text("utf-8").splitlines():
        if line.startswith(_MARK):
            entry = json.loads(line[len(_MARK) :])
            values[entry["key"]] = entry["value"]
    rate = {"offline": "result_samples_per_second", "server": "result_completed_samples_per_sec"}.get(name)
    mean_ns = values["result_mean_latency_ns"]
    percentiles = {f"p{p}": values[f"result_{p}.00_percentile_latency_ns"] / 1e6 for p in (50, 90, 99)}
    return {
        "valid": values["result_validity"] == "VALID",
        "samples_per_second": values[rate] if rate else 1e9 / mean_ns,
        "latency_ms": {"mean": mean_ns / 1e6, **percentiles},
    }
