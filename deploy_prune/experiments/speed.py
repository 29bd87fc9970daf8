"""Experiments on how fast pruned models run, and how fast they are made; each yields a row per cell."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..costs import Budget
from ..depth import Depth
from ..errors import InfeasibleBudgetError
from ..finetune import Learner, Recipe
from ..stages import Options
from .lab import Lab, with_keeps
from .methods import DEFAULT, PAPER

Rows = Iterator[dict[str, Any]]
CLOSE, ADJUSTMENTS, SMALLEST = 0.02, 4, 0.1


def structure(lab: Lab) -> Rows:
    """Heads only, neurons only, both, or whole sub-layers: quality and latency at equal FLOPs."""
    for seed, keep in product(lab.setting.seeds, with_keeps(lab.setting.keeps, (0.8, 0.6))):
        groups = lab.pruner(seed).groups
        heads, neurons = (max(g.size for g in groups if g.kind == kind) for kind in ("head", "neuron"))
        widest = int(np.lcm.reduce([g.size * g.width for g in groups]))
        ways = {
            "heads only": Options(min_neurons=neurons, min_heads=0),
            "neurons only": Options(min_heads=heads, min_neurons=0),
            "heads and neurons": DEFAULT,
            "whole sub-layers": Options(min_heads=0, min_neurons=0, align=widest),
        }
        yield from _side_by_side(lab, keep, seed, ways)


def _side_by_side(lab: Lab, keep: float, seed: int, ways: dict[str, Options]) -> Rows:
    """Prune to one budget in several ways and time what they give in turns."""
    rows: list[dict[str, Any]] = []
    models = {}
    for way, options in ways.items():
        try:
            found, sliced = lab.prune(keep, seed, options)
        except InfeasibleBudgetError as error:
            rows.append({"keep": keep, "seed": seed, "method": way, "infeasible_below": error.smallest})
            continue
        rows.append({"keep": keep, "seed": seed, "method": way, **lab.compare(sliced), **lab.describe(found)})
        models[way] = sliced
    timed = lab.latency(models)
    for row in rows:
        yield row | _timed(timed, row["method"])


def depth(lab: Lab) -> Rows:
    """Layers or sub-layers left out before the widths are cut to the same share of FLOPs: quality and latency."""
    for seed, keep in product(lab.setting.seeds, with_keeps(lab.setting.keeps, (0.7, 0.5))):
        groups = lab.pruner(seed).groups
        layers = 1 + max(g.layer for g in groups)
        ways = {"widths alone": Depth()}
        ways |= {f"{n} of {len(groups)} sub-layers": Depth(sublayers=n) for n in _few(len(groups))}
        ways |= {f"{n} of {layers} layers": Depth(layers=n) for n in _few(layers)}
        options = {way: replace(DEFAULT, depth=gone) for way, gone in ways.items()}
        yield from _side_by_side(lab, keep, seed, options)


def _few(there: int) -> list[int]:
    """Return about an eighth and a quarter of a number, and at least 1."""
    return sorted({max(1, round(there / 8)), max(1, round(there / 4))})


def latency(lab: Lab) -> Rows:
    """Quality over measured latency: the paper's three stages and the default, all models side by side.

    With a latency table also the default search for the least latency: at each budget, for the latency that the
    table predicts for the default plan.
    """
    seed = lab.setting.seeds[0]
    rows, models = [], {}
    for keep in with_keeps(lab.setting.keeps, (0.8, 0.7, 0.6, 0.5, 0.4, 0.3)):
        for method, options in {"paper": PAPER, "default": DEFAULT}.items():
            found, sliced = lab.prune(keep, seed, options)
            name = f"{method} {keep:g}"
            rows.append({"keep": keep, "seed": seed, "method": method, **lab.compare(sliced), **lab.describe(found)})
            models[name] = sliced
        if lab.setting.lut:
            share = lab.predicted(found)
            aware, sliced = lab.prune(Budget(keep_latency=share, lut=lab.lut), seed, DEFAULT)
            same = {"keep": keep, "seed": seed, "method": "latency-aware"}
            rows.append(same | lab.compare(sliced) | lab.describe(aware))
            models[f"latency-aware {keep:g}"] = sliced
    timed = lab.latency(models)
    for row in rows:
        yield row | _timed(timed, f"{row['method']} {row['keep']:g}")


def prediction(lab: Lab) -> Rows:
    """Latency by the table against latency measured, for plans of random units under latency budgets."""
    plans, models = {}, {}
    options = Options(criterion="random", compensate="none", rearrange="none")
    for seed, keep in product(lab.setting.seeds, with_keeps(lab.setting.keeps, (0.8, 0.7, 0.6, 0.5, 0.4))):
        budget = Budget(keep_latency=keep, lut=lab.lut)
        plans[keep, seed], models[f"{keep:g} {seed}"] = lab.prune(budget, seed, replace(options, seed=seed))
    timed = lab.latency(models)
    for (keep, seed), found in plans.items():
        row = {"keep": keep, "seed": seed, "predicted": lab.predicted(found)} | _timed(timed, f"{keep:g} {seed}")
        yield row | {"relative_error": row["predicted"] / row["ratio_to_dense"] - 1}


def unstructured(lab: Lab) -> Rows:
    """A control: zero weights by magnitude and run the dense model; nothing gets faster."""
    models: dict[str, torch.nn.Module] = {}
    rows: list[dict[str, Any]] = []
    groups = lab.pruner(lab.setting.seeds[0]).groups
    for keep in with_keeps(lab.setting.keeps, (0.8, 0.6, 0.5)):
        model = copy.deepcopy(lab.model)
        paths = sorted({p for g in groups for p in (*g.producers, g.consumer)})
        weights = [model.get_parameter(f"{p}.weight") for p in paths]
        magnitudes = torch.cat([w.detach().abs().flatten() for w in weights])
        threshold = magnitudes.kthvalue(max(1, round((1 - keep) * magnitudes.numel()))).values
        with torch.no_grad():
            for w in weights:
                w.mul_(w.abs() > threshold)
        name = f"unstructured {keep:g}"
        rows.append({"keep": keep, "method": name, **lab.compare(model)})
        lab_model, lab.model = lab.model, model
        models[name] = lab.whole()
        lab.model = lab_model
    timed = lab.latency(models)
    for row in rows:
        yield row | _timed(timed, row["method"])


def rival(lab: Lab) -> Rows:
    """The pruned model beside another dense one at the latency of that one.

    The share of FLOPs is adjusted until the measured latencies differ by less than CLOSE, ADJUSTMENTS times at most.
    """
    other = lab.rival
    outputs = other.compare(other.model)
    for seed in lab.setting.seeds:
        known = [(1.0, 1.0)]  # share of FLOPs kept and latency to dense, measured
        keep = float(with_keeps(lab.setting.keeps, (0.5,))[0])
        for _ in range(ADJUSTMENTS):
            try:
                found, sliced = lab.prune(keep, seed, DEFAULT)
            except InfeasibleBudgetError as error:  # the least that can be kept is the nearest
                keep = error.smallest
                found, sliced = lab.prune(keep, seed, DEFAULT)
            timed = lab.side_by_side({"rival": other.candidate(other.whole()), "pruned": lab.candidate(sliced)})
            target, reached = timed["rival"][1].value, timed["pruned"][1].value
            if abs(reached / target - 1) < CLOSE:
                break
            known = [*known, (keep, reached)]
            slope = (known[-2][1] - reached) / (known[-2][0] - keep) if known[-2][0] != keep else 1.0
            keep = min(1.0, max(SMALLEST, keep + (target - reached) / max(slope, SMALLEST)))
        yield {"seed": seed, "method": Path(lab.setting.rival or "").name, "value": outputs["value"]} | _timed(
            timed, "rival"
        )
        row = {"seed": seed, "method": "pruned", **lab.compare(sliced), **lab.describe(found)}
        yield row | _timed(timed, "pruned")


def seconds(lab: Lab) -> Rows:
    """What pruning takes, stage by stage, the paper's three stages and the default, beside an epoch of fine-tuning."""
    for seed, keep in product(lab.setting.seeds, with_keeps(lab.setting.keeps, (0.5,))):
        for method, options in {"paper": PAPER, "default": DEFAULT}.items():
            lab._pruner = None
            found, _ = lab.prune(keep, seed, options)
            stages = {s["name"]: s["seconds"] for s in found.stages}
            yield {"keep": keep, "seed": seed, "method": method, **stages, "total": sum(stages.values())}
    train = lab.data.train
    rows = train.encode(range(len(train)))
    learner = Learner(copy.deepcopy(lab.model), lab.processor, lab.head.kind)
    started = time.perf_counter()
    learner.train(rows, Recipe(epochs=1, batch_size=32, learning_rate=2e-5))
    total = time.perf_counter() - started
    yield {"keep": 1.0, "seed": 0, "method": f"an epoch of fine-tuning, {len(rows)} rows", "total": total}


def _timed(timed: dict[str, Any], name: str) -> dict[str, Any]:
    if name not in timed:
        return {}
    median_ms, ratio = timed[name]
    return {"median_ms": median_ms, "ratio_to_dense": ratio.value, "ratio_low": ratio.low, "ratio_high": ratio.high}
