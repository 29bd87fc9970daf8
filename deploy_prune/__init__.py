"""Prune a fine-tuned transformer without retraining, slice it, export it, measure it.

Importing this package imports nothing heavy: each name below is loaded when it is first used.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# ONNX Runtime else keeps an identifier of the machine in the user's cache and reports sessions to its makers.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

_LAZY = {
    "Budget": "costs",
    "Bundle": "bundle",
    "Options": "stages",
    "PrunedPlan": "stages",
    "Recipe": "config",
    "SlicePlan": "units",
    "export_onnx": "api",
    "load": "api",
    "load_module": "module_checkpoint",
    "load_task": "tasks",
    "prune": "api",
    "run": "pipeline",
    "save_module": "module_checkpoint",
    "slice_model": "api",
    "team": "parallel",
}
__all__ = ["__version__", *sorted(_LAZY)]

if TYPE_CHECKING:
    from .api import export_onnx, load, prune, slice_model
    from .bundle import Bundle
    from .config import Recipe
    from .costs import Budget
    from .module_checkpoint import load_module, save_module
    from .parallel import team
    from .pipeline import run
    from .stages import Options, PrunedPlan
    from .tasks import load_task
    from .units import SlicePlan


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
