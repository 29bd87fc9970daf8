"""The pruning itself, stage by stage, for any loaded model with an adapter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import nn

from . import parallel
from .archs import is_convolutional
from .calibration import CalibrationStats
from .compensate import SweepResult
from .costs import Budget, Limit
from .criteria import Criterion, get_criterion
from .criteria.base import Scores
from .depth import LeftOut, choose
from .heads import Head
from .kept import (
    pack_rearranged,
    pack_scores,
    pack_search,
    pack_stats,
    pack_step,
    pack_sweep,
    unpack_rearranged,
    unpack_scores,
    unpack_search,
    unpack_stats,
    unpack_step,
    unpack_sweep,
)
from .model_runs import ModelRuns, with_scales
from .progress import Progress, Reporter
from .resume import Resume
from .search import Search
from .stages import REFITS, Options, PrunedPlan, Recorder
from .tasks.base import Row
from .units import SlicePlan


class Pruner(ModelRuns):
    """Prune one model with one set of calibration rows, to any number of budgets.

    What does not depend on the budget is done once: the calibration's pass, every criterion's scores, and the run of
    the dense model that the refit follows.
    """

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self._calibrated: dict[tuple[Any, ...], tuple[CalibrationStats, dict[str, Any]]] = {}
        self._scored: dict[tuple[Any, ...], tuple[Scores, dict[str, Any]]] = {}

    def prune(self, budget: Budget, options: Options | None = None) -> PrunedPlan:
        """Calibrate, score, search, rearrange and compensate on the model's device; the model is not changed.

        Raises InfeasibleBudgetError, UnsupportedModelError or InputError.
        """
        asked = options or Options()
        options = asked.resolved(self.groups)
        criterion = get_criterion(options.criterion)
        self.check(options)
        recorder = Recorder(self.device)
        stats = self._calibrate(options, criterion, recorder)
        scores = self._score(options, criterion, stats, recorder)
        lengths = budget.lengths_over(self.rows, options.seed)
        limits = self.limits(budget, lengths)

        options = self._leave_out(options, recorder)
        if options.steps > 1 and stats is not None:
            scores = self._renewed(scores, stats, limits, options, recorder)

        with recorder.stage("search") as record, self.reporter.stage("search"):
            found = self.keep.stage(
                "search",  # kept because a mixed-integer program may end by its time limit
                [],
                record,
                lambda: self.searched(scores, limits, options),
                pack_search,
                unpack_search,
            )
            masks = found.masks
            plan = SlicePlan.from_masks(self.groups, masks)
            kept = sum(float(scores[g.name][list(plan[g.name].kept)].sum()) for g in self.groups)
            total = sum(float(s.sum()) for s in scores.values())
            record |= {
                "method": options.search,
                "scope": options.scope,
                "solver": found.solver,
                "gap": found.gap,
                "min_heads": options.min_heads,
                "min_neurons": options.min_neurons,
                "align": options.align,
                "left_out": list(options.left_out),
                "kept_importance": kept / total if total > 0 else 1.0,
            }

        if options.rearrange == "none" or stats is None:
            why = "off by default before the refit" if asked.rearrange == "auto" else "switched off"
            recorder.skip("rearrange", why)
        else:
            with recorder.stage("rearrange") as record, self.reporter.stage("rearrange"):
                calibrated, found_masks = stats, masks
                masks, objectives = self.keep.stage(
                    "rearrange",
                    [],
                    record,
                    lambda: self.rearranged(found_masks, calibrated, options),
                    pack_rearranged,
                    unpack_rearranged,
                )
                plan = SlicePlan.from_masks(self.groups, masks)
                record |= {
                    "fisher_granularity": options.rearrange,
                    "objective_before": sum(before for before, _ in objectives.values()),
                    "objective_after": sum(after for _, after in objectives.values()),
                }

        reached = [_reached(limit, found) for limit in limits]
        result = PrunedPlan(plan, self.surgery, lengths, reached, stages=recorder.records)
        if options.compensate == "none" or stats is None:
            recorder.skip("compensate", "switched off")
        else:
            with recorder.stage("compensate") as record, self.reporter.stage("compensate") as progress:
                student, swept = self._compensated(plan, scores, stats, limits, options, record, progress)
                result.updates = swept.updates
                result.plan = with_scales(plan, swept.scales)
                result.sliced = student
                record |= {
                    "method": options.compensate,
                    "residual_before": sum(entry.residual_before for entry in swept.log),
                    "residual_after": sum(entry.residual_after for entry in swept.log),
                    "groups": [vars(entry) for entry in swept.log],
                    "declined": [{"group": e.group, "reason": e.reason} for e in swept.log if not e.accepted],
                    "state_bytes": swept.state_bytes,
                }
        return result

    def search(self, budget: Budget, options: Options | None = None) -> Search:
        """Return what the search keeps within a budget, before anything is compensated: what `prune` starts from."""
        resolved = (options or Options()).resolved(self.groups)
        criterion, recorder = get_criterion(resolved.criterion), Recorder(self.device)
        scores = self._score(resolved, criterion, self._calibrate(resolved, criterion, recorder), recorder)
        limits = self.limits(budget, budget.lengths_over(self.rows, resolved.seed))
        return self.searched(scores, limits, resolved)

    def _calibrate(self, options: Options, criterion: Criterion, recorder: Recorder) -> CalibrationStats | None:
        if criterion.data_free and options.rearrange == options.compensate == "none":
            recorder.skip("calibrate", f"nothing of {options.criterion} needs data")
            return None
        key = (options.label_free, options.seed, options.forward_dtype)
        known = self._calibrated.get(key)
        if known and (known[0].gradient_moments or not criterion.gradient_moments):
            recorder.repeat(known[1])
            return known[0]
        with recorder.stage("calibrate") as record, self.reporter.stage("calibrate") as progress:
            stats = self.keep.stage(
                "calibrate",
                [*key, criterion.gradient_moments],
                record,
                lambda: self.statistics(self.model, options, criterion, progress),
                pack_stats,
                lambda kept: unpack_stats(kept, self.kept_on),
            )
            record |= {
                "samples": len(self.rows),
                "sample_hash": stats.sample_hash,
                "tokens": int(stats.tokens),
                "mean_length": stats.mean_length,
                "mean_loss": float(stats.mean_loss),
                "label_free": options.label_free,
                "forward_dtype": options.forward_dtype,
                "processes": parallel.size(),
            }
        self._calibrated[key] = stats, record
        return stats

    def _score(
        self, options: Options, criterion: Criterion, stats: CalibrationStats | None, recorder: Recorder
    ) -> Scores:
        key = (options.criterion, options.label_free, options.seed, options.forward_dtype)
        if key in self._scored:
            recorder.repeat(self._scored[key][1])
            return self._scored[key][0]
        with recorder.stage("score") as record, self.reporter.stage("score") as progress:
            scores = self.keep.stage(
                "score",
                key,
                record,
                lambda: criterion(self.evidence(self.model, options, stats, progress)),
                pack_scores,
                unpack_scores,
            )
            record |= {"criterion": options.criterion, "data_free": criterion.data_free}
        self._scored[key] = scores, record
        return scores

    def _compensated(
        self,
        plan: SlicePlan,
        scores: Scores,
        stats: CalibrationStats,
        limits: Sequence[Limit],
        options: Options,
        record: dict[str, Any],
        progress: Progress,
    ) -> tuple[nn.Module | None, SweepResult]:
        """Compensate, or return what a killed run had found; the sliced model is then still to be made."""
        students: list[nn.Module] = []

        def compute() -> SweepResult:
            student, swept = self.compensate(plan, scores, stats, limits, options, progress)
            students.append(student)
            return swept

        of = [plan.hash, options.compensate, options.rearrange]
        swept = self.keep.stage(
            "compensate", of, record, compute, pack_sweep, lambda kept: unpack_sweep(kept, self.kept_on)
        )
        return (students[0] if students else None), swept

    def _leave_out(self, options: Options, recorder: Recorder) -> Options:
        """Return the options with the groups left out that the depth asks for, chosen on the dense model."""
        if not options.depth:
            return options
        with recorder.stage("depth") as record, self.reporter.stage("depth") as progress:

            def compute() -> LeftOut:
                return choose(
                    self.model,
                    self.groups,
                    self.head,
                    self.rows,
                    options.depth,
                    means=options.compensate in REFITS,
                    given=options.left_out,
                    label_free=options.label_free,
                    pad_id=self.pad_id,
                    progress=progress,
                )

            found = self.keep.stage(
                "depth",
                [],
                record,
                lambda: parallel.first(compute, LeftOut.pack, LeftOut.unpack),
                LeftOut.pack,
                LeftOut.unpack,
            )
            record |= found.record(min(options.depth.rows, len(self.rows)))
        return replace(options, left_out=tuple(found.names))

    def _renewed(
        self,
        scores: Scores,
        stats: CalibrationStats,
        limits: Sequence[Limit],
        options: Options,
        recorder: Recorder,
    ) -> Scores:
        """Prune in steps by the cubic schedule; return the scores on the model of the last step but one.

        Source: Zhu and Gupta 2017, To Prune or Not to Prune, equation 1.
        """
        for step in range(1, options.steps):
            done = 1 - (1 - step / options.steps) ** 3
            partly = [Limit.share(x.table, 1 - (1 - x.keep) * done) for x in limits]
            with recorder.stage(f"step {step}") as record, self.reporter.stage(f"step {step}") as progress:
                scores, loss = self.keep.stage(
                    f"step {step}",
                    [x.keep for x in partly],
                    record,
                    partial(self._step, scores, stats, partly, options, progress),
                    pack_step,
                    unpack_step,
                )
                record |= {"kept": [x.keep for x in partly], "mean_loss": loss}
        return scores

    def _step(
        self,
        scores: Scores,
        stats: CalibrationStats,
        limits: Sequence[Limit],
        options: Options,
        progress: Progress,
    ) -> tuple[Scores, float]:
        """Cut and compensate, score every unit anew, what is cut by nothing; return the scores and the mean loss."""
        plan = SlicePlan.from_masks(self.groups, self.searched(scores, limits, options).masks)
        student, swept = None, SweepResult({}, {}, [])
        if options.compensate != "none":
            student, swept = self.compensate(plan, scores, stats, limits, options, lambda x: progress(x / 2))
            plan = with_scales(plan, swept.scales)
        scores, loss = self.rescore(plan, student, swept.updates, options, lambda x: progress(0.5 + x / 2))
        for g in self.groups:
            scores[g.name][sorted(set(range(g.size)) - set(plan[g.name].kept))] = 0.0
        return scores, loss


def prune_rows(
    model: nn.Module,
    head: Head,
    rows: Sequence[Row],
    budget: Budget,
    *,
    pad_id: int = 0,
    residual: bool = False,
    options: Options | None = None,
    reporter: Reporter | None = None,
    keep: Resume | None = None,
) -> PrunedPlan:
    """Prune once; see `Pruner.prune`. `keep` has what a killed run had finished, and gets what this one finishes."""
    pruner = pruner_of(model)(model, head, rows, pad_id=pad_id, residual=residual, reporter=reporter, keep=keep)
    return pruner.prune(budget, options)


def pruner_of(model: nn.Module) -> type[Pruner]:
    """Return what prunes a model: heads and neurons where there is an adapter, else the channels of what it traces."""
    from .channel_pruner import ChannelPruner

    return ChannelPruner if is_convolutional(model) else Pruner


def _reached(limit: Limit, found: Search) -> dict[str, Any]:
    kind = limit.table.kind
    return {
        "kind": kind,
        "keep": limit.keep,
        "limit": limit.most,
        "reached": found.costs[kind],
        "dense": limit.table.dense,
    }
