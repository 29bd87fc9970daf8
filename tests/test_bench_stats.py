"""Statistics, the order of rounds, and the processes that measure."""

from __future__ import annotations

import json
import os
import platform
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from deploy_prune.errors import InputError
from deploy_prune.runtime_bench import sensors
from deploy_prune.runtime_bench.isolate import Worker, WorkerError
from deploy_prune.runtime_bench.machine import busy_processes, describe_machine
from deploy_prune.runtime_bench.memory import peak_rss_bytes, rss_bytes
from deploy_prune.runtime_bench.stats import noise_floor, ratio_of_medians, summarise_ms, tell_difference
from deploy_prune.runtime_bench.timing import Length, round_order, take_turns, turn_length, warm_up


def test_summary_is_in_milliseconds() -> None:
    summary = summarise_ms([int(i * 1e6) for i in range(101)])
    spread = {"p05": 5.0, "p90": 90.0, "p95": 95.0, "p99": 99.0, "min": 0.0, "max": 100.0}
    assert summary == {"median": 50.0, "mean": 50.0} | spread
    with pytest.raises(InputError, match="No samples"):
        summarise_ms([])


def test_interval_of_a_ratio_covers_the_truth_and_is_seeded() -> None:
    rng = np.random.default_rng(0)
    covered, widths = 0, []
    for _ in range(40):
        dense = rng.lognormal(0.0, 0.2, 60)
        sliced = 0.5 * rng.lognormal(0.0, 0.2, 60)
        ratio = ratio_of_medians(list(sliced), list(dense))
        assert ratio.low <= ratio.value <= ratio.high
        covered += ratio.low <= 0.5 <= ratio.high
        widths.append(ratio.high - ratio.low)
    assert covered >= 33  # of 40 at 95%: fewer has a chance below 1 in 10,000
    assert 0.01 < np.mean(widths) < 0.3
    assert ratio_of_medians(list(sliced), list(dense)) == ratio


def test_pairing_cancels_what_slows_a_whole_round() -> None:
    rng = np.random.default_rng(1)
    load = rng.lognormal(0.0, 1.0, 80)
    dense, sliced = load, load * 0.7 * rng.lognormal(0.0, 0.01, 80)
    paired = ratio_of_medians(list(sliced), list(dense))
    shuffled = ratio_of_medians(list(rng.permutation(sliced)), list(dense))
    assert paired.high - paired.low < 0.2 * (shuffled.high - shuffled.low)


@pytest.mark.parametrize(("a", "b"), [([1.0], [1.0]), ([1.0, 2.0], [1.0])])
def test_a_ratio_needs_pairs(a: list[float], b: list[float]) -> None:
    with pytest.raises(InputError, match="at least 2 pairs"):
        ratio_of_medians(a, b)


def test_rounds_are_complete_and_fair() -> None:
    names = ["dense", "virtual", "sliced"]
    orders = [round_order(names, i) for i in range(6)]
    assert all(sorted(order) == sorted(names) for order in orders)
    assert orders[1] == orders[0][::-1]
    places = Counter((name, place) for order in orders for place, name in enumerate(order))
    assert set(places.values()) == {2}  # each is first, second and last equally often
    assert round_order([], 3) == []


class Clockwork:
    """A model whose runs take as long as it is told, without taking the time."""

    def __init__(self, *run_ms: float) -> None:
        self.run_ms = list(run_ms)
        self.turns: list[int] = []

    def __call__(self, runs: int) -> tuple[list[int], list[int]]:
        self.turns.append(runs)
        ms = self.run_ms.pop(0) if len(self.run_ms) > 1 else self.run_ms[0]
        return [round(1e6 * ms)] * runs, [round(2e6 * ms)] * runs


def test_each_model_has_one_turn_a_round() -> None:
    models = {name: Clockwork(10.0) for name in "abc"}
    samples = take_turns(models, min_rounds=4, max_seconds=1e-9)
    for name, found in samples.items():
        assert found.wall_ns == [[10_000_000] * 3] * 4  # 30 ms a turn, the unrecorded run left out
        assert found.flat("cpu") == [20_000_000] * 12
        assert found.rounds() == [10_000_000] * 4
        assert models[name].turns == [1, 4, 4] + [4] * 4  # one to see how long it takes, two alike
    assert len(take_turns({"a": Clockwork(10.0)}, max_seconds=60.0, max_rounds=7)["a"].wall_ns) == 7


def test_warm_up_ends_when_two_turns_are_alike_or_the_time_is_over() -> None:
    slow_start = Clockwork(40.0, 20.0, 12.0, 10.0, 10.1)
    length = warm_up(slow_start, 60.0)
    assert (length.runs, length.unrecorded, len(slow_start.turns)) == (3, 1, 5)
    assert len(slow_start.run_ms) == 1
    restless = Clockwork(*(2.0**i for i in range(50)))
    warm_up(restless, 0.0)
    assert len(restless.turns) == 3


@pytest.mark.parametrize(("run_ms", "runs", "unrecorded"), [(0.01, 200, 1), (1.0, 30, 1), (99.0, 1, 1), (500.0, 1, 0)])
def test_turns_are_long_enough_to_be_told_from_noise(run_ms: float, runs: int, unrecorded: int) -> None:
    assert turn_length(1e6 * run_ms) == Length(runs, unrecorded)


STATS = "deploy_prune.runtime_bench.stats"


def test_a_worker_holds_its_object_in_another_process() -> None:
    with Worker("collections:Counter", {"a": 2}) as worker:
        assert worker.pid != os.getpid()
        assert worker.call("total") == 2
        worker.call("update", b=3)
        assert worker.call("total") == 5
    worker.close()


