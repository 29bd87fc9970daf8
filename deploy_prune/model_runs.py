"""What pruning runs of one model: its statistics and scores' evidence, the runs that are followed, compensation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import nn

from . import parallel
from .batches import Batches
from .calibration import CalibrationStats, calibrate, check_finite
from .checkpoint import check_weights
from .compensate import Solver, SweepResult, get_solver, sweep
from .costs import Budget, Limit
from .criteria import Criterion, Evidence, get_criterion
from .criteria.base import Scores
from .criteria.fisher import PAPER_BATCH_ROWS
from .heads import Head
from .kept import pack_rearranged, pack_search, unpack_rearranged, unpack_search
from .layer_calibration import calibrate_by_layers
from .lengths import Lengths
from .masking import Updates, mask_model
from .offload import HOME, offloaded
from .progress import Progress, Reporter, Silent
from .rearrange import rearrange
from .resume import Resume
from .search import Search, search
from .slicing import slice_model
from .stages import DTYPES, Options
from .surgery import Surgery, surgery_of
from .tasks.base import Row
from .teacher import Teacher, state_bytes
from .units import GroupPlan, MaskSet, SlicePlan, Units


class ModelRuns:
    """Hold one dense model with its calibration rows, and run what the stages of pruning ask of them.

    What is decided is decided by a team's first process; the dense model's run is made once.
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
        self.kept_on = HOME if offloaded(model) else self.device  # statistics and refitted projections
        self.surgery = self.find_surgery()
        self.groups = self.surgery.groups
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

    def searched(self, scores: Scores, limits: Sequence[Limit], options: Options) -> Search:
        """Return the masks that keep the most within the limits."""
        return parallel.first(
            lambda: search_units(self.groups, scores, limits, options),
            pack_search,
            unpack_search,
        )

    def larger_masks(self, scores: Scores, limits: Sequence[Limit], options: Options, solver: Solver) -> MaskSet | None:
        """Return the masks of the model that mask tuning follows, pruned less; None where that is the dense one."""
        larger = [Limit.share(limit.table, solver.teacher_keep(limit.keep)) for limit in limits]
        if all(limit.keep >= 1.0 for limit in larger):
            return None
        return self.searched(scores, larger, options).masks

    def rearranged(
        self, masks: MaskSet, stats: CalibrationStats, options: Options
    ) -> tuple[MaskSet, dict[str, tuple[float, float]]]:
        """Return the masks rearranged at fixed counts, and each group's objective before and after."""
        return parallel.first(
            lambda: rearrange(self.groups, masks, _gradients(stats, options)),
            pack_rearranged,
            unpack_rearranged,
        )

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
        """Return a model's calibration. Raises InputError for numbers that are not finite."""
        stats = (calibrate_by_layers if offloaded(model) else calibrate)(
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
        where = "on the GPU" if self.kept_on.type == "cuda" else "in mapped files"
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
        masks = self.larger_masks(scores, limits, options, solver)
        if masks is None:
            return self._run_of(self.model, options)
        if options.rearrange != "none":
            masks, _ = self.rearranged(masks, stats, options)
        return self._run_of(slice_model(self.model, self.groups, SlicePlan.from_masks(self.groups, masks)), options)


def search_units(groups: Sequence[Units], scores: Scores, limits: Sequence[Limit], options: Options) -> Search:
    """Return the masks that keep the most within the limits."""
    return search(groups, scores, limits, options.minimum, method=options.search, scope=options.scope)


def _gradients(stats: CalibrationStats, options: Options) -> dict[str, torch.Tensor]:
    if options.rearrange == "sample":
        return stats.gradients
    return {name: stats.batch_gradients(name, PAPER_BATCH_ROWS) for name in stats.gradients}


def with_scales(plan: SlicePlan, scales: Mapping[str, torch.Tensor]) -> SlicePlan:
    """Return the plan with new scales (kept units,) for the named groups."""

    def scaled(g: GroupPlan) -> GroupPlan:
        return replace(g, scales=tuple(scales[g.name].tolist())) if g.name in scales else g

    return SlicePlan(tuple(scaled(g) for g in plan.groups))
