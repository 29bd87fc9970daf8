"""The pruning itself, stage by stage, for any loaded model with an adapter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from . import parallel
from .archs import is_convolutional
from .batches import Batches
from .calibration import CalibrationStats, calibrate, check_finite
from .checkpoint import check_weights
from .compensate import Solver, SweepResult, get_solver, sweep
from .costs import Budget, Limit
from .criteria import Criterion, Evidence, get_criterion
from .criteria.base import Scores
from .criteria.fisher import PAPER_BATCH_ROWS
from .depth import LeftOut, choose
from .heads import Head
from .kept import (
    pack_rearranged,
    pack_scores,
    pack_search,
    pack_stats,
    pack_sweep,
    unpack_rearranged,
    unpack_scores,
    unpack_search,
    unpack_stats,
    unpack_sweep,
)
from .layer_calibration import calibrate_by_layers
from .lengths import Lengths
from .masking import Updates, mask_model
from .offload import Rotation
from .progress import Progress, Reporter, Silent
from .rearrange import rearrange
from .resume import Kept, Resume
from .search import Search, search
from .slicing import slice_model
from .stages import DTYPES, REFITS, Options, PrunedPlan, Recorder
from .surgery import Surgery, surgery_of
from .tasks.base import Row
from .teacher import Teacher, state_bytes
from .units import GroupPlan, MaskSet, SlicePlan, Units


class Pruner:
    """Prune one model with one set of calibration rows, to any number of budgets.

    What does not depend on the budget is done once: the calibration's pass, every criterion's scores, and the run of
    the dense model that the refit follows.
    """

    def __init__(
        self,
        model: nn.Module,
        head: Head,
        rows: Sequence[Row],
        *,
        pad_id: int = 0,
        residual: bool = False,
        reporter: Reporter | None = None,
        keep: Resume | None = None,
    ) -> None:
        self.model, self.head, self.rows, self.pad_id, self.residual = model, head, rows, pad_id, residual
        self.reporter, self.keep = reporter or Silent(), keep or Resume()
        check_weights(model, type(model).__name__)
        self.batches = Batches(rows, head, pad_id)
        self.device = next(model.parameters()).device
        self.surgery = self.find_surgery()
        self.groups = self.surgery.groups
        self._calibrated: dict[tuple[Any, ...], tuple[CalibrationStats, dict[str, Any]]] = {}
        self._scored: dict[tuple[Any, ...], tuple[Scores, dict[str, Any]]] = {}
        self._dense: Teacher | None = None

    def find_surgery(self) -> Surgery:
        """Return what can be cut, and how."""
        return surgery_of(self.model)

    def limits(self, budget: Budget, lengths: Lengths) -> list[Limit]:
        """Return one limit per bound cost."""
        return budget.limits(self.groups, lengths, sum(p.numel() for p in self.model.parameters()))

    def check(self, options: Options) -> None:
        """Refuse options before anything is computed. Raises InputError."""
        if options.compensate != "none":
            get_solver(options.compensate)

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
                lambda: self._search(scores, limits, options),
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
                    lambda: self._rearrange(found_masks, calibrated, options),
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

    def _search(self, scores: Scores, limits: Sequence[Limit], options: Options) -> Search:
        return parallel.first(
            lambda: search_units(self.groups, scores, limits, options),
            pack_search,
            unpack_search,
        )

    def _rearrange(
        self, masks: MaskSet, stats: CalibrationStats, options: Options
    ) -> tuple[MaskSet, dict[str, tuple[float, float]]]:
        return parallel.first(
            lambda: rearrange(self.groups, masks, _gradients(stats, options)),
            pack_rearranged,
            unpack_rearranged,
        )

    def search(self, budget: Budget, options: Options | None = None) -> Search:
        """Return what the search keeps within a budget, before anything is compensated: what `prune` starts from."""
        resolved = (options or Options()).resolved(self.groups)
        criterion, recorder = get_criterion(resolved.criterion), Recorder(self.device)
        scores = self._score(resolved, criterion, self._calibrate(resolved, criterion, recorder), recorder)
        limits = self.limits(budget, budget.lengths_over(self.rows, resolved.seed))
        return self._search(scores, limits, resolved)

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
                lambda kept: unpack_stats(kept, self.device),
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

    def _renewed(
        self,
        scores: Scores,
        stats: CalibrationStats,
        limits: Sequence[Limit],
        options: Options,
        recorder: Recorder,
    ) -> Scores:
        """Return the scores of the last step but one; a killed run's are used only if it finished all steps."""
        before = len(recorder.records)

        def unpack(kept: Kept) -> Scores:
            recorder.records += [{**record, "resumed": True} for record in kept[1]["records"]]
            return unpack_scores(kept)

        return self.keep.stage(
            "steps",
            [x.keep for x in limits],
            {},
            lambda: self._renew(scores, stats, limits, options, recorder),
            lambda renewed: (pack_scores(renewed)[0], {"records": recorder.records[before:]}),
            unpack,
        )

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
            "compensate", of, record, compute, pack_sweep, lambda kept: unpack_sweep(kept, self.device)
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

    def compensate(
        self,
        plan: SlicePlan,
        scores: Scores,
        stats: CalibrationStats,
        limits: Sequence[Limit],
        options: Options,
        progress: Progress,
    ) -> tuple[nn.Module, SweepResult]:
        """Return the sliced and compensated model, and what the sweep found."""
        solver = get_solver(options.compensate)
        teacher = self._teacher(scores, stats, limits, options, solver)
        student = slice_model(self.model, self.groups, plan)
        swept = sweep(student, teacher, self.groups, plan, self.head, self.batches, solver, stats.saliency, progress)
        return student, swept

    def _renew(
        self,
        scores: Scores,
        stats: CalibrationStats,
        limits: Sequence[Limit],
        options: Options,
        recorder: Recorder,
    ) -> Scores:
        """Prune in steps by the cubic schedule; return the scores on the model of the last step but one.

        After each step the model is cut and compensated, and its units are scored anew; what is cut is worth nothing
        from then on. Source: Zhu and Gupta 2017, To Prune or Not to Prune, equation 1.
        """
        for step in range(1, options.steps):
            with recorder.stage(f"step {step}") as record, self.reporter.stage(f"step {step}") as progress:
                done = 1 - (1 - step / options.steps) ** 3
                partly = [Limit.share(x.table, 1 - (1 - x.keep) * done) for x in limits]
                plan = SlicePlan.from_masks(self.groups, self._search(scores, partly, options).masks)
                student, swept = None, SweepResult({}, {}, [])
                if options.compensate != "none":
                    student, swept = self.compensate(plan, scores, stats, partly, options, lambda x: progress(x / 2))
                    plan = with_scales(plan, swept.scales)
                scores, loss = self.rescore(plan, student, swept.updates, options, lambda x: progress(0.5 + x / 2))
                for g in self.groups:
                    scores[g.name][sorted(set(range(g.size)) - set(plan[g.name].kept))] = 0.0
                record |= {"kept": [x.keep for x in partly], "mean_loss": loss}
        return scores

    def rescore(
        self, plan: SlicePlan, student: nn.Module | None, updates: Updates, options: Options, progress: Progress
    ) -> tuple[Scores, float]:
        """Return every unit's score in the model that a plan leaves, as masks of the dense one, and its mean loss."""
        criterion = get_criterion(options.criterion)
        masked = mask_model(self.model, self.groups, plan, updates)
        stats = self.statistics(masked, options, criterion, progress)
        return criterion(self.evidence(masked, options, stats)), float(stats.mean_loss)

    def statistics(
        self, model: nn.Module, options: Options, criterion: Criterion, progress: Progress
    ) -> CalibrationStats:
        stats = (calibrate_by_layers if Rotation(model).moves else calibrate)(
            model,
            self.groups,
            self.head,
            self.rows,
            pad_id=self.pad_id,
            label_free=options.label_free,
            seed=options.seed,
            forward_dtype=DTYPES[options.forward_dtype],
            gradient_moments=criterion.gradient_moments,
            progress=progress,
        )
        check_finite(stats)
        return stats

    def evidence(
        self,
        model: nn.Module,
        options: Options,
        stats: CalibrationStats | None,
        progress: Progress = lambda share: None,
    ) -> Evidence:
        return Evidence(
            model,
            self.groups,
            seed=options.seed,
            stats=stats,
            make_teacher=None if stats is None else partial(self._run_of, model, options),
            progress=progress,
        )

    def _run_of(self, model: nn.Module, options: Options) -> Teacher:
        """Return what runs a model layer by layer; that of the dense model is made once."""
        if model is self.model and self._dense is not None:
            return self._dense
        feeds = list(self.batches.shared())
        size = state_bytes(self.groups, feeds, self.device, options.cache_bytes)
        on_gpu = self.device.type == "cuda" and not Rotation(model).moves
        where = "on the GPU" if on_gpu else "in mapped files"
        self.reporter.note(f"Hidden states: {size / 1e9:.2f} GB {where} (at most {options.cache_gb:g} GB)")
        again = model is self.model
        made = Teacher(model, self.groups, self.head, feeds, options.cache_bytes, used_again=again)
        if again:
            self._dense = made
        return made

    def _teacher(
        self, scores: Scores, stats: CalibrationStats, limits: Sequence[Limit], options: Options, solver: Solver
    ) -> Teacher:
        """Return the dense model's run, or for mask tuning that of one searched and rearranged at a larger budget."""
        options = replace(options, left_out=())  # the teacher has its whole depth
        larger = [Limit.share(limit.table, solver.teacher_keep(limit.keep)) for limit in limits]
        if all(limit.keep >= 1.0 for limit in larger):
            return self._run_of(self.model, options)
        masks = self._search(scores, larger, options).masks
        if options.rearrange != "none":
            masks, _ = self._rearrange(masks, stats, options)
        return self._run_of(slice_model(self.model, self.groups, SlicePlan.from_masks(self.groups, masks)), options)


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


def search_units(groups: Sequence[Units], scores: Scores, limits: Sequence[Limit], options: Options) -> Search:
    """Return the masks that keep the most within the limits."""
    return search(groups, scores, limits, options.minimum, method=options.search, scope=options.scope)


def _reached(limit: Limit, found: Search) -> dict[str, Any]:
    kind = limit.table.kind
    return {
        "kind": kind,
        "keep": limit.keep,
        "limit": limit.most,
        "reached": found.costs[kind],
        "dense": limit.table.dense,
    }


def _gradients(stats: CalibrationStats, options: Options) -> dict[str, torch.Tensor]:
    if options.rearrange == "sample":
        return stats.gradients
    return {name: stats.batch_gradients(name, PAPER_BATCH_ROWS) for name in stats.gradients}


def with_scales(plan: SlicePlan, scales: Mapping[str, torch.Tensor]) -> SlicePlan:
    """Return the plan with new scales (kept units,) for the named groups."""

    def scaled(g: GroupPlan) -> GroupPlan:
        return replace(g, scales=tuple(scales[g.name].tolist())) if g.name in scales else g

    return SlicePlan(tuple(scaled(g) for g in plan.groups))
