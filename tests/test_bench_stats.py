"""Statistics, the order of rounds, and the processes that measure."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest

from deploy_prune.errors import InputError
from deploy_prune.runtime_bench.isolate import WorkerError, run_isolated
from deploy_prune.runtime_bench.memory import peak_rss_bytes, rss_bytes
from deploy_prune.runtime_bench.stats import ratio_of_medians, summarise_ms
from deploy_prune.runtime_bench.timing import interleaved, round_order


def test_summary_is_in_milliseconds() -> None:
    summary = summarise_ms([int(i * 1e6) for i in range(101)])
    assert summary == {"median": 50.0, "mean": 50.0, "p05": 5.0, "p95": 95.0, "min": 0.0, "max": 100.0}
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


def test_interleaved_runs_each_function_once_a_round() -> None:
    calls: list[str] = []
    functions = {name: (lambda name=name: calls.append(name)) for name in "abc"}
    samples = interleaved(functions, min_rounds=4, max_seconds=0.0, warmup=2)
    assert {name: (len(s.wall_ns), len(s.cpu_ns)) for name, s in samples.items()} == dict.fromkeys("abc", (4, 4))
    assert "".join(calls) == "abc" * 2 + "abc" + "cba" + "bca" + "acb"
    assert all(ns >= 0 for s in samples.values() for ns in s.wall_ns + s.cpu_ns)
    assert len(interleaved(functions, max_seconds=60.0, max_rounds=7)["a"].wall_ns) == 7


def test_isolated_function_returns_its_result_from_another_process() -> None:
    assert run_isolated("os:getpid", {}) != os.getpid()
    result = run_isolated("deploy_prune.runtime_bench.stats:summarise_ms", {"samples_ns": [1_000_000]})
    assert result["median"] == 1.0


def test_isolated_error_carries_its_message_and_traceback() -> None:
    with pytest.raises(WorkerError, match="No samples to summarise") as caught:
        run_isolated("deploy_prune.runtime_bench.stats:summarise_ms", {"samples_ns": []})
    assert caught.value.kind == "InputError"
    assert "in summarise_ms" in caught.value.traceback
    assert caught.value.exit_code == 4


def test_a_process_that_dies_or_hangs_is_an_error() -> None:
    with pytest.raises(WorkerError, match="exit code 3"):
        run_isolated("os:_exit", {"status": 3})
    with pytest.raises(WorkerError, match="SIGABRT") as caught:
        run_isolated("os:abort", {})
    assert caught.value.kind == "Died"
    with pytest.raises(WorkerError, match="did not end within"):
        run_isolated("subprocess:check_call", {"args": ["sleep", "30"]}, timeout_seconds=1.0)


def test_peak_memory_is_this_process_alone() -> None:
    ballast = np.ones(50_000_000)  # 400 MB that the child must not be charged with
    assert peak_rss_bytes() > ballast.nbytes
    assert 0 < run_isolated("deploy_prune.runtime_bench.memory:peak_rss_bytes", {}) < 100_000_000
    code = "import sys; from deploy_prune.runtime_bench.memory import peak_rss_bytes, rss_bytes\n"
    code += "block = bytearray(200_000_000); del block; print(peak_rss_bytes() - rss_bytes() > 150_000_000)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True"
    assert rss_bytes() > 0
