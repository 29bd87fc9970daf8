"""The experiments: each yields rows, one per measured cell."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np
import torch

from ..costs import Budget, encoder_flops
from ..criteria import criteria
from ..errors import InfeasibleBudgetError
from ..fidelity import fidelity
from ..masking import mask_model
from ..predict import predict
from ..runtime_bench.flops import count_torch
from ..stages import Options
from .lab import Lab, with_keeps
from .methods import DEFAULT, PAPER, STAGES

Rows = Iterator[dict[str, Any]]
QUALITY = ("value", "agreement", "kl", "rmse")


@dataclass(frozen=True)
class Experiment:
    """Name what is measured, the columns that tell cells apart, and those whose means are shown.

    `figure` names x, y and the column with a line for each value.
    """

    title: str
    run: Callable[[Lab], Rows]
    by: tuple[str, ...]
    columns: tuple[str, ...]
    figure: tuple[str, str, str] | None = None


def _pruned(lab: Lab, keep: float, seed: int, options: Options, **more: Any) -> dict[str, Any]:
    found, sliced = lab.prune(keep, seed, options)
    return {"keep": keep, "seed": seed, **more, **lab.compare(sliced), **lab.describe(found)}


def tradeoff(lab: Lab) -> Rows:
    """Quality over the share of FLOPs kept: the paper's three stages and the default."""
    keeps = with_keeps(lab.setting.keeps, (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3))
    for seed, keep in product(lab.setting.seeds, keeps):
        for method, options in {"paper": PAPER, "default": DEFAULT}.items():
            yield _pruned(lab, keep, seed, options, method=method)


def ablation(lab: Lab) -> Rows:
    """What each stage adds."""
    for seed, keep in product(lab.setting.seeds, with_keeps(lab.setting.keeps, (0.6,))):
        for method, options in STAGES.items():
            yield _pruned(lab, keep, seed, options, method=method)


def parity(lab: Lab) -> Rows:
    """Virtual against sliced: the same quality on every row."""
    for seed, keep in product(lab.setting.seeds, with_keeps(lab.setting.keeps, (0.9, 0.8, 0.7, 0.6, 0.5))):
        for method, options in {"paper": PAPER, "default": DEFAULT}.items():
            found, sliced = lab.prune(keep, seed, options)
            virtual = mask_model(lab.model, found.groups, found.plan, found.updates)
            outputs = [predict(m, lab.head, lab.rows, pad_id=lab.pad_id) for m in (virtual, sliced)]
            scores = [lab.data.evaluation.score(o, lab.dense).get(lab.data.metric or "") for o in outputs]
            between = fidelity(lab.head.kind, *outputs)
            yield {
                "keep": keep,
                "seed": seed,
                "method": method,
                "virtual": scores[0],
                "sliced": scores[1],
                "difference": None if None in scores else scores[1] - scores[0],  # type: ignore[operator]
                "max_abs": between["max_abs"],
            }


def flops(lab: Lab) -> Rows:
    """FLOPs taken away against 1 - keep, at the budget's own length and at others."""
    model, config = lab.model, lab.model.config
    seed = lab.setting.seeds[0]
    lengths = (16, 53, 128, 256, 512)
    limit = int(getattr(config, "max_position_embeddings", 512))
    names = lab.pruner(seed).rows[0].features
    for keep in with_keeps(lab.setting.keeps, (0.9, 0.8, 0.7, 0.6, 0.5)):
        found, sliced = lab.prune(keep, seed, replace(DEFAULT, compensate="none", criterion="fisher"))
        for length in sorted({found.seq_len, *(n for n in lengths if n <= limit)}):
            feeds = {name: torch.ones(1, length, dtype=torch.long, device=lab.device) for name in names}
            counted = [count_torch(m, feeds) for m in (model, sliced)]
            encoder = encoder_flops(found.groups, length)
            layers, d, ff = 1 + max(g.layer for g in found.groups), found.groups[0].hidden, found.groups[1].size
            yield {
                "keep": keep,
                "length": length,
                "budget_length": found.seq_len,
                "encoder_reduction": (counted[0] - counted[1]) / encoder,
                "one_minus_keep": 1 - keep,
                "dense_encoder_gflops": encoder / 1e9,
                "report_formula_gflops": 4 * layers * (2 * d * ff + d * d) * length / 1e9,
            }


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


