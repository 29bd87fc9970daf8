"""Time several functions side by side, so that a busy machine slows them all alike. No torch."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field


@dataclass
class Samples:
    """Hold one function's samples, one per round: wall time and the process's CPU time (all threads)."""

    wall_ns: list[int] = field(default_factory=list)
    cpu_ns: list[int] = field(default_factory=list)


def interleaved(
    functions: Mapping[str, Callable[[], object]],
    *,
    min_rounds: int = 10,
    max_seconds: float = 5.0,
    warmup: int = 3,
    max_rounds: int = 1000,
) -> dict[str, Samples]:
    """Run every function once a round, until `max_seconds` are over but at least `min_rounds` times.

    The order is reversed every other round (A B, B A) and its start moves on every second one, so that
    no function always follows the same one. `warmup` rounds are not recorded.
    """
    names = list(functions)
    samples = {name: Samples() for name in names}
    for _ in range(warmup):
        for name in names:
            functions[name]()
    deadline = time.perf_counter() + max_seconds
    for index in range(max_rounds):
        if index >= min_rounds and time.perf_counter() >= deadline:
            break
        for name in round_order(names, index):
            cpu = time.process_time_ns()
            wall = time.perf_counter_ns()
            functions[name]()
            samples[name].wall_ns.append(time.perf_counter_ns() - wall)
            samples[name].cpu_ns.append(time.process_time_ns() - cpu)
    return samples


def round_order(names: list[str], index: int) -> list[str]:
    """Return the order of round `index`: rotated by pairs of rounds, reversed in every second one."""
    if not names:
        return []
    shift = (index // 2) % len(names)
    order = names[shift:] + names[:shift]
    return order[::-1] if index % 2 else order
