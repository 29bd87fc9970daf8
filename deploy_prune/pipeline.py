"""A whole run: load, prune, slice, evaluate, export, measure, report, and publish the bundle at once."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from . import parallel
from .archs import max_positions
from .bundle import Bundle
from .checkpoint import Dense, load_config, load_dense
from .config import Recipe
from .depth import Depth
from .disk import real_path
from .errors import InputError, VerdictError
from .evaluate import evaluate
from .finishing import earlier, finish
from .heads import Head
from .late import Late
from .offload import settle
from .progress import Reporter, Silent
from .pruner import prune_rows
from .publishing import publish, staging
from .recording import budget_entry, fill, store, task_entry, versions
from .resolving import (
    budget_of,
    calibration_rows,
    check_guards,
    check_kind,
    check_length,
    check_offload,
    inferred_task,
    is_label_free,
    resolve,
)
from .resume import HALF, Resume, agreed, resume_folder, run_key
from .stages import Options, PrunedPlan, Recorder, resolve_device
from .surgery import surgery_of
from .tasks import check_task, load_task, task_head
from .tasks.base import Row, TaskData
from .tasks.registry import model_head
from .units import SlicePlan
from .variants import make_variants

if TYPE_CHECKING:
    pass


def run(recipe: Recipe, reporter: Reporter | None = None, *, export: bool = True, bench: bool = True) -> Bundle:
    """Run a recipe and publish its bundle; an old bundle is untouched if it fails.

    What a run had finished when it was killed is used by the next one of the same recipe (docs/reliability.md).
    Files that fail to export are left out of the bundle, which is published; VerdictError then names them. In a team
    (`parallel`) this is the first process's part; the others `assist`.
    Raises DeployPruneError: see `errors` for the tree and its exit codes.
    """
    from .export import Evaluation

    reporter = reporter or Silent()
    device = _device(recipe)
    with parallel.first_ahead():
        source, task_name, recipe = resolve(recipe, reporter)
    destination = recipe.destination(task_name)
    recipe = recipe.model_copy(update={"out": str(destination)})
    kept, scratch = resume_folder(destination), _scratch(destination)
    with ExitStack() as stack:
        with parallel.first_ahead():
            bundle = stack.enter_context(staging(destination, aside=kept / HALF))
            work = Work.load(recipe, source, task_name, device, reporter)
        dense, head, data = work.dense, work.head, work.data
        keep = stack.enter_context(Resume(kept, agreed(work.key(), recipe), reporter.note))
        recorder = Recorder(device)
        pruned, recovered = work.prune(keep, scratch, recorder, reporter)
        parallel.disband()  # the others have nothing left to do
        with recorder.stage("slice"):
            variants = make_variants(pruned.surgery, pruned.plan, pruned.updates, recovered)
        bundle.manifest.budget = budget_entry(pruned)
        bundle.manifest.recipe = recipe.model_dump(mode="json")
        bundle.manifest.task = task_entry(task_name, head, data)
        fill(bundle, variants, dense, head, recipe.model)
        with recorder.stage("evaluate") as record, reporter.stage("evaluate") as progress:
            record |= evaluate(bundle, variants, data, head, device, progress, keep, offload=recipe.offload)
        store(bundle, variants, dense, recorder)
        _guard(bundle, recipe)
        made = finish(
            bundle,
            variants.items(),
            recipe,
            recorder,
            reporter,
            export=export,
            bench=bench,
            evaluation=Evaluation(data, work.rows, head, dense.pad_id),
            previous=earlier(kept / HALF, destination),
        )
        published = publish(bundle, destination)
        shutil.rmtree(scratch, ignore_errors=True)
    made.check()
    return published


def assist(recipe: Recipe) -> None:
    """Take a part of the pruning and the recovery of a run that the first process of a team leads (`parallel`)."""
    device = _device(recipe)
    with parallel.first_ahead():
        source, task_name, recipe = resolve(recipe, Silent())
    with parallel.first_ahead():
        work = Work.load(recipe, source, task_name, device, Silent())
    agreed(work.key(), recipe)
    work.prune(Resume(), _scratch(recipe.destination(task_name)), Recorder(device), Silent())


def _device(recipe: Recipe) -> torch.device:
    device = resolve_device(recipe.device)
    if recipe.recovers and device.index and not parallel.started_together():
        raise InputError(
            f"Recovery trains on the first GPU that is visible, not on {device}.",
            hint=f"Make it the first: CUDA_VISIBLE_DEVICES={device.index}, with --device cuda.",
        )
    return device


def _scratch(destination: Path) -> Path:
    whole = real_path(destination)
    return whole.with_name(f".{whole.name}.recovery")


@dataclass
class Work:
    """Hold what every process of a run loads: the dense model on its device, the task's data, the calibration rows."""

    recipe: Recipe
    dense: Dense
    head: Head
    data: TaskData
    rows: Sequence[Row]
    label_free: bool

    @classmethod
    def load(cls, recipe: Recipe, source: str, task: str, device: torch.device, reporter: Reporter) -> Work:
        """Load and check everything. Raises InputError or DataError."""
        dense = load_dense(source, task_head(task))
        data = load_task(
            task,
            **dense.preparing,
            config=dense.config,
            data=recipe.data,
            max_length=recipe.max_length,
            text_column=recipe.text_column,
            label_column=recipe.label_column,
        )
        head = Head(task_head(task), pooling=recipe.pooling)
        label_free = is_label_free(recipe, data, dense)
        rows = calibration_rows(recipe, data, reporter)
        if recipe.recover_label_share and not data.train.labelled:
            raise InputError("Recovery was to use labels, but the training rows have none.", hint="Leave them out.")
        check_length(recipe.seq_len, dense)
        check_kind(recipe, dense)
        check_offload(recipe, dense, device)
        check_guards(recipe, data)
        if recipe.offload:
            settle(dense.model, device)
        else:
            dense.model.to(device)
        return cls(recipe, dense, head, data, rows, label_free)

    @property
    def how(self) -> dict[str, Any]:
        """Return what the pruning is told beside budget and options."""
        return {"pad_id": self.dense.pad_id, "residual": self.recipe.cut_residual}

    def key(self) -> dict[str, Any]:
        """Return all that the stages' results depend on."""
        budget, options = budget_of(self.recipe), _options(self.recipe, self.label_free)
        return run_key(self.dense.model, self.head, self.rows, budget, options, versions(), **self.how)

    def prune(
        self, keep: Resume, scratch: Path, recorder: Recorder, reporter: Reporter
    ) -> tuple[PrunedPlan, nn.Module | None]:
        """Prune, and recover and shorten what the recipe says; return the plan, and the trained model if there is one.

        The recorder gets the stages' records.
        """
        budget, options = budget_of(self.recipe), _options(self.recipe, self.label_free)
        dense, head = self.dense, self.head
        pruned = prune_rows(
            dense.model, head, self.rows, budget, options=options, reporter=reporter, keep=keep, **self.how
        )
        recorder.records = pruned.stages
        late = Late(
            self.recipe,
            dense,
            head,
            self.data,
            self.rows,
            self.label_free,
            budget,
            keep,
            scratch,
            recorder,
            reporter,
        )
        return late(pruned)


