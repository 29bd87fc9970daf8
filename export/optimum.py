"""ONNX by optimum's own configuration, for users who live there; the same parity check holds.

optimum-onnx lives beside transformers below 4.58, so in an environment of its own. It exports through
TorchScript, which can be wrong at other shapes than the traced one without saying so: parity decides.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError, MissingExtraError
from .program import quiet

if TYPE_CHECKING:
    from torch import nn

    from ..tasks.base import HeadKind

DIALECT = "optimum"
OPSET = 18
TASKS: dict[HeadKind, str] = {
    "classification": "text-classification",
    "regression": "text-classification",
    "token": "token-classification",
    "qa": "question-answering",
}


def missing_optimum() -> Exception | None:
    """Return the error that says that optimum's exporter is not here, or None."""
    from importlib.util import find_spec

    try:
        found = find_spec("optimum.exporters.onnx")
    except ModuleNotFoundError:
        found = None
    return None if found else MissingExtraError("optimum-onnx", "optimum")


def onnx_from_optimum(model: nn.Module, head: HeadKind, path: Path) -> Any:
    """Write a model by optimum and return it as a ModelProto.

    Raises MissingExtraError without optimum-onnx and InputError for a head or model that it does not export.
    """
    import onnx

    if (error := missing_optimum()) is not None:
        raise error
    if head not in TASKS:
        raise InputError(
            f"optimum exports no {head} head.", hint="Leave --exporter away: torch's exporter writes this one."
        )
    from optimum.exporters.onnx import export
    from optimum.exporters.tasks import TasksManager

    with quiet("optimum.exporters.tasks", "optimum.exporters.onnx"):
        try:
            configure = TasksManager.get_exporter_config_constructor(
                "onnx", model=model, task=TASKS[head], library_name="transformers"
            )
            config = configure(model.config)
            export(model, config, path, opset=max(OPSET, config.DEFAULT_ONNX_OPSET))
        except (KeyError, ValueError) as error:
            raise InputError(f"optimum cannot export {type(model).__name__}: {error}") from error
    return onnx.load(path)
