"""Compare an exported file with the model it was made from, at shapes and paddings it was not traced at."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from ..bundle import GoldenCase, Parity
from ..errors import VerdictError
from ..runtimes import Runner

# Largest difference allowed, as a share of the largest expected output (1 at least; in fp32 FP32_SCALE at least, below
# which rounding is far smaller than the tolerance).
TOLERANCE = {"fp32": 1e-5, "fp16": 2e-2, "bf16": 1e-1, "int8": 0.5}
FP32_SCALE = 10.0
_PER_TOKEN = ("token", "qa")  # heads whose outputs are (B, T, ...)


def check_parity(
    runner: Runner,
    cases: Sequence[GoldenCase],
    variant: str,
    *,
    head: str,
    precision: str = "fp32",
) -> Parity:
    """Run every golden case in an open runner and compare with the stored outputs of `variant`.

    Outputs per token are compared where attention_mask is 1. Raises VerdictError, with the shape of
    the case and the difference, when one is not within the precision's tolerance.
    """
    worst = 0.0
    same: list[bool] = []
    compared = [case for case in cases if variant in case.outputs]
    for case in compared:
        got = runner.infer({name: case.inputs[name] for name in runner.input_names})
        shape = next(iter(case.inputs.values())).shape
        axes = "batch x sequence" if len(shape) == 2 else "batch x C x H x W"
        where = f"the exported {variant} model at {axes} {shape}"
        for name, expected in case.outputs[variant].items():
            if name not in got or got[name].shape != expected.shape:
                found = got[name].shape if name in got else "nothing"
                raise VerdictError(
                    f"Output {name} of {where} is {found}, expected {expected.shape}.",
                    hint="The export is wrong at shapes it was not traced at; nothing was stored.",
                )
            made, wanted = got[name].astype(np.float64), expected.astype(np.float64)
            real = case.inputs.get("attention_mask", np.ones(shape[:1])).astype(bool)
            same += list(_decisions(made, real, head) == _decisions(wanted, real, head))
            if head in _PER_TOKEN:
                made, wanted = made[real], wanted[real]
            least = FP32_SCALE if precision == "fp32" else 1.0
            tolerance = TOLERANCE[precision] * max(least, float(np.abs(wanted).max(initial=0.0)))
            max_abs = float(np.abs(made - wanted).max(initial=0.0))
            if not max_abs <= tolerance:  # NaN fails too
                raise VerdictError(
                    f"Output {name} of {where} is off by {max_abs:.3g} (allowed {tolerance:g}).",
                    hint="The export does not compute what the model computes; nothing was stored.",
                )
            worst = max(worst, max_abs)
    if not compared:
        return Parity(status="not_run", reason=f"the bundle holds no golden outputs of the {variant} model")
    return Parity(status="passed", max_abs=worst, agreement=float(np.mean(same)) if same else None)


def golden_within(
    cases: Sequence[GoldenCase], shape: tuple[int, int] | None, variant: str, reference: Callable[[], Runner]
) -> list[GoldenCase]:
    """Return the golden cases; where some are longer than a fixed shape, all are cut to it and computed anew."""
    if shape is None or all(c.inputs["input_ids"].shape[1] <= shape[1] for c in cases if "input_ids" in c.inputs):
        return list(cases)
    cut = [{name: array[:, : shape[1]] for name, array in c.inputs.items()} for c in cases]
    with reference() as runner:
        return [GoldenCase(inputs, {variant: runner.infer(inputs)}) for inputs in cut]


def _decisions(outputs: np.ndarray, real: np.ndarray, head: str) -> np.ndarray:
    """Return what a user would read off: the class of a row or token, the place of a span's end; else nothing."""
    if head == "classification":
        return outputs.argmax(-1)
    if head == "token":
        return outputs[real].argmax(-1)
    if head == "qa":
        return np.where(real, outputs, -np.inf).argmax(-1)
    return np.empty(0)
