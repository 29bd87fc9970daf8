"""Time several models in turns, so that a busy machine slows them all alike. No torch.

A *turn* is a few runs of one model in a row, long enough to be told from the clock's noise; a *round* is one
turn of every model. Rounds are what statistics resample: within a turn, runs resemble each other.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

Turn = Callable[[int], Sequence[list[int]]]  # runs -> ns of each by the wall, the processor, and the device if it tells

TURN_SECONDS = 0.03
MAX_RUNS_A_TURN = 200
SHORT_SECONDS = 0.1  # a model this fast is run once unrecorded at the start of its turn: others had the cache
STEADY = 0.05  # the medians of two turns in a row differ by less


@dataclass
class Samples:
    """Hold one model's rounds in ns: wall time, the processor time of its process (all threads), and the device's own
    time, which few runtimes tell.
    """

    wall_ns: list[list[int]] = field(default_factory=list)
    cpu_ns: list[list[int]] = field(default_factory=list)
    device_ns: list[list[int]] = field(default_factory=list)

    def add(self, wall: list[int], cpu: list[int], device: Sequence[int] = ()) -> None:
        """Add a round's turn."""
        self.wall_ns.append(wall)
        self.cpu_ns.append(cpu)
        if device:
            self.device_ns.append(list(device))

    def flat(self, clock: str = "wall") -> list[int]:
        """Return the runs of all rounds."""
        return [ns for turn in getattr(self, f"{clock}_ns") for ns in turn]

    def rounds(self, clock: str = "wall") -> list[float]:
        """Return each round's median, in ns."""
        return [median(turn) for turn in getattr(self, f"{clock}_ns")]


def take_turns(
    turns: Mapping[str, Turn],
    *,
    min_rounds: int = 10,
    max_seconds: float = 5.0,
    warmup_seconds: float = 3.0,
    max_rounds: int = 1000,
) -> dict[str, Samples]:
    """Give every model a turn a round, until `max_seconds` are over but at least `min_rounds` times.

    Before, each model runs until two turns in a row are alike, `warmup_seconds` in all at most. The order is
    reversed every other round (A B, B A) and its start moves on every second one, so that no model always
    follows the same one.
    """
    names = list(turns)
    each = {name: warm_up(turns[name], warmup_seconds / len(names)) for name in names}
    samples = {name: Samples() for name in names}
    deadline = time.perf_counter() + max_seconds
    for index in range(max_rounds):
        if index >= min_rounds and time.perf_counter() >= deadline:
            break
        for name in round_order(names, index):
            samples[name].add(*each[name].take(turns[name]))
    return samples


@dataclass(frozen=True)
class Length:
    """Say how many runs a turn has, and how many unrecorded ones come first."""

    runs: int
    unrecorded: int

    def take(self, turn: Turn) -> list[list[int]]:
        return [ns[self.unrecorded :] for ns in turn(self.unrecorded + self.runs)]


def warm_up(turn: Turn, max_seconds: float) -> Length:
    """Run a model until it is steady, or the time is over, and return how long its turns shall be."""
    begun = time.perf_counter()
    first = turn(1)[0][0]
    last = turn_length(first).take(turn)[0]
    while True:
        length = turn_length(median(last))
        now = length.take(turn)[0]
        if abs(median(now) / median(last) - 1) < STEADY or time.perf_counter() - begun > max_seconds:
            return length
        last = now


def turn_length(run_ns: float) -> Length:
    """Return the length of a turn of runs that take `run_ns` each."""
    runs = min(max(math.ceil(TURN_SECONDS * 1e9 / max(run_ns, 1.0)), 1), MAX_RUNS_A_TURN)
    return Length(runs, unrecorded=1 if run_ns < SHORT_SECONDS * 1e9 else 0)


def round_order(names: list[str], index: int) -> list[str]:
    """Return the order of round `index`: rotated by pairs of rounds, reversed in every second one."""
    if not names:
        return []
    shift = (index // 2) % len(names)
    order = names[shift:] + names[:shift]
    return order[::-1] if index % 2 else order
