"""What follows the pruning of widths: recovery, and depth where it comes last, with a recovery of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from . import parallel
from .calibration import sample_indices
from .checkpoint import Dense
from .config import Recipe
from .costs import Budget, counts_of
from .depth import Depth, LeftOut, choose, without
from .heads import Head
from .progress import Reporter
from .recover import MOST_ROWS, Recovery, recover
from .resume import Resume, hash_state
from .stages import PrunedPlan, Recorder
from .tasks.base import Row, TaskData


@dataclass
class Late:
    """Train and shorten the sliced model as a recipe says; what a killed run left in `scratch` is taken up again."""

    recipe: Recipe
    dense: Dense
    head: Head
    data: TaskData
    rows: Sequence[Row]  # the calibration's
    label_free: bool
    budget: Budget
    keep: Resume
    scratch: Path
    recorder: Recorder
    reporter: Reporter

    def __call__(self, pruned: PrunedPlan) -> tuple[PrunedPlan, nn.Module | None]:
        """Return the plan, perhaps of less depth, and the sliced model that now stands for it.

        None means that the plan and its refitted projections say everything, as before.
        """
        depth = Depth.of(self.recipe) if self.recipe.depth_order == "after" else Depth()
        if not (self.recipe.recovers or depth):
            return pruned, None
        student = pruned.slice()
        kept = self.recipe.recovers and self._recover(student, "recover")
        if not depth:
            return pruned, student if kept else None
        pruned, student = self._shorten(pruned, student, depth)
        if self.recipe.recovers:
            self._recover(student, "recover again")
        return pruned, student

    def _recover(self, student: nn.Module, name: str) -> bool:
        recipe, train = self.recipe, self.data.train
        with self.recorder.stage(name) as record, self.reporter.stage(name) as progress:
            record |= recover(
                student,
                self.dense.model,
                self.head,
                train.encode(sample_indices(len(train), recipe.recover_samples or MOST_ROWS, recipe.seed)),
                Recovery.of(recipe),
                pad_id=self.dense.pad_id,
                folder=self.scratch / name.replace(" ", "-"),
                progress=progress,
            )
        if record["kept"]:
            self.reporter.note(f"Recovery: held-out loss {record['loss_before']:.4g} -> {record['loss_after']:.4g}")
        else:
            self.reporter.note("Recovery did not help on the held-out rows: the weights stay as they were.")
        return bool(record["kept"])

    def _shorten(self, pruned: PrunedPlan, student: nn.Module, depth: Depth) -> tuple[PrunedPlan, nn.Module]:
        """Leave sub-layers out of a sliced model; its constants are their mean outputs."""
        model, groups = self.dense.model, pruned.groups
        with self.recorder.stage("depth") as record, self.reporter.stage("depth") as progress:

            def compute() -> LeftOut:
                return choose(
                    student,
                    [g for g in groups if pruned.plan[g.name].count],
                    self.head,
                    self.rows,
                    depth,
                    teacher=model,
                    label_free=self.label_free,
                    pad_id=self.dense.pad_id,
                    progress=progress,
                )

            left_out = self.keep.stage(
                "late depth",
                [hash_state(student.state_dict())],  # which recovery may have changed
                record,
                lambda: parallel.first(compute, LeftOut.pack, LeftOut.unpack),
                LeftOut.pack,
                LeftOut.unpack,
            )
            student, plan = without(student, model, groups, pruned.plan, left_out)
            record |= left_out.record(min(depth.rows, len(self.rows)))
        limits = self.budget.limits(groups, pruned.lengths, sum(p.numel() for p in model.parameters()))
        costs = [limit.table.cost(counts_of(groups, plan)) for limit in limits]
        reached = [{**entry, "reached": cost} for entry, cost in zip(pruned.limits, costs, strict=True)]
        return replace(pruned, plan=plan, limits=reached), student
