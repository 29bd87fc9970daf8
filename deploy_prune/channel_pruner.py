"""The pruning of convolutional networks: channels for heads and neurons, the same stages in the same order."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from .archs.conv import ChannelGraph, trace_sliced
from .calibration import CalibrationStats, check_finite, hash_rows
from .channel_calibration import calibrate_channels
from .channel_costs import channel_limits
from .channel_slicing import slice_channels
from .compensate import get_solver
from .compensate.conv import ignoring, sweep_channels
from .compensate.fold import fold_channels, renorm
from .compensate.layers import SweepResult
from .costs import Budget, Limit
from .criteria import Criterion, Evidence, get_criterion
from .criteria.base import Scores
from .errors import InfeasibleBudgetError, InputError
from .graph_runner import GraphRunner
from .latency_table import ChannelLatency
from .lengths import Lengths
from .masking import Updates
from .progress import Progress
from .pruner import Pruner
from .stages import Options, PrunedPlan
from .surgery import TRIED_IMAGES, ChannelSurgery, channel_surgery
from .units import SlicePlan

FOLDS = ("fold", "batch-norm", "fold+batch-norm")  # compensations of convolutions that need no sweep
ONLY_CUT = "-cut"  # behind a sweep's name: of layers that lost inputs alone


class ChannelPruner(Pruner):
    """Prune one convolutional network with one set of calibration images, to any number of budgets.

    The model's forward takes a batch of images and gives logits. `residual` also offers residual streams.
    """

    surgery: ChannelSurgery

    def find_surgery(self) -> ChannelSurgery:
        """Trace the model, and try every group's cut. Raises UnsupportedModelError, with the reasons, for none."""
        return channel_surgery(self.model, self.some_images(), residual=self.residual)

    def some_images(self) -> torch.Tensor:
        """Return a few calibration images (B, C, H, W), to trace the model by."""
        (images,) = next(iter(self.batches)).to(self.device).inputs.values()
        return images[:TRIED_IMAGES]

    @property
    def graph(self) -> ChannelGraph:
        """Return the traced model."""
        return self.surgery.graph

    def prune(self, budget: Budget, options: Options | None = None) -> PrunedPlan:
        staying = "; ".join(self.graph.staying())
        if staying:
            self.reporter.note(f"Channels that stay: {staying}")
        align = (options or Options()).align
        if isinstance(budget.lut, ChannelLatency) and align % budget.lut.align:
            self.reporter.note(
                f"The latency table was measured at multiples of {budget.lut.align} channels, and predicts those of"
                f" {align} less well: --align {budget.lut.align}, or probe with --align {align}."
            )
        try:
            return super().prune(budget, options)
        except InfeasibleBudgetError as error:
            hint = f"{error.hint} What stays: {staying}." if staying else error.hint
            raise InfeasibleBudgetError(error.message, smallest=error.smallest, hint=hint) from error

    def limits(self, budget: Budget, lengths: Lengths) -> list[Limit]:
        return channel_limits(budget, self.graph, sum(p.numel() for p in self.model.parameters()), lengths.batch)

    def check(self, options: Options) -> None:
        if options.depth or options.left_out:
            raise InputError("Whole blocks of a convolutional network cannot be left out.", hint="Leave depth out.")
        if options.forward_dtype != "fp32":
            raise InputError("Convolutional networks are calibrated in fp32.", hint="Leave forward_dtype out.")
        if options.compensate not in ("none", *FOLDS):
            get_solver(options.compensate.removesuffix(ONLY_CUT))

    def statistics(
        self, model: nn.Module, options: Options, criterion: Criterion, progress: Progress
    ) -> CalibrationStats:
        stats = calibrate_channels(
            model,
            self.graph,
            self.head,
            self.batches,
            sample_hash=hash_rows(self.rows),
            label_free=options.label_free,
            seed=options.seed,
            gradient_moments=criterion.gradient_moments,
            progress=progress,
        )
        check_finite(stats)
        return stats

    def rescore(
        self, plan: SlicePlan, student: nn.Module | None, updates: Updates, options: Options, progress: Progress
    ) -> tuple[Scores, float]:
        """Return every channel's score in the sliced network, and its mean loss.

        Channels that nothing makes or reads any more are worth nothing.
        """
        criterion = get_criterion(options.criterion)
        smaller = self.surgery.slice(plan, updates) if student is None else student
        inner = _Smaller(self, plan, smaller)
        stats = inner.statistics(smaller, options, criterion, progress)
        scores = {g.name: np.zeros(g.size) for g in self.groups}
        for name, values in criterion(inner.evidence(smaller, options, stats)).items():
            scores[name][list(plan[name].kept)] = values
        return scores, float(stats.mean_loss)

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
            graph=self.graph,
            make_runner=None if stats is None else lambda: self._runner(options),
            progress=progress,
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
        if options.compensate in FOLDS:
            folded = "fold" in options.compensate
            updates = dict(fold_channels(self.model, self.graph, plan, self._runner(options))) if folded else {}
            if "batch-norm" in options.compensate:
                every = [self._images(batch.inputs) for batch in self.batches]  # each process runs all: one pass
                updates = dict(renorm(self.model, self.graph, plan, updates, every))
            swept = SweepResult(updates, {}, [])
        else:
            solver = get_solver(options.compensate.removesuffix(ONLY_CUT))
            teacher, masks = self.model, self.larger_masks(scores, limits, options, solver)
            if masks is not None:
                teacher = ignoring(self.model, self.graph, SlicePlan.from_masks(self.groups, masks))
            feeds = list(self.batches.shared())
            swept = sweep_channels(
                self.model,
                self.graph,
                plan,
                [self._images(batch.inputs) for batch in feeds],
                [batch.index for batch in feeds],
                solver,
                stats.saliency,
                numbers=[batch.number for batch in feeds],
                teacher=teacher,
                only_cut=options.compensate.endswith(ONLY_CUT),
                progress=progress,
                cache_bytes=options.cache_bytes,
            )
        return slice_channels(self.model, self.graph, plan, swept.updates), swept

    def _runner(self, options: Options) -> GraphRunner:
        feeds = list(self.batches.shared())
        images, numbers = [self._images(batch.inputs) for batch in feeds], [batch.number for batch in feeds]
        return GraphRunner(self.model, self.graph.program, images, options.cache_bytes, numbers)

    def _images(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        (images,) = inputs.values()
        return images


class _Smaller(ChannelPruner):
    """Take the statistics of what a plan leaves of a network, in the whole one's groups."""

    def __init__(self, whole: ChannelPruner, plan: SlicePlan, smaller: nn.Module) -> None:
        self.whole, self.plan = whole, plan
        super().__init__(smaller, whole.head, whole.rows, residual=whole.residual, reporter=whole.reporter)

    def find_surgery(self) -> ChannelSurgery:
        return ChannelSurgery(self.model, trace_sliced(self.whole.graph, self.plan, self.model, self.some_images()))
