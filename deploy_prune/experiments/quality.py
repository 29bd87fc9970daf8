"""Experiments on what pruning keeps, over budgets, methods, criteria and samples; each yields a row per cell."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cache, partial
from itertools import product
from typing import Any

import torch
from torch import nn

from ..costs import Budget, encoder_flops
from ..criteria import criteria
from ..fidelity import fidelity
from ..predict import predict
from ..runtime_bench.flops import count_torch
from ..stages import Options
from .lab import Lab, with_keeps
from .methods import CHANNEL_STAGES, CHANNEL_TRADEOFF, DEFAULT, PAPER, STAGES, SUCCESSORS

Rows = Iterator[dict[str, Any]]


def _pruned(
    lab: Lab, keep: float, seed: int, options: Options, samples: int | None = None, **more: Any
) -> dict[str, Any]:
    found, sliced = lab.prune(keep, seed, options, samples=samples)
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
            virtual = found.surgery.mask(found.plan, found.updates)
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
    """FLOPs taken away against 1 - keep, at the budget's own length and, of texts, at others."""
    model, signature = lab.model, lab.checkpoint.signature
    seed = lab.setting.seeds[0]
    limit = int(getattr(model.config, "max_position_embeddings", 512))
    lengths = [n for n in (16, 53, 128, 256, 512) if n <= limit] if signature.tokens is None else []
    dtype = torch.float32 if signature.image else torch.long
    for keep in with_keeps(lab.setting.keeps, (0.9, 0.8, 0.7, 0.6, 0.5)):
        found, sliced = lab.prune(keep, seed, replace(DEFAULT, compensate="none", criterion="fisher"))
        for length in sorted({found.seq_len, *lengths}):
            shapes = signature.shapes(1, length)
            feeds = {name: torch.ones(shape, dtype=dtype, device=lab.device) for name, shape in shapes.items()}
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


def choosing(lab: Lab) -> Rows:
    """Criteria against each other, with and without the refit; local and global."""
    for seed, keep in product(lab.setting.seeds, with_keeps(lab.setting.keeps, (0.6,))):
        for name, compensate in product(criteria(), ("none", "refit")):
            options = Options(criterion=name, compensate=compensate, rearrange="none", seed=seed)
            yield _pruned(lab, keep, seed, options, method=name, compensate=compensate)
        for compensate in ("none", "refit"):
            options = Options(criterion="fisher", compensate=compensate, rearrange="none", label_free=True)
            yield _pruned(lab, keep, seed, options, method="fisher, label-free", compensate=compensate)
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
                yield _pruned(lab, keep, seed, options, count) | {"samples": count, "method": method}


def vision(lab: Lab) -> Rows:
    """What the report measured of image models: accuracy over FLOPs, each stage's worth, and the number of samples.

    Mask tuning is solved exactly: on a model of the size of ViT-S, LSMR's thousands of steps take the longest by far.
    """
    total, given = len(lab.data.train), lab.setting.samples
    counts = [n for n in (512, 1024, 2048, 4096, 8192) if n <= total]
    tuned = replace(PAPER, compensate="mask-tuning-exact")
    both = {"paper": tuned, "default": DEFAULT}
    stages = {name: tuned if options is PAPER else options for name, options in STAGES.items()}
    cell = cache(partial(_pruned, lab))  # some belong to two parts or three
    for seed in lab.setting.seeds:
        for keep, (method, options) in product(with_keeps(lab.setting.keeps, (0.9, 0.8, 0.7, 0.6, 0.5)), both.items()):
            yield cell(keep, seed, options, given) | {"part": "FLOPs", "samples": given, "method": method}
        for method, options in stages.items():
            yield cell(0.6, seed, options, given) | {"part": "stages", "samples": given, "method": method}
        for count, (method, options) in product(counts, both.items()):
            yield cell(0.6, seed, options, count) | {"part": "samples", "samples": count, "method": method}


def channels(lab: Lab) -> Rows:
    """What channels cost: accuracy over FLOPs, and at half of them what each stage adds."""
    for seed in lab.setting.seeds:
        for keep in with_keeps(lab.setting.keeps, (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)):
            for method in CHANNEL_STAGES if keep == 0.5 else CHANNEL_TRADEOFF:
                yield _pruned(lab, keep, seed, CHANNEL_STAGES[method], method=method)


def recovery(lab: Lab) -> Rows:
    """Quality at an equal share of FLOPs and parameters, before and after distillation from the dense model.

    With `recover_depth`, that many sub-layers of the recovered model are then left out, and it is distilled again:
    widths, distillation, depth, distillation.
    """
    for seed, keep in product(lab.setting.seeds, with_keeps(lab.setting.keeps, (0.7,))):
        found, sliced = lab.prune(Budget(keep_flops=keep, keep_params=keep), seed, DEFAULT)
        same = {"keep": keep, "seed": seed, **lab.describe(found)}
        yield {**same, "method": "pruned", "lr": "-", "augment": "-", **lab.compare(sliced)}
        for lr, augment in product(lab.setting.recover_lr, lab.setting.recover_augment):
            tried = {**same, "lr": lr, "augment": augment}
            student = copy.deepcopy(sliced)
            yield {**tried, "method": "recovered", **_recovered(lab, student, tried)}
            if not lab.setting.recover_depth:
                continue
            shorter, student = lab.shorten(found, student, seed, lab.setting.recover_depth)
            tried |= lab.describe(shorter)
            yield {**tried, "method": "depth", **lab.compare(student)}
            yield {**tried, "method": "recovered again", **_recovered(lab, student, tried)}


def _recovered(lab: Lab, student: nn.Module, tried: Mapping[str, Any]) -> dict[str, Any]:
    """Distil a model in place; return its quality and the loss on the held-out rows."""
    record = lab.recover(student, tried["seed"], tried["lr"], tried["augment"])
    held = {"held_out_before": record["loss_before"], "held_out_after": record["loss_after"]}
    return {**lab.compare(student), **held, "recovery": record}


def successors(lab: Lab) -> Rows:
    """The default against what came after the paper, as far as it fits into the same budgets."""
    for seed, keep in product(lab.setting.seeds, with_keeps(lab.setting.keeps, (0.5, 0.4))):
        for method, options in SUCCESSORS.items():
            yield _pruned(lab, keep, seed, replace(options, seed=seed), method=method)


def steps(lab: Lab) -> Rows:
    """One shot against several steps of the cubic schedule, with statistics renewed at each."""
    for seed, keep in product(lab.setting.seeds, with_keeps(lab.setting.keeps, (0.5, 0.4))):
        for number in (1, 2, 4):
            yield _pruned(lab, keep, seed, replace(DEFAULT, steps=number), steps=number)
