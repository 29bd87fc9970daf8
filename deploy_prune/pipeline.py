"""A whole run: load, prune, slice, evaluate, export, measure, report, and publish the bundle at once."""

from __future__ import annotations

import copy
import importlib.metadata
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from . import __version__
from .archs import arch_of
from .bundle import VARIANTS, Bundle, GoldenCase, Stage, disk_errors, publish, staging, write_atomically
from .calibration import sample_indices
from .checkpoint import Dense, input_names, load_config, load_dense, save_sliced
from .config import MIN_SAMPLES, Recipe
from .costs import encoder_flops, removed_params
from .errors import InputError, VerdictError
from .evaluate import predict
from .fidelity import fidelity
from .heads import Head
from .masking import OutputWeights, mask_model
from .progress import Progress, Reporter, Silent
from .slicing import slice_model
from .stages import Options, Recorder, prune_rows, resolve_device
from .tasks import check_task, data_has_pair, infer_task, load_task, task_head
from .tasks.base import Row, RowOutput, Split, TaskData
from .tasks.registry import model_head
from .units import SlicePlan, UnitGroup

VERSIONED = ("torch", "transformers", "onnx", "onnxruntime", "onnxruntime-gpu", "numpy", "scipy", "tokenizers")


@dataclass
class Variants:
    """Hold the three models on the CPU, and what they were made by."""

    dense: nn.Module
    virtual: nn.Module
    sliced: nn.Module
    groups: tuple[UnitGroup, ...]
    plan: SlicePlan
    refitted: list[str]

    def items(self) -> dict[str, nn.Module]:
        return {"dense": self.dense, "virtual": self.virtual, "sliced": self.sliced}


def run(recipe: Recipe, reporter: Reporter | None = None, *, export: bool = True, bench: bool = True) -> Bundle:
    """Run a recipe and publish its bundle; nothing is left behind, and an old bundle untouched, if it fails.

    Raises DeployPruneError: see `errors` for the tree and its exit codes.
    """
    reporter = reporter or Silent()
    device = resolve_device(recipe.device)
    source, task_name, data_path = _resolve(recipe, reporter)
    destination = recipe.destination(task_name)
    with staging(destination) as bundle:
        head_kind = task_head(task_name)
        dense = load_dense(source, head_kind)
        data = load_task(
            task_name,
            tokenizer=dense.tokenizer,
            config=dense.model.config,
            data=data_path,
            max_length=recipe.max_length,
            text_column=recipe.text_column,
            label_column=recipe.label_column,
        )
        head = Head(head_kind, pooling=recipe.pooling)
        label_free = _label_free(recipe, data)
        rows = _calibration_rows(recipe, data, reporter)

        dense.model.to(device)
        pruned = prune_rows(
            dense.model,
            head,
            rows,
            recipe.keep_flops,
            seq_len=recipe.seq_len,
            pad_id=_pad_id(dense),
            options=Options(
                criterion=recipe.criterion,
                rearrange=recipe.rearrange,
                compensate=recipe.compensate,
                label_free=label_free,
                min_heads=recipe.min_heads,
                min_neurons=recipe.min_neurons,
                seed=recipe.seed,
                forward_dtype=recipe.forward_dtype,
            ),
            reporter=reporter,
        )
        recorder = Recorder(device)
        recorder.records = pruned.stages
        variants = _variants(dense.model, pruned.groups, pruned.plan, pruned.updates, recorder)
        bundle.manifest.budget = {"kind": "flops", "keep": recipe.keep_flops, "seq_len": pruned.budget.seq_len}
        bundle.manifest.recipe = recipe.model_dump(mode="json")
        bundle.manifest.task = _task_entry(task_name, head, data)
        _fill(bundle, variants, dense, head, recipe.model)
        _evaluate(bundle, variants, data, head, device, recorder, reporter)
        _store(bundle, variants, dense, recorder)
        _guard(bundle, recipe)
        _finish(bundle, variants.items(), recipe, recorder, reporter, export=export, bench=bench)
        return publish(bundle, destination)