def _options(recipe: Recipe, label_free: bool) -> Options:
    return Options(
        criterion=recipe.criterion,
        rearrange=recipe.rearrange,
        compensate=recipe.compensate,
        label_free=label_free,
        min_heads=recipe.min_heads,
        min_neurons=recipe.min_neurons,
        align=recipe.align,
        search=recipe.search,
        scope=recipe.scope,
        cache_gb=recipe.cache_gb,
        steps=recipe.steps,
        seed=recipe.seed,
        forward_dtype=recipe.forward_dtype,
        depth=Depth.of(recipe) if recipe.depth_order == "before" else Depth(),
    )


def slice_given(
    model: str,
    masks: Sequence[Path],
    out: str | Path,
    *,
    task: str | None = None,
    data: str | None = None,
    seq_len: int | None = None,
    reporter: Reporter | None = None,
) -> Bundle:
    """Publish a bundle of a model cut by given masks; without `data`, quality is not measured.

    Raises InputError for masks that do not fit; see `given_masks.read_masks`.
    """
    from .given_masks import read_masks

    reporter = reporter or Silent()
    source = str(Path(model).resolve()) if Path(model).is_dir() else model
    with staging(out) as bundle:
        config = load_config(source)
        if task is not None:
            check_task(task, config)
        head = Head(task_head(task) if task else model_head(config))
        dense = load_dense(source, head.kind)
        task_data = None
        if data is not None:
            task = task or inferred_task(config, data)
            task_data = load_task(task, **dense.preparing, config=dense.config, data=data)
        seq_len = seq_len or dense.signature.tokens or min(128, max_positions(dense.model))
        check_length(seq_len, dense)
        recorder = Recorder(torch.device("cpu"))
        surgery = surgery_of(dense.model, dense.signature.image, residual=True)
        plan = SlicePlan.from_masks(surgery.groups, read_masks(masks, surgery.groups))
        with recorder.stage("slice"):
            variants = make_variants(surgery, plan)
        share = surgery.flops(seq_len, plan) / surgery.flops(seq_len)
        bundle.manifest.budget = {"kind": "masks", "keep": share, "seq_len": seq_len}
        bundle.manifest.task = task_entry(task, head, task_data)
        recipe = Recipe(model=model, task=task, data=data, out=str(out))
        bundle.manifest.recipe = recipe.model_dump(mode="json")
        fill(bundle, variants, dense, head, model)
        with recorder.stage("evaluate") as record, reporter.stage("evaluate") as progress:
            record |= evaluate(bundle, variants, task_data, head, torch.device("cpu"), progress)
        store(bundle, variants, dense, recorder)
        finish(bundle, variants.items(), recipe, recorder, reporter, export=False, bench=False)
        return publish(bundle, out)


def _guard(bundle: Bundle, recipe: Recipe) -> None:
    """Raise VerdictError when the pruned model is worse than the recipe allows."""
    found = bundle.manifest.fidelity["agreement"]
    if recipe.min_agreement is not None and found < recipe.min_agreement:
        raise VerdictError(
            f"The pruned model agrees with the dense one on {found:.4f} of the rows, not {recipe.min_agreement}.",
            hint="Keep more FLOPs, or use more samples. No bundle was written.",
        )
    if recipe.max_quality_loss is not None:
        values = {name: bundle.manifest.quality[name]["value"] for name in ("dense", "sliced")}
        loss = 100 * (values["dense"] - values["sliced"])
        if loss > recipe.max_quality_loss:
            raise VerdictError(
                f"The pruned model loses {loss:.2f} points of quality; allowed: {recipe.max_quality_loss}.",
                hint="Keep more FLOPs, or use more samples. No bundle was written.",
            )
