"""What an exporter is, and how one is found by its format's name. No heavy imports."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from ..errors import InputError
from ..runtimes import Runner

if TYPE_CHECKING:
    from torch import nn

    from ..heads import Head


@dataclass(frozen=True)
class Source:
    """Hold what is exported: a model with its head, its inputs' names, and what the file says of its origin."""

    model: nn.Module
    head: Head
    input_names: Sequence[str]
    precision: str
    metadata: Mapping[str, str]


class Exporter(Protocol):
    """Write one format.

    A module of this folder offers its exporters in a table `EXPORTERS` (format -> Exporter); other
    packages do so through the entry-point group "deploy_prune.exporters".
    """

    dialect: str  # "opset23"
    scheme: str | None  # of quantisation
    precisions: tuple[str, ...]
    suffix: str  # of the file, ".onnx"

    def export(self, source: Source, path: Path) -> None:
        """Write the source to `path` (and, where the format needs it, to `path` + ".data")."""

    def relocate_data(self, path: Path, name: str) -> None:
        """Make the file at `path` read its separate data from a file of that name beside it."""

    def runner(self, path: Path) -> Runner:
        """Return a runner of such a file, to compare it with the model it was made from."""


@cache
def available_exporters() -> dict[str, Exporter]:
    """Map every format's name to its exporter."""
    found: dict[str, Exporter] = {}
    for module in pkgutil.iter_modules(importlib.import_module(__package__).__path__):
        found |= getattr(importlib.import_module(f"{__package__}.{module.name}"), "EXPORTERS", {})
    return found | {point.name: point.load() for point in entry_points(group="deploy_prune.exporters")}


def find_exporter(name: str, precision: str) -> Exporter:
    """Return the exporter of a format. Raises InputError for an unknown format or precision."""
    exporters = available_exporters()
    if name not in exporters:
        raise InputError(f"No export format '{name}'.", hint=f"There are: {', '.join(sorted(exporters))}.")
    if precision not in exporters[name].precisions:
        there = ", ".join(exporters[name].precisions)
        raise InputError(f"No precision '{precision}' for {name}.", hint=f"There are: {there}.")
    return exporters[name]
