"""Run a model in an inference runtime, numpy in and out; nothing heavy is imported before it is opened.

Every module here that has a `RUNTIMES` table (name -> opener) adds runtimes; other packages add theirs
through the entry-point group "deploy_prune.runtimes", each entry a name and an opener.
"""

from __future__ import annotations

import importlib
from functools import cache
from typing import TYPE_CHECKING

from ..errors import InputError
from .base import Opener, Runner, TensorSpec

if TYPE_CHECKING:
    from ..bundle import Bundle, Variant

__all__ = ["Opener", "Runner", "TensorSpec", "available_runtimes", "open_runner"]


@cache
def available_runtimes() -> dict[str, Opener]:
    """Map every runtime's name to the function that opens a variant of a bundle in it."""
    import pkgutil
    from importlib.metadata import entry_points

    found: dict[str, Opener] = {}
    for module in pkgutil.iter_modules(__path__):
        found |= getattr(importlib.import_module(f"{__name__}.{module.name}"), "RUNTIMES", {})
    found |= {point.name: point.load() for point in entry_points(group="deploy_prune.runtimes")}
    return found


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