def choosing(lab: Lab) -> Rows:
    """Criteria against each other, with and without the refit; local and global."""
    for seed, keep in product(lab.setting.seeds, with_keeps(lab.setting.keeps, (0.6,))):
        for name, compensate in product(criteria(), ("none", "refit")):
            options = Options(criterion=name, compensate=compensate, rearrange="none", seed=seed)
            yield _pruned(lab, keep, seed, options, method=name, compensate=compensate)
        for name in ("fisher", "obs"):
            options = Options(criterion=name, compensate="refit", rearrange="none", scope="local")
            yield _pruned(lab, keep, seed, options, method=f"{name}, local", compensate="refit")


def samples(lab: Lab) -> Rows:
    """Quality over the number of calibration samples."""
    total = len(lab.data.train)
    counts = sorted({min(n, total) for n in (128, 256, 512, 1024, 2048, 4096)})
    for seed, keep in product(lab.setting.seeds, with_keeps(lab.setting.keeps, (0.5,))):
        for count in counts:
            for method, options in {"paper": PAPER, "default": DEFAULT}.items():
                found, sliced = lab.prune(keep, seed, options, samples=count)
                same = {"keep": keep, "seed": seed, "samples": count, "method": method}
                yield same | lab.compare(sliced) | lab.describe(found)


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


def seconds(lab: Lab) -> Rows:
    """What pruning takes, stage by stage: the paper's three stages and the default."""
    for seed, keep in product(lab.setting.seeds, with_keeps(lab.setting.keeps, (0.5,))):
        for method, options in {"paper": PAPER, "default": DEFAULT}.items():
            lab._pruner = None
            found, _ = lab.prune(keep, seed, options)
            stages = {s["name"]: s["seconds"] for s in found.stages}
            yield {"keep": keep, "seed": seed, "method": method, **stages, "total": sum(stages.values())}


def _timed(timed: dict[str, Any], name: str) -> dict[str, Any]:
    if name not in timed:
        return {}
    median_ms, ratio = timed[name]
    return {"median_ms": median_ms, "ratio_to_dense": ratio.value, "ratio_low": ratio.low, "ratio_high": ratio.high}


_SPEED = ("ratio_to_dense", "ratio_low", "ratio_high")
_STAGES = ("calibrate", "score", "search", "rearrange", "compensate", "total")

EXPERIMENTS = {
    "tradeoff": Experiment(
        "Quality over FLOPs kept", tradeoff, ("keep", "method"), (*QUALITY, "seconds"), ("keep", "value", "method")
    ),
    "ablation": Experiment(
        "What each stage adds", ablation, ("keep", "method"), (*QUALITY, "seconds"), ("keep", "kl", "method")
    ),
    "parity": Experiment(
        "Virtual and sliced", parity, ("keep", "method"), ("virtual", "sliced", "difference", "max_abs")
    ),
    "flops": Experiment(
        "FLOPs taken away",
        flops,
        ("keep", "length"),
        ("encoder_reduction", "one_minus_keep", "dense_encoder_gflops", "report_formula_gflops"),
        ("length", "encoder_reduction", "keep"),
    ),
    "structure": Experiment(
        "What to cut, at equal FLOPs",
        structure,
        ("keep", "method"),
        (*QUALITY, "kept_flops", *_SPEED, "infeasible_below"),
        ("ratio_to_dense", "value", "method"),
    ),
    "latency": Experiment(
        "Quality over latency",
        latency,
        ("keep", "method"),
        (*QUALITY, "median_ms", *_SPEED),
        ("ratio_to_dense", "value", "method"),
    ),
    "prediction": Experiment(
        "Latency by the table and measured", prediction, ("keep",), ("predicted", *_SPEED, "relative_error")
    ),
    "criteria": Experiment("Criteria", choosing, ("keep", "method", "compensate"), QUALITY),
    "samples": Experiment(
        "Calibration samples",
        samples,
        ("keep", "samples", "method"),
        (*QUALITY, "seconds"),
        ("samples", "kl", "method"),
    ),
    "unstructured": Experiment("Unstructured magnitude, run dense", unstructured, ("keep",), (*QUALITY, *_SPEED)),
    "seconds": Experiment("What pruning takes, in seconds", seconds, ("keep", "method"), _STAGES),
}