def slice_given(
    model: str,
    masks: Sequence[Path],
    out: str | Path,
    *,
    task: str | None = None,
    data: str | None = None,
    seq_len: int = 128,
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
            task = task or infer_task(config, has_text_pair=data_has_pair(Path(data)))
            task_data = load_task(task, tokenizer=dense.tokenizer, config=dense.model.config, data=data)
        recorder = Recorder(torch.device("cpu"))
        groups = arch_of(dense.model).groups(dense.model)
        plan = SlicePlan.from_masks(groups, read_masks(masks, groups))
        variants = _variants(dense.model, groups, plan, {}, recorder)
        share = encoder_flops(groups, seq_len, plan) / encoder_flops(groups, seq_len)
        bundle.manifest.budget = {"kind": "masks", "keep": share, "seq_len": seq_len}
        bundle.manifest.task = _task_entry(task, head, task_data)
        _fill(bundle, variants, dense, head, model)
        _evaluate(bundle, variants, task_data, head, torch.device("cpu"), recorder, reporter)
        _store(bundle, variants, dense, recorder)
        recipe = Recipe(model=model, task=task, data=data, out=str(out))
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
) -> None:
    """Export, measure and report a bundle in place; the last step of every way to make one."""
    from .export import export_bundle
    from .runtime_bench.bench import bench_bundle
    from .runtime_bench.report import write_report

    if export:
        with recorder.stage("export") as record, reporter.stage("export") as progress:
            step = Steps(progress, 2 * len(VARIANTS) * len(recipe.formats) * len(recipe.precisions))
            made = export_bundle(
                bundle, formats=recipe.formats, precisions=recipe.precisions, models=models, progress=step
            )
            record["artifacts"] = len(made)
        _commit(bundle, recorder)
    if export and bench:
        with recorder.stage("bench") as record, reporter.stage("bench") as progress:
            cells = len(recipe.runtimes) * len(recipe.batches)
            step = Steps(progress, cells * (1 + len(VARIANTS)))
            result = bench_bundle(
                bundle,
                runtimes=recipe.runtimes,
                batches=recipe.batches,
                max_seconds_per_cell=recipe.bench_seconds,
                progress=step,
            )
            record["failures"] = len(result["failures"])
    _commit(bundle, recorder)
    write_report(bundle)
    bundle.commit()


class Steps:
    """Turn the names of steps into a finished share."""

    def __init__(self, progress: Any, total: int) -> None:
        self.progress, self.total, self.done = progress, max(total, 1), 0

    def __call__(self, name: str) -> None:
        self.progress(min(self.done / self.total, 1.0))
        self.done += 1


def _resolve(recipe: Recipe, reporter: Reporter) -> tuple[str, str, str | None]:
    """Return the checkpoint, the task's name and the data's path; the demo is made where it is asked for."""
    if recipe.model == "demo":
        from .demo import prepare_demo

        with reporter.paused():
            paths = prepare_demo()
        return str(paths.model), recipe.task or "text-classification", recipe.data or str(paths.data)
    source = str(Path(recipe.model).resolve()) if Path(recipe.model).is_dir() else recipe.model
    config = load_config(source)
    task = recipe.task
    if task is None:
        pair = data_has_pair(Path(recipe.data), text_column=recipe.text_column) if recipe.data else None
        task = infer_task(config, has_text_pair=pair)
        reporter.note(f"Task inferred from the model and the data: {task}")
    check_task(task, config)
    return source, task, recipe.data


def _label_free(recipe: Recipe, data: TaskData) -> bool:
    if data.head == "embedding":
        return True
    if recipe.label_free is None:
        return not data.train.labelled
    if not recipe.label_free and not data.train.labelled:
        raise InputError(
            "Calibration with labels was asked for, but the training rows have none.",
            hint="Name the label column with --label-column, or use --label-free.",
        )
    return recipe.label_free


