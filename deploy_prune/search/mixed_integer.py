"""Several limits at once: the multiple-choice knapsack as a mixed-integer program."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from ..costs import Limit
from ..errors import InfeasibleBudgetError
from .choices import Choices, fill, improve, spent

GAP = 1e-5  # relative, at which the solver may stop
TIME_LIMIT_S = 10.0  # after which the best plan so far is taken, with its gap


def solve_mixed_integer(choices: Sequence[Choices], limits: Sequence[Limit]) -> tuple[dict[str, int], float]:
    """Return one count per group, of the greatest total value within all limits, and the relative gap left.

    One binary variable per group and count. The linear relaxation's prices bound what a plan with a given
    option can be worth; options that cannot be in a plan better than the relaxation's rounding are left out,
    and HiGHS (through SciPy) solves the rest. Raises InfeasibleBudgetError when the limits cannot be met
    together.
    """
    from scipy.optimize import linprog

    room = np.array([x.room for x in limits])
    unit = np.maximum(np.abs(room), 1e-30)
    scale = max(float(np.abs(c.values).max()) for c in choices) or 1.0
    relaxed = linprog(**_program(choices, room, unit, scale), bounds=(0, 1), method="highs")
    if relaxed.x is None:
        raise _infeasible(limits)
    prices = -relaxed.ineqlin.marginals / unit
    bound = -float(relaxed.fun)
    short = [c.values / scale - prices @ c.costs for c in choices]
    short = [s.max() - s for s in short]
    rounded = _rounded(choices, _split(relaxed.x, choices), room)
    value = -np.inf if rounded is None else _worth(choices, rounded) / scale
    core = [np.flatnonzero(bound - s >= value - GAP * abs(value)) for s in short]
    few = [Choices(c.name, c.counts[k], c.values[k], c.costs[:, k]) for c, k in zip(choices, core, strict=True)]
    found = _integer(few, room, unit, scale)
    if found is not None:
        picked = [int(k[i]) for k, i in zip(core, found, strict=True)]
        if (spent(choices, picked) > room).any():  # by the solver's feasibility tolerance
            picked = _stepped_down(choices, picked, room) or []
        if picked and _worth(choices, picked) / scale > value:
            rounded, value = improve(choices, picked, room), _worth(choices, picked) / scale
    if rounded is None:
        raise _infeasible(limits)
    counts = {c.name: int(c.counts[k]) for c, k in zip(choices, rounded, strict=True)}
    gap = (bound - value) / max(abs(value), 1e-30)
    return fill(choices, counts, room - spent(choices, rounded)), max(gap, 0.0)


def _program(choices: Sequence[Choices], room: np.ndarray, unit: np.ndarray, scale: float) -> dict[str, Any]:
    """Return the linear program: one option per group, every limit kept, value maximised."""
    from scipy.sparse import coo_array

    sizes = [len(c.counts) for c in choices]
    total = sum(sizes)
    once = coo_array((np.ones(total), (np.repeat(np.arange(len(choices)), sizes), np.arange(total))))
    return {
        "c": -np.concatenate([c.values for c in choices]) / scale,
        "A_ub": np.concatenate([c.costs for c in choices], axis=1) / unit[:, None],
        "b_ub": room / unit,
        "A_eq": once,
        "b_eq": np.ones(len(choices)),
    }


def _integer(choices: Sequence[Choices], room: np.ndarray, unit: np.ndarray, scale: float) -> list[int] | None:
    from scipy.optimize import linprog

    total = sum(len(c.counts) for c in choices)
    with _quiet_stdout():
        solved = linprog(
            **_program(choices, room, unit, scale),
            bounds=(0, 1),
            integrality=np.ones(total),
            method="highs",
            options={"mip_rel_gap": GAP, "time_limit": TIME_LIMIT_S},
        )
    return None if solved.x is None else [int(np.argmax(x)) for x in _split(solved.x, choices)]


@contextmanager
def _quiet_stdout() -> Iterator[None]:
    """Hold back what HiGHS prints whatever its options say: a command with --json prints one document only."""
    sys.stdout.flush()
    kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)


def _split(x: np.ndarray, choices: Sequence[Choices]) -> list[np.ndarray]:
    return np.split(x, np.cumsum([len(c.counts) for c in choices])[:-1])


def _worth(choices: Sequence[Choices], picked: Sequence[int]) -> float:
    return sum(float(c.values[k]) for c, k in zip(choices, picked, strict=True))


def _rounded(choices: Sequence[Choices], parts: Sequence[np.ndarray], room: np.ndarray) -> list[int] | None:
    """Return a plan near the relaxation's: each group's heaviest option, stepped down, then improved."""
    picked = _stepped_down(choices, [int(np.argmax(p)) for p in parts], room)
    return None if picked is None else improve(choices, picked, room)


def _stepped_down(choices: Sequence[Choices], picked: Sequence[int], room: np.ndarray) -> list[int] | None:
    """Lower counts, least valuable first, until every limit is kept; None when that leads nowhere."""
    picked = list(picked)
    while (spent(choices, picked) > room).any():
        losses = [c.values[k] - c.values[k - 1] if k else np.inf for c, k in zip(choices, picked, strict=True)]
        least = int(np.argmin(losses))
        if losses[least] == np.inf:
            return None
        picked[least] -= 1
    return picked


def _infeasible(limits: Sequence[Limit]) -> InfeasibleBudgetError:
    shown = ", ".join(f"{x.table.kind} at most {x.most:,.6g} of {x.table.dense:,.6g}" for x in limits)
    return InfeasibleBudgetError(
        f"The limits cannot be met together: {shown}.",
        smallest=float("nan"),
        hint="Loosen one of them, or allow empty sub-layers with --min-heads 0 --min-neurons 0.",
    )
