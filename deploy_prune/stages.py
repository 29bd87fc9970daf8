"""The pruning itself, stage by stage, for any loaded model with an adapter."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import nn

from .archs import check_config
from .batches import Batches
from .calibration import CalibrationStats, calibrate, check_finite
from .compensate import Solver, get_solver, sweep
from .costs import Budget, encoder_flops
from .criteria import PAPER_BATCH_ROWS, get_criterion
from .errors import InputError, SystemStateError
from .heads import Head
from .masking import OutputWeights
from .progress import Reporter, Silent
from .rearrange import rearrange
from .search import Scores, search_flops
from .slicing import slice_model
from .tasks.base import Row
from .units import GroupPlan, MaskSet, SlicePlan, UnitGroup

REFIT_NEURON_SHARE = 1 / 16  # of a layer's neurons, kept at least when the refit follows
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Options:
    """Choose how to prune; the defaults are the recommended ones.

    Left open, `rearrange` and `min_neurons` follow the compensation: with the refit, no rearrangement and
    at least a sixteenth of each layer's neurons; otherwise the paper's own, "sample" and 1. Measured in
    docs/results.md: rearranging picks units for a model that is not compensated, and diagonal Fisher
    empties the last layers, which no refit makes up for.
    """

    criterion: str = "fisher"
    rearrange: Literal["auto", "sample", "batch", "none"] = "auto"
    compensate: str = "refit"
    label_free: bool = False
    min_heads: int = 1
    min_neurons: int | None = None
    seed: int = 0
    forward_dtype: str = "fp32"

    def resolved(self, groups: Sequence[UnitGroup]) -> Options:
        """Return the options with nothing left open."""
        refit = self.compensate == "refit"
        widest = max(g.size for g in groups if g.kind == "neuron")
        least = max(1, round(REFIT_NEURON_SHARE * widest)) if refit else 1
        return replace(
            self,
            rearrange=("none" if refit else "sample") if self.rearrange == "auto" else self.rearrange,
            min_neurons=least if self.min_neurons is None else self.min_neurons,
        )


@dataclass
class PrunedPlan:
    """Hold what pruning decided: the plan, the refitted output projections, and the record of each stage."""

    plan: SlicePlan
    groups: tuple[UnitGroup, ...]
    budget: Budget
    updates: dict[str, OutputWeights] = field(default_factory=dict)
    stages: list[dict[str, Any]] = field(default_factory=list)
    sliced: nn.Module | None = None

    @property
    def hash(self) -> str:
        return self.plan.hash


def prune_rows(
    model: nn.Module,
    head: Head,
    rows: Sequence[Row],
    keep: float,
    *,
    seq_len: int | None = None,
    pad_id: int = 0,
    options: Options | None = None,
    reporter: Reporter | None = None,
) -> PrunedPlan:
    """Calibrate, search, rearrange and compensate on the model's device; the model itself is not changed.

    `keep` is the share of the dense encoder's FLOPs at `seq_len` tokens (default: the rows' mean length,
    rounded up). Raises InfeasibleBudgetError, UnsupportedModelError or InputError.
    """
    options, reporter = options or Options(), reporter or Silent()
    groups = check_config(model.config).groups(model)
    asked, options = options, options.resolved(groups)
    recorder = Recorder(next(model.parameters()).device)

    with recorder.stage("calibrate") as record, reporter.stage("calibrate") as progress:
        stats = calibrate(
            model,
            groups,
            head,
            rows,
            pad_id=pad_id,
            label_free=options.label_free,
            seed=options.seed,
            forward_dtype=DTYPES[options.forward_dtype],
            progress=progress,
        )
        check_finite(stats)
        record |= {
            "samples": len(rows),
            "sample_hash": stats.sample_hash,
            "tokens": int(stats.tokens),
            "mean_length": stats.mean_length,
            "mean_loss": float(stats.mean_loss),
            "label_free": options.label_free,
            "forward_dtype": options.forward_dtype,
        }
    budget = Budget(keep, seq_len or math.ceil(stats.mean_length))

    with recorder.stage("search") as record, reporter.stage("search"):
        scores = get_criterion(options.criterion)(stats)
        masks = _search(groups, scores, budget, options)
        plan = SlicePlan.from_masks(groups, masks)
        kept = sum(float(scores[g.name][list(plan[g.name].kept)].sum()) for g in groups)
        total = sum(float(s.sum()) for s in scores.values())
        record |= {
            "criterion": options.criterion,
            "min_heads": options.min_heads,
            "min_neurons": options.min_neurons,
            "kept_importance": kept / total if total > 0 else 1.0,
            "kept_flops": encoder_flops(groups, budget.seq_len, plan) / encoder_flops(groups, budget.seq_len),
        }

    if options.rearrange == "none":
        why = "off by default before the refit" if asked.rearrange == "auto" else "switched off"
        recorder.skip("rearrange", why)
    else:
        with recorder.stage("rearrange") as record, reporter.stage("rearrange"):
            masks, objectives = rearrange(groups, masks, _gradients(stats, options))
            plan = SlicePlan.from_masks(groups, masks)
            record |= {
                "fisher_granularity": options.rearrange,
                "objective_before": sum(before for before, _ in objectives.values()),
                "objective_after": sum(after for _, after in objectives.values()),
            }

    result = PrunedPlan(plan, groups, budget, stages=recorder.records)
    if options.compensate == "none":
        recorder.skip("compensate", "switched off")
    else:
        with recorder.stage("compensate") as record, reporter.stage("compensate") as progress:
            solver = get_solver(options.compensate)
            teacher = _teacher(model, groups, scores, stats, budget, options, solver)
            student = slice_model(model, groups, plan)
            batches = Batches(rows, head, pad_id)
            swept = sweep(student, teacher, groups, plan, head, batches, solver, stats.saliency, progress)
            result.updates = swept.updates
            result.plan = with_scales(plan, swept.scales)
            result.sliced = student
            record |= {
                "method": options.compensate,
                "residual_before": sum(entry.residual_before for entry in swept.log),
                "residual_after": sum(entry.residual_after for entry in swept.log),
                "groups": [vars(entry) for entry in swept.log],
                "declined": [{"group": e.group, "reason": e.reason} for e in swept.log if not e.accepted],
            }
    return result


def _search(groups: Sequence[UnitGroup], scores: Scores, budget: Budget, options: Options) -> MaskSet:
    if budget.keep >= 1.0:
        return MaskSet.ones(groups)
    least = 1 if options.min_neurons is None else options.min_neurons
    return search_flops(groups, scores, budget, min_heads=options.min_heads, min_neurons=least)


def _gradients(stats: CalibrationStats, options: Options) -> dict[str, torch.Tensor]:
    if options.rearrange == "sample":
        return stats.gradients
    return {name: stats.batch_gradients(name, PAPER_BATCH_ROWS) for name in stats.gradients}


def _teacher(
    model: nn.Module,
    groups: Sequence[UnitGroup],
    scores: Scores,
    stats: CalibrationStats,
    budget: Budget,
    options: Options,
    solver: Solver,
) -> nn.Module:
    """Return the dense model, or for mask tuning the one searched and rearranged at a larger budget."""
    keep = solver.teacher_keep(budget.keep)
    if keep >= 1.0:
        return model
    masks = _search(groups, scores, replace(budget, keep=keep), options)
    if options.rearrange != "none":
        masks, _ = rearrange(groups, masks, _gradients(stats, options))
    return slice_model(model, groups, SlicePlan.from_masks(groups, masks))


def with_scales(plan: SlicePlan, scales: Mapping[str, torch.Tensor]) -> SlicePlan:
    """Return the plan with new scales (kept units,) for the named groups."""

    def scaled(g: GroupPlan) -> GroupPlan:
        return replace(g, scales=tuple(scales[g.name].tolist())) if g.name in scales else g

    return SlicePlan(tuple(scaled(g) for g in plan.groups))


class Recorder:
    """Time the stages of a run and note the device's peak memory."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.records: list[dict[str, Any]] = []

    @contextmanager
    def stage(self, name: str) -> Iterator[dict[str, Any]]:
        cuda = self.device.type == "cuda"
        if cuda:
            torch.cuda.reset_peak_memory_stats(self.device)
        record: dict[str, Any] = {"name": name, "seconds": 0.0}
        started = time.perf_counter()
        try:
            yield record
        except torch.cuda.OutOfMemoryError as error:
            raise SystemStateError(
                f"Out of device memory in the stage '{name}'.", hint="Use fewer --samples, or --device cpu."
            ) from error
        if cuda:
            torch.cuda.synchronize(self.device)
            record["device_peak_bytes"] = int(torch.cuda.max_memory_allocated(self.device))
        record["seconds"] = round(time.perf_counter() - started, 3)
        self.records.append(record)

    def skip(self, name: str, reason: str) -> None:
        """Record that a stage did not run, and why."""
        self.records.append({"name": name, "seconds": 0.0, "skipped": reason})


def resolve_device(name: str) -> torch.device:
    """Return the torch device for auto, cpu, cuda or cuda:N.

    Raises InputError for another word, SystemStateError for a device that is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError
    except RuntimeError as error:
        raise InputError(f"Unknown device '{name}'.", hint="Use auto, cpu, cuda or cuda:N.") from error
    count = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        raise SystemStateError(
            f"No device {name}: torch {torch.__version__} sees {count} CUDA device(s).",
            hint="Use --device cpu, or install a CUDA build of torch and a driver.",
        )
    return device


__all__ = ["DTYPES", "Options", "PrunedPlan", "Recorder", "prune_rows", "resolve_device"]