def test_what_a_worker_prints_does_not_disturb_its_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = (
        "import os\nprint('import')\nclass Loud:\n def say(self):\n  print('hello'); os.system('echo hi'); return 7\n"
    )
    (tmp_path / "loud.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    with Worker("loud:Loud", {}) as worker:
        assert worker.call("say") == 7


def test_a_workers_error_carries_its_message_and_traceback_and_does_not_end_it() -> None:
    with Worker(f"{STATS}:Ratio", {"value": 1.0, "low": 0.9, "high": 1.1}) as worker:
        with pytest.raises(WorkerError, match="no attribute 'nothing'") as caught:
            worker.call("nothing")
        assert (caught.value.kind, caught.value.exit_code) == ("AttributeError", 4)
        assert "worker.py" in caught.value.traceback
        assert worker.call("to_dict")["low"] == 0.9
    with Worker(f"{STATS}:summarise_ms", {"samples_ns": []}) as worker, pytest.raises(WorkerError, match="No samples"):
        worker.ready()


def test_a_worker_that_dies_or_hangs_is_an_error() -> None:
    with Worker("os:_exit", {"status": 3}) as worker, pytest.raises(WorkerError, match="exit code 3"):
        worker.ready()
    with Worker("os:abort", {}) as worker:
        for _ in range(2):  # asking again gives the same answer, not a wait without end
            with pytest.raises(WorkerError, match="SIGABRT") as caught:
                worker.call("anything")
        assert caught.value.kind == "Died"
    with (
        Worker("subprocess:check_call", {"args": ["sleep", "30"]}, timeout_seconds=1.0) as worker,
        pytest.raises(WorkerError, match="did not end within 1 s"),
    ):
        worker.ready()


def test_peak_memory_is_this_process_alone() -> None:
    ballast = np.ones(50_000_000)  # 400 MB that the child must not be charged with
    assert peak_rss_bytes() > ballast.nbytes
    code = "import sys; from deploy_prune.runtime_bench.memory import forget_peak, peak_rss_bytes, rss_bytes\n"
    code += "block = bytearray(200_000_000); del block; print(peak_rss_bytes() - rss_bytes() > 150_000_000)\n"
    code += "print(peak_rss_bytes() < 300_000_000, forget_peak(), peak_rss_bytes() < 100_000_000)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True"] * 4 if sys.platform == "linux" else done.stdout.startswith("True")
    assert rss_bytes() > 0


class PartlyDumb:
    """A driver of a GPU that tells its name and memory, and not its power or processes, as virtual ones do."""

    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = 1, 2, 0

    class NVMLError(Exception):
        pass

    def __getattr__(self, name: str) -> Any:
        def answer(*_: Any) -> Any:
            if name in ("nvmlDeviceGetPowerManagementLimit", "nvmlDeviceGetComputeRunningProcesses"):
                raise self.NVMLError("Not Supported")
            return SimpleNamespace(total=8 << 30) if name == "nvmlDeviceGetMemoryInfo" else 1

        return answer


def test_what_a_gpu_does_not_tell_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sensors, "_nvml", PartlyDumb)
    (gpu,) = sensors.describe_gpus()
    assert (gpu["memory_bytes"], gpu["power_limit_w"], gpu["sm_clock_mhz"]) == (8 << 30, None, 1)
    assert sensors.gpu_memory_bytes(1) is None
    assert sensors.gpu_energy_mj() == 1


def test_energy_counters_wrap_around(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    zone, platform_zone = tmp_path / "intel-rapl:0", tmp_path / "intel-rapl:1"
    for folder, name in ((zone, "package-0"), (platform_zone, "psys")):  # psys holds the package: it once counted twice
        folder.mkdir()
        (folder / "name").write_text(f"{name}\n")
        (folder / "energy_uj").write_text("900")
        (folder / "max_energy_range_uj").write_text("1000")
    monkeypatch.setattr(sensors, "_RAPL", tmp_path)
    before = sensors.cpu_energy_uj()
    assert before == {"intel-rapl:0": 900}
    (zone / "energy_uj").write_text("100")
    assert sensors.energy_between(before, sensors.cpu_energy_uj()) == pytest.approx(200e-6)
    (zone / "energy_uj").unlink()
    assert sensors.cpu_energy_uj() is None  # a container hides it
    assert sensors.energy_between(before, None) is None


def test_a_difference_lies_beyond_the_noise() -> None:
    floor = noise_floor({"value": 1.01, "low": 0.98, "high": 1.03})
    assert floor == pytest.approx(0.03)
    for low, high, expected in ((0.9, 0.96, "faster"), (0.9, 0.98, "none"), (1.02, 1.2, "none"), (1.04, 1.2, "slower")):
        assert tell_difference({"low": low, "high": high}, floor) == expected
    assert tell_difference({"low": 0.9, "high": 0.99}, None) == "faster"
    assert noise_floor({"low": 1.01, "high": 1.02}) == pytest.approx(0.02)


def test_the_machine_is_described() -> None:
    machine = describe_machine(1)
    assert machine["threads"] == 1
    assert json.loads(json.dumps(machine)) == machine
    if "x86" in platform.machine():
        assert "fma" in machine["cpu_flags"]


@pytest.mark.skipif(sys.platform == "win32", reason="forks")
def test_foreign_processes_are_told_from_our_own() -> None:
    fork = "import os\nif pid := os.fork(): print(pid)\nelse:\n os.closerange(0, 9)\n while True: pass"
    orphan = int(subprocess.run([sys.executable, "-c", fork], capture_output=True, text=True, check=True).stdout)
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as own:
        try:
            found = {entry["pid"]: entry for entry in busy_processes()}
        finally:
            own.kill()
            os.kill(orphan, signal.SIGKILL)
    assert own.pid not in found
    assert "python" in found[orphan]["name"]
    assert found[orphan]["percent"] > 5