def _calibration_rows(recipe: Recipe, data: TaskData, reporter: Reporter) -> list[Row]:
    total = len(data.train)
    if total < MIN_SAMPLES:
        raise InputError(
            f"The training split has {total} rows; at least {MIN_SAMPLES} are needed to calibrate.",
            hint="Give more training rows. Evaluation rows are never used.",
        )
    rows = data.train.encode(sample_indices(total, recipe.samples, recipe.seed))
    reporter.note(f"Calibrating on {len(rows)} of {total} training rows (seed {recipe.seed})")
    return rows


def _variants(
    model: nn.Module,
    groups: tuple[UnitGroup, ...],
    plan: SlicePlan,
    updates: Mapping[str, OutputWeights],
    recorder: Recorder,
) -> Variants:
    with recorder.stage("slice"):
        model = model.cpu()
        on_cpu = {name: OutputWeights(u.weight.cpu(), u.bias.cpu()) for name, u in updates.items()}
        virtual = mask_model(model, groups, plan, on_cpu)
        sliced = slice_model(model, groups, plan, on_cpu)
    return Variants(model, virtual, sliced, groups, plan, sorted(on_cpu))


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
    manifest.versions = {"deploy_prune": __version__, "python": platform.python_version(), **_versions()}
    manifest.model = {
        "name": name,
        "source": dense.source,
        "sha256": dense.sha256,
        "model_type": variants.dense.config.model_type,  # type: ignore[union-attr]
        "architecture": type(variants.dense).__name__,
        "inputs": input_names(variants.dense, dense.tokenizer),
        "pad_id": _pad_id(dense),
    }
    manifest.plan = {
        "hash": plan.hash,
        "layers": plan.layer_counts(),
        "total": SlicePlan.from_masks(
            variants.groups, {g.name: np.ones(g.size) for g in variants.groups}
        ).layer_counts(),
        "refitted": variants.refitted,
    }
    manifest.counts = _counts(variants, head, seq_len, manifest.model["inputs"])


def _counts(variants: Variants, head: Head, seq_len: int, inputs: Sequence[str]) -> dict[str, dict[str, int]]:
    """Count FLOPs by the formula and check them against the models that run."""
    from .runtime_bench.flops import count_torch

    feeds = {name: torch.ones(1, seq_len, dtype=torch.long) for name in inputs}
    plans: dict[str, SlicePlan | None] = {"dense": None, "virtual": None, "sliced": variants.plan}
    params = {name: sum(p.numel() for p in model.parameters()) for name, model in variants.items().items()}
    expected = params["dense"] - removed_params(variants.groups, variants.plan)
    if params["sliced"] != expected:
        raise RuntimeError(f"The sliced model has {params['sliced']} parameters, the plan says {expected}")
    counts: dict[str, dict[str, int]] = {}
    for name, model in variants.items().items():
        counted = count_torch(_WithHead(model, head), feeds)
        encoder = encoder_flops(variants.groups, seq_len, plans[name])
        counts[name] = {
            "flops": counted,
            "encoder_flops": encoder,
            "params": params[name],
            "weight_bytes": 4 * params[name],
        }
        if counted - encoder != counts["dense"]["flops"] - counts["dense"]["encoder_flops"]:
            raise RuntimeError(f"{name}: {counted} FLOPs counted, the formula's encoder has {encoder}")
    return counts


