"""Run a model in an inference runtime, numpy in and out; nothing heavy is imported before it is opened.

Every module here that has a `RUNTIMES` table (name -> opener) adds runtimes; other packages add theirs
through the entry-point group "deploy_prune.runtimes", each entry a name and an opener. A table `ONNX_RUNTIMES` (name ->
runner of a path and a number of threads) lists those that take any ONNX file, a table `LIBRARIES` (name -> packages)
what each imports when it opens a model.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from .base import Opener, Runner, TensorSpec

if TYPE_CHECKING:
    from ..bundle import Bundle, Variant

__all__ = [
    "Opener",
    "Runner",
    "TensorSpec",
    "available_runtimes",
    "import_libraries",
    "onnx_runtimes",
    "open_onnx",
    "open_runner",
]


@cache
def available_runtimes() -> dict[str, Opener]:
    """Map every runtime's name to the function that opens a variant of a bundle in it."""
    from importlib.metadata import entry_points

    return _tables("RUNTIMES") | {p.name: p.load() for p in entry_points(group="deploy_prune.runtimes")}


@cache
def onnx_runtimes() -> dict[str, Callable[[Path, int | None], Runner]]:
    """Map the names of the runtimes that read any ONNX file to what opens it with a number of threads."""
    return _tables("ONNX_RUNTIMES")


def import_libraries(runtime: str) -> None:
    """Import the packages that a runtime needs; one that is not there is told of when a model is opened."""
    for library in _tables("LIBRARIES").get(runtime, ()):
        with suppress(ImportError, OSError):
            importlib.import_module(library)


def _tables(name: str) -> dict[str, Any]:
    import pkgutil

    found: dict[str, Any] = {}
    for module in pkgutil.iter_modules(__path__):
        found |= getattr(importlib.import_module(f"{__name__}.{module.name}"), name, {})
    return found


def open_onnx(path: str | Path, runtime: str = "ort-cpu", *, threads: int | None = None) -> Runner:
    """Return the runner (not yet open) of any ONNX file. Raises InputError for a runtime that reads none."""
    if runtime not in onnx_runtimes():
        raise InputError(
            f"The runtime '{runtime}' reads no ONNX files.", hint=f"There are: {', '.join(sorted(onnx_runtimes()))}."
        )
    return onnx_runtimes()[runtime](Path(path), threads)


def open_runner(
    bundle: Bundle, runtime: str, variant: Variant, *, threads: int | None = None, precision: str = "fp32"
) -> Runner:
    """Return the runner (not yet open) of one variant of a bundle in the named runtime.

    Raises InputError for an unknown runtime or a variant that the bundle lacks.
    """
    runtimes = available_runtimes()
    if runtime not in runtimes:
        raise InputError(f"No runtime '{runtime}'.", hint=f"There are: {', '.join(sorted(runtimes))}.")
    return runtimes[runtime](bundle, variant, threads=threads, precision=precision)
