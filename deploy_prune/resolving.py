"""What a recipe stands for: which checkpoint, task, budget and rows; what it asks in vain is refused here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from .archs import is_convolutional, max_positions
from .calibration import sample_indices
from .checkpoint import Dense, load_config
from .config import DEMO_MODELS, MIN_SAMPLES, Recipe
from .costs import Budget
from .errors import InputError
from .latency_table import read_latency_table
from .progress import Reporter
from .tasks import check_task, data_has_pair, infer_task
from .tasks.base import Row, TaskData
from .tasks.registry import model_modality


def resolve(recipe: Recipe, reporter: Reporter) -> tuple[str, str, Recipe]:
    """Return the checkpoint, the task's name, and the recipe with both; a demo is made where it is asked for."""
    if recipe.model in DEMO_MODELS:
        return _resolve_demo(recipe, reporter)
    source = str(Path(recipe.model).resolve()) if Path(recipe.model).is_dir() else recipe.model
    config = load_config(source)
    task = recipe.task
    if task is None:
        task = inferred_task(config, recipe.data, recipe.text_column)
        reporter.note(f"Task inferred from the model and the data: {task}")
    check_task(task, config)
    return source, task, recipe.model_copy(update={"task": task})


def inferred_task(config: Any, data: str | None, text_column: str | None = None) -> str:
    """Return the task that a model and its data are for. Raises InputError where they leave it open."""
    texts = data is not None and model_modality(config) == "text"
    return infer_task(config, has_text_pair=data_has_pair(Path(str(data)), text_column) if texts else None)


def _resolve_demo(recipe: Recipe, reporter: Reporter) -> tuple[str, str, Recipe]:
    from .demo import DEMOS, prepare_demo

    demo = DEMOS[recipe.model]
    paths = prepare_demo(recipe.model, reporter)
    task = recipe.task or demo.task
    check_task(task, load_config(str(paths.model)))
    update: dict[str, Any] = {"task": task, "data": recipe.data or str(paths.data)}
    if demo.samples is not None and "samples" not in recipe.model_fields_set:
        reporter.note(
            f"{recipe.model} has few training rows: calibrating on {demo.samples} instead of {recipe.samples}"
        )
        update["samples"] = demo.samples
    return str(paths.model), task, recipe.model_copy(update=update)


def budget_of(recipe: Recipe) -> Budget:
    """Return what a recipe bounds. Raises InputError for a latency table that cannot be read."""
    return Budget(
        keep_flops=recipe.keep_flops,
        seq_len=recipe.seq_len,
        keep_params=recipe.keep_params,
        max_bytes=recipe.max_bytes,
        keep_latency=recipe.keep_latency,
        lut=read_latency_table(recipe.lut) if recipe.lut else None,
        lengths=recipe.lengths,
        lengths_batch=recipe.lengths_batch,
    )


def check_length(seq_len: int | None, dense: Dense) -> None:
    """Raise InputError for a length that the model does not have."""
    if seq_len is None:
        return
    dense.signature.check_length(seq_len)
    limit = dense.signature.tokens or max_positions(dense.model)
    if seq_len > limit:
        raise InputError(f"seq_len {seq_len} is longer than the model's {limit} positions.", hint="Use a shorter one.")


def check_kind(recipe: Recipe, dense: Dense) -> None:
    """Raise InputError, before anything is computed, for what a recipe asks of another kind of model."""
    if recipe.lengths == "data" and dense.signature.image:
        raise InputError(
            "The model takes images of one size: they have no lengths to budget over.", hint="Leave --lengths out."
        )
    if is_convolutional(dense.model):
        if recipe.drop_layers or recipe.drop_sublayers:
            raise InputError("Whole blocks of a convolutional network cannot be left out.", hint="Cut channels alone.")
    elif recipe.cut_residual:
        raise InputError("--cut-residual is for convolutional networks.", hint="Leave it out.")


def check_offload(recipe: Recipe, dense: Dense, device: torch.device) -> None:
    """Raise InputError, before anything is computed, for what cannot be done with one layer on the device."""
    if not recipe.offload:
        return
    if device.type == "cpu":
        raise InputError("--offload is for GPUs: here the model lies in main memory anyway.", hint="Leave it out.")
    if is_convolutional(dense.model):
        raise InputError("--offload is for models with an encoder's layers.", hint="Leave it out.")
    if recipe.recovers or recipe.drop_layers or recipe.drop_sublayers:
        raise InputError(
            "Recovery and depth run whole models, and --offload has one layer on the GPU.",
            hint="Leave them out, or --offload.",
        )


def check_guards(recipe: Recipe, data: TaskData) -> None:
    """Raise InputError, before anything is computed, for a guard that the task or its data cannot have."""
    if recipe.min_agreement is not None and data.head in ("regression", "embedding"):
        raise InputError("--min-agreement does not apply to this task.", hint="Leave it out.")
    if recipe.max_quality_loss is not None and not (data.evaluation.labelled or data.head == "embedding"):
        raise InputError("--max-quality-loss needs labelled evaluation data.", hint="Leave it out.")


def is_label_free(recipe: Recipe, data: TaskData, dense: Dense) -> bool:
    """Say whether calibration draws its labels from the model. Raises InputError where there are none to read.

    By default it does for convolutional networks: they know their training images by heart, so that the true labels'
    gradients say little there (docs/results.md).
    """
    if data.head == "embedding":
        return True
    if recipe.label_free is None:
        return is_convolutional(dense.model) or not data.train.labelled
    if not recipe.label_free and not data.train.labelled:
        raise InputError(
            "Calibration with labels was asked for, but the training rows have none.",
            hint="Name the label column with --label-column, or use --label-free.",
        )
    return recipe.label_free


def calibration_rows(recipe: Recipe, data: TaskData, reporter: Reporter) -> list[Row]:
    """Return the rows to calibrate on, drawn from the training split. Raises InputError for too few."""
    check_rows(data)
    total = len(data.train)
    rows = data.train.encode(sample_indices(total, recipe.samples, recipe.seed))
    reporter.note(f"Calibrating on {len(rows)} of {total} training rows (seed {recipe.seed})")
    return rows


def check_rows(data: TaskData) -> None:
    """Raise InputError for a training split that is too small to calibrate on."""
    if len(data.train) < MIN_SAMPLES:
        raise InputError(
            f"The training split has {len(data.train)} rows; at least {MIN_SAMPLES} are needed to calibrate.",
            hint="Give more training rows. Evaluation rows are never used.",
        )
