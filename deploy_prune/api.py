"""The Python API, for any loaded module with an adapter; the command line is a thin layer over the same parts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from .archs import check_model, is_convolutional, of_transformers
from .bundle import Bundle, Variant
from .calibration import sample_indices
from .checkpoint import load_variant
from .config import MIN_SAMPLES
from .costs import Budget
from .errors import InputError
from .heads import Head
from .image_settings import model_size
from .progress import Reporter
from .pruner import prune_rows
from .signature import Signature, image_signature, takes_images
from .stages import Options, PrunedPlan
from .surgery import surgery_of
from .tasks.base import HeadKind, Row, TaskData
from .tasks.registry import model_head
from .units import SlicePlan


def prune(
    model: nn.Module,
    data: TaskData | Sequence[Row],
    budget: Budget | float,
    *,
    samples: int = 2048,
    pad_id: int = 0,
    cut_residual: bool = False,
    options: Options | None = None,
    reporter: Reporter | None = None,
) -> PrunedPlan:
    """Decide which heads and neurons, or channels, of a loaded model stay, and refit what is left.

    The model is not changed. `data` is a loaded task (its training split is sampled) or tokenised rows. `budget` is the
    share of the dense encoder's (of a convolutional network: of all) FLOPs to keep, in (0, 1], or a Budget: FLOPs,
    parameters, bytes, latency. `cut_residual` also cuts the channels of a convolutional network's residual streams.
    Runs on the model's device. Raises InputError, UnsupportedModelError or InfeasibleBudgetError.
    """
    options = options or Options(label_free=is_convolutional(model))
    if not is_convolutional(model):
        check_model(model)
        if cut_residual:
            raise InputError("cut_residual is for convolutional networks.", hint="Leave it out.")
    if not isinstance(budget, Budget):
        if not isinstance(budget, int | float):
            raise InputError(f"The budget {budget!r} is neither a number nor a Budget.")
        budget = Budget(float(budget))
    if isinstance(data, TaskData):
        head = Head(data.head)
        rows: Sequence[Row] = data.train.encode(sample_indices(len(data.train), samples, options.seed))
    else:
        head = Head(_head(model))
        rows = data
    if len(rows) < MIN_SAMPLES:
        raise InputError(f"{len(rows)} rows are too few to calibrate on.", hint=f"Give at least {MIN_SAMPLES}.")
    return prune_rows(
        model.eval(), head, rows, budget, pad_id=pad_id, residual=cut_residual, options=options, reporter=reporter
    )


def slice_model(model: nn.Module, plan: PrunedPlan | SlicePlan) -> Any:
    """Return a smaller copy of the dense model, of the same class, equal to the masked one."""
    if isinstance(plan, PrunedPlan):
        return replace(plan.surgery, model=model).slice(plan.plan, plan.updates)  # type: ignore[type-var]
    if is_convolutional(model):
        raise InputError(
            "The layers of a convolutional network cannot be told from a SlicePlan.", hint="Give what prune returned."
        )
    return surgery_of(model).slice(plan)


def export_onnx(
    model: nn.Module,
    path: str | Path,
    *,
    input_names: Sequence[str] | None = None,
    head: HeadKind | None = None,
    image: tuple[int, int, int] | None = None,
) -> Path:
    """Write a dense, masked or sliced model as ONNX (opset 23, dynamic batch and sequence) and return the path.

    `input_names` default to input_ids and attention_mask, or to the images of an image model; `image` is their size
    (C, H, W), by default what the model's config or `save_module` named. Raises InputError where that is not known.
    """
    from .export.onnx import onnx_from_torch

    kind = head or _head(model)
    onnx_from_torch(model, Head(kind), Path(path), input_names=_inputs(model, input_names, image))
    return Path(path)


def _inputs(
    model: nn.Module, names: Sequence[str] | None, image: tuple[int, int, int] | None
) -> Signature | Sequence[str]:
    config: Any = model.config if of_transformers(model) else getattr(model, "module_config", None)
    if image is None and names is not None:
        return names
    if image is None and config is not None and not takes_images(config):
        return ("input_ids", "attention_mask")
    size = None if config is None else model_size(config)
    if image is None and size is None:
        raise InputError(
            f"It is not known which images this {type(model).__name__} takes.",
            hint="Give their size (C, H, W): image=(3, 224, 224).",
        )
    return image_signature(config, image or (int(config.num_channels), *size))  # type: ignore[misc]


def _head(model: nn.Module) -> HeadKind:
    return model_head(model.config, type(model).__name__) if of_transformers(model) else "classification"


def load(bundle: str | Path | Bundle, variant: Variant = "sliced") -> Any:
    """Load a model from a bundle, bit for bit as it was saved.

    Raises BundleError when the bundle is missing or corrupted.
    """
    opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    return load_variant(opened, variant)