class _WithHead(nn.Module):
    def __init__(self, model: nn.Module, head: Head) -> None:
        super().__init__()
        self.model, self.head = model, head

    def forward(self, **inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(self.head.outputs(self.model, inputs).values())


def _evaluate(
    bundle: Bundle,
    variants: Variants,
    data: TaskData | None,
    head: Head,
    device: torch.device,
    recorder: Recorder,
    reporter: Reporter,
) -> None:
    """Measure quality and fidelity on the evaluation splits, and check that sliced equals virtual."""
    manifest = bundle.manifest
    pad_id = int(manifest.model["pad_id"])
    splits: dict[str, Split | None] = dict(data.evals) if data else {"random tokens": None}
    with recorder.stage("evaluate") as record, reporter.stage("evaluate") as progress:
        for number, (split_name, split) in enumerate(splits.items()):
            rows = split.rows() if split else _random_rows(variants.dense, manifest.model["inputs"], pad_id)
            outputs = {}
            for position, (name, model) in enumerate(variants.items().items()):
                share = Share(progress, number * 3 + position, 3 * len(splits))
                outputs[name] = predict(model.to(device), head, rows, pad_id=pad_id, progress=share)
                model.cpu()
            _check_equal(outputs["virtual"], outputs["sliced"], arch_of(variants.dense).tolerance)
            quality = {name: _quality(data, split, out, outputs["dense"]) for name, out in outputs.items()}
            if number:
                for name, entry in quality.items():
                    manifest.quality[name].setdefault("splits", {})[split_name] = entry
                continue
            manifest.quality = quality
            manifest.fidelity = _fidelity(head, outputs) if split else {"kl": None, "agreement": None, "virtual": {}}
            manifest.fidelity |= {"n": len(rows), "split": split_name}
            for case in _golden(variants, head, rows, pad_id):
                bundle.add_golden(case)
            record["rows"] = len(rows)


class Share:
    """Map the progress 0..1 of one of several equal parts to the whole's."""

    def __init__(self, progress: Progress, part: int, parts: int) -> None:
        self.progress, self.part, self.parts = progress, part, parts

    def __call__(self, share: float) -> None:
        self.progress((self.part + share) / self.parts)


def _fidelity(head: Head, outputs: Mapping[str, Sequence[RowOutput]]) -> dict[str, Any]:
    return {
        **fidelity(head.kind, outputs["dense"], outputs["sliced"]),
        "virtual": fidelity(head.kind, outputs["dense"], outputs["virtual"]),
        "sliced_to_virtual": fidelity(head.kind, outputs["virtual"], outputs["sliced"]),
    }


def _quality(
    data: TaskData | None, split: Split | None, outputs: Sequence[RowOutput], dense: Sequence[RowOutput]
) -> dict[str, Any]:
    """Return one quality entry: the primary metric, and all of them under "all"."""
    if data is None or split is None or not (split.labelled or data.head == "embedding"):
        return {"metric": None, "value": None, "n": len(split) if split else 0}
    scores = split.score(outputs, dense)
    name = data.metric if data.metric in scores else next(iter(scores))
    return {"metric": name, "value": scores[name], "n": len(split), "all": dict(scores)}


def _random_rows(model: nn.Module, inputs: Sequence[str], pad_id: int) -> list[Row]:
    """Return rows of random tokens of several lengths, where there are no data to compare models on."""
    rng = np.random.default_rng(0)
    vocabulary = int(model.config.vocab_size)  # type: ignore[union-attr, arg-type]
    rows = []
    for length in (9, 17, 6, 12, 5, 8, 11, 16):
        ids = rng.integers(1, vocabulary, length)
        ids[ids == pad_id] = (pad_id + 1) % vocabulary
        ones = {
            "input_ids": ids,
            "attention_mask": np.ones(length, np.int64),
            "token_type_ids": np.zeros(length, np.int64),
        }
        rows.append(Row({name: ones[name].astype(np.int64) for name in inputs}))
    return rows


def _pad_id(dense: Dense) -> int:
    return int(dense.tokenizer.pad_token_id or 0)


def _check_equal(virtual: Sequence[RowOutput], sliced: Sequence[RowOutput], tolerance: float) -> None:
    """Raise VerdictError unless the sliced model equals the masked one to rounding error."""
    worst = max(float(np.abs(a[n] - b[n]).max()) for a, b in zip(virtual, sliced, strict=True) for n in a)
    scale = max(1.0, max(float(np.abs(a[n]).max()) for a in virtual for n in a))
    if worst > tolerance * scale:
        raise VerdictError(
            f"The sliced model differs from the masked one by {worst:.2e} (allowed: {tolerance * scale:.0e}).",
            hint="This is a bug in the architecture's adapter: please report it with the model's config.json.",
        )


def _golden(variants: Variants, head: Head, rows: Sequence[Row], pad_id: int) -> list[GoldenCase]:
    """Make golden cases from evaluation rows: one row, a padded batch, and a batch padded beyond its rows."""
    from .batches import Batches

    cases = []
    shapes = ((rows[:1], 0), (rows[1:5] or rows[:1], 0), (rows[5:7] or rows[:1], 7))
    limit = _max_positions(variants.dense)
    for chosen, extra in shapes:
        batch = Batches([Row(r.features) for r in chosen], head, pad_id).collate(list(range(len(chosen))))
        length = batch.inputs["input_ids"].shape[1]
        extra = max(0, min(extra, limit - length))
        inputs = {
            name: torch.nn.functional.pad(t, (0, extra), value=pad_id if name == "input_ids" else 0)
            for name, t in batch.inputs.items()
        }
        case = GoldenCase({name: t.numpy() for name, t in inputs.items()}, {})
        with torch.inference_mode():
            for name, model in variants.items().items():
                outputs = head.outputs(model, inputs)
                case.outputs[name] = {k: v.float().numpy().copy() for k, v in outputs.items()}
        cases.append(case)
    return cases


def _max_positions(model: Any) -> int:
    """Return how many tokens the position embeddings allow."""
    config = model.config
    offset = config.pad_token_id + 1 if config.model_type in ("roberta", "xlm-roberta", "mpnet") else 0
    return int(config.max_position_embeddings) - offset


def _store(bundle: Bundle, variants: Variants, dense: Dense, recorder: Recorder) -> None:
    """Write plan.json and the sliced checkpoint, and commit the staging folder."""
    with disk_errors(bundle.root):
        write_atomically(bundle.root / "plan.json", json.dumps(variants.plan.to_dict(), indent=1) + "\n")
        bundle.register("plan.json")
        for path in save_sliced(copy.copy(variants.sliced), dense.tokenizer, bundle.root / "sliced"):
            bundle.register(str(path.relative_to(bundle.root)))
    _commit(bundle, recorder)


def _commit(bundle: Bundle, recorder: Recorder) -> None:
    bundle.manifest.stages = [Stage.model_validate(r) for r in recorder.records]
    bundle.commit()


def _guard(bundle: Bundle, recipe: Recipe) -> None:
    """Raise VerdictError when the pruned model is worse than the recipe allows."""
    found = bundle.manifest.fidelity.get("agreement")
    if recipe.min_agreement is not None:
        if found is None:
            raise InputError("--min-agreement does not apply to this task.", hint="Leave it out.")
        if found < recipe.min_agreement:
            raise VerdictError(
                f"The pruned model agrees with the dense one on {found:.4f} of the rows, not {recipe.min_agreement}.",
                hint="Keep more FLOPs, or use more samples. No bundle was written.",
            )
    if recipe.max_quality_loss is not None:
        values = {name: bundle.manifest.quality[name]["value"] for name in ("dense", "sliced")}
        if None in values.values():
            raise InputError("--max-quality-loss needs labelled evaluation data.", hint="Leave it out.")
        loss = 100 * (values["dense"] - values["sliced"])
        if loss > recipe.max_quality_loss:
            raise VerdictError(
                f"The pruned model loses {loss:.2f} points of quality; allowed: {recipe.max_quality_loss}.",
                hint="Keep more FLOPs, or use more samples. No bundle was written.",
            )


def _versions() -> dict[str, str]:
    found = {}
    for name in VERSIONED:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
