"""A whole run: load, prune, slice, evaluate, export, measure, report, and publish the bundle at once."""

from __future__ import annotations

import copy
import importlib.metadata
import json
import platform
import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from . import __version__, parallel
from .archs import max_positions
from .bundle import VARIANTS, Artifact, Bundle, Stage
from .checkpoint import Dense, load_config, load_dense, save_sliced
from .config import BenchSettings, Recipe
from .costs import encoder_flops
from .depth import Depth
from .disk import disk_errors, real_path, write_atomically
from .errors import BundleError, InputError, VerdictError
from .evaluate import evaluate
from .heads import Head
from .late import Late
from .lengths import Lengths
from .offload import settle
from .progress import Reporter, Silent
from .pruner import prune_rows
from .publishing import publish, staging
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
from .signature import Signature
from .stages import Options, PrunedPlan, Recorder, resolve_device
from .surgery import surgery_of
from .tasks import check_task, load_task, task_head
from .tasks.base import Row, TaskData
from .tasks.registry import model_head
from .units import MaskSet, SlicePlan
from .variants import Variants, count_variants, make_variants

if TYPE_CHECKING:
    from .export import Evaluation, Exported

VERSIONED = ("torch", "transformers", "onnx", "onnxruntime", "onnxruntime-gpu", "numpy", "scipy", "tokenizers")


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
        bundle.manifest.budget = _budget_entry(pruned)
        bundle.manifest.recipe = recipe.model_dump(mode="json")
        bundle.manifest.task = _task_entry(task_name, head, data)
        _fill(bundle, variants, dense, head, recipe.model)
        with recorder.stage("evaluate") as record, reporter.stage("evaluate") as progress:
            record |= evaluate(bundle, variants, data, head, device, progress, keep, offload=recipe.offload)
        _store(bundle, variants, dense, recorder)
        _guard(bundle, recipe)
        made = _finish(
            bundle,
            variants.items(),
            recipe,
            recorder,
            reporter,
            export=export,
            bench=bench,
            evaluation=Evaluation(data, work.rows, head, dense.pad_id),
            previous=_earlier(kept / HALF, destination),
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
        bundle.manifest.task = _task_entry(task, head, task_data)
        recipe = Recipe(model=model, task=task, data=data, out=str(out))
        bundle.manifest.recipe = recipe.model_dump(mode="json")
        _fill(bundle, variants, dense, head, model)
        with recorder.stage("evaluate") as record, reporter.stage("evaluate") as progress:
            record |= evaluate(bundle, variants, task_data, head, torch.device("cpu"), progress)
        _store(bundle, variants, dense, recorder)
        _finish(bundle, variants.items(), recipe, recorder, reporter, export=False, bench=False)
        return publish(bundle, out)


def _finish(
    bundle: Bundle,
    models: Mapping[str, nn.Module],
    recipe: Recipe,
    recorder: Recorder,
    reporter: Reporter,
    *,
    export: bool,
    bench: bool,
    evaluation: Evaluation | None = None,
    previous: Sequence[Bundle] = (),
) -> Exported:
    """Export, measure and report a bundle in place; the last step of every way to make one."""
    from .export import Exported, Options, export_bundle, plan_kinds
    from .runtime_bench.bench import bench_bundle
    from .runtime_bench.report import write_report

    made = Exported()
    if export:
        with recorder.stage("export") as record, reporter.stage("export") as progress:
            options = Options.of(recipe)
            kinds, _ = plan_kinds(recipe.formats, recipe.precisions, options)
            made = export_bundle(
                bundle,
                formats=recipe.formats,
                precisions=recipe.precisions,
                options=options,
                models=models,
                evaluation=evaluation,
                previous=previous,
                stored=lambda: _commit(bundle, recorder),  # a kill leaves what is finished
                progress=Steps(progress, 2 * len(VARIANTS) * len(kinds)),
            )
            record |= {"artifacts": len(made.artifacts), "reused": made.reused, "failures": len(made.failures)}
            _check_graphs(bundle, made.artifacts)
        if made.reused:
            reporter.note(f"Exported before, and taken over: {made.reused} of {len(made.artifacts)} files")
        for line in made.left_out():
            reporter.note(line)
        _commit(bundle, recorder)
    if export and bench:
        with recorder.stage("bench") as record, reporter.stage("bench") as progress:
            settings = BenchSettings(runtimes=recipe.runtimes, batches=recipe.batches, seconds=recipe.bench_seconds)
            result = bench_bundle(bundle, settings, progress)
            record["failures"] = len(result["failures"])
    _commit(bundle, recorder)
    write_report(bundle)
    bundle.commit()
    return made


def _earlier(*folders: Path) -> list[Bundle]:
    """Return the whole bundles among a killed run's and the one to be replaced; what did not change is taken over."""
    found = []
    for folder in folders:
        with suppress(BundleError):
            found.append(Bundle.open(folder))
    return found


def _check_graphs(bundle: Bundle, artifacts: Sequence[Artifact]) -> None:
    """Count the FLOPs of every exported graph node by node; they must be those of the plan."""
    from .runtime_bench.flops import count_onnx

    shapes = Signature.of_manifest(bundle.manifest.model).shapes(1, int(bundle.manifest.budget["seq_len"]))
    for artifact in artifacts:
        if artifact.format == "onnx" and artifact.precision == "fp32" and artifact.shape is None:
            counted = count_onnx(bundle.path(artifact.path), shapes)
            expected = bundle.manifest.counts[artifact.variant]["flops"]
            if counted != expected:
                raise RuntimeError(f"{artifact.path} has {counted} FLOPs, its model {expected}")


class Steps:
    """Turn the names of steps into a finished share."""

    def __init__(self, progress: Any, total: int) -> None:
        self.progress, self.total, self.done = progress, max(total, 1), 0

    def __call__(self, name: str) -> None:
        self.progress(min(self.done / self.total, 1.0))
        self.done += 1


def _budget_entry(pruned: PrunedPlan) -> dict[str, Any]:
    """Return the budget for the manifest; with several limits, `kind` and `keep` are the first one's."""
    first = pruned.limits[0]
    entry = {"kind": first["kind"], "keep": first["keep"], "seq_len": pruned.seq_len, "limits": pruned.limits}
    if pruned.lengths.data:
        entry |= {"lengths": pruned.lengths.entry(), "kept_flops": _kept_flops(pruned)}
    return entry


def _kept_flops(pruned: PrunedPlan) -> dict[str, Any]:
    """Return the shares of the FLOPs that are kept over the distribution, and at a few lengths of it."""

    def kept(lengths: int | Lengths) -> float:
        return encoder_flops(pruned.groups, lengths, pruned.plan) / encoder_flops(pruned.groups, lengths)

    lengths = sorted({*pruned.lengths.samples(), pruned.seq_len})
    return {"all": kept(pruned.lengths), "at": [{"tokens": n, "share": kept(n)} for n in lengths]}


def _task_entry(name: str | None, head: Head, data: TaskData | None) -> dict[str, Any]:
    return {
        "name": name,
        "head": head.kind,
        "pooling": head.pooling if head.kind == "embedding" else None,
        "labels": list(data.labels) if data else [],
        "metric": data.metric if data else None,
        "evaluation": {split: len(rows) for split, rows in data.evals.items()} if data else {},
    }


def _fill(bundle: Bundle, variants: Variants, dense: Dense, head: Head, name: str) -> None:
    """Fill in the model, the plan and the exact counts."""
    manifest, plan, seq_len = bundle.manifest, variants.plan, int(bundle.manifest.budget["seq_len"])
    manifest.versions = {"deploy_prune": __version__, "python": platform.python_version(), **versions()}
    manifest.model = {
        "name": name,
        "source": dense.source,
        "sha256": dense.sha256,
        "model_type": variants.surgery.name,
        "architecture": type(variants.dense).__name__,
        **dense.signature.entry(),
        "pad_id": dense.pad_id,
    }
    manifest.plan = {
        "hash": plan.hash,
        "layers": plan.layer_counts(),
        "total": SlicePlan.from_masks(variants.surgery.groups, MaskSet.ones(variants.surgery.groups)).layer_counts(),
        "refitted": variants.refitted,
        "recovered": variants.recovered,
    }
    manifest.counts = count_variants(variants, head, seq_len, dense.signature)


def _store(bundle: Bundle, variants: Variants, dense: Dense, recorder: Recorder) -> None:
    """Write plan.json and the sliced checkpoint, and commit the staging folder."""
    with disk_errors(bundle.root):
        write_atomically(bundle.root / "plan.json", json.dumps(variants.plan.to_dict(), indent=1) + "\n")
        bundle.register("plan.json")
        for path in save_sliced(copy.copy(variants.sliced), dense.processor, bundle.root / "sliced"):
            bundle.register(str(path.relative_to(bundle.root)))
    _commit(bundle, recorder)


def _commit(bundle: Bundle, recorder: Recorder) -> None:
    bundle.manifest.stages = [Stage.model_validate(r) for r in recorder.records]
    bundle.commit()


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


def versions() -> dict[str, str]:
    """Return the releases that results depend on."""
    found = {}
    for name in VERSIONED:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
