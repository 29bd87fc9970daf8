"""What an exporter is, what it is asked for, and how one is found by its format's name. No heavy imports."""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cache, cached_property
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from ..bundle import PRECISIONS, Artifact
from ..config import ExportSettings
from ..errors import InputError, MissingExtraError
from ..runtimes import Runner
from ..signature import Signature, signature_of

if TYPE_CHECKING:
    from torch import nn

    from ..heads import Head

DIALECTS = ("opset18", "opset23", "mha")
SCHEMES = ("dynamic", "qdq")
Shape = tuple[int, int]  # batch, sequence
PROTOBUF_BYTES = 2_000_000_000  # weights above this do not fit into one file: protobuf holds at most 2 GiB
Feeds = dict[str, np.ndarray]


@dataclass(frozen=True)
class Kind:
    """Tell one sort of file from another; a bundle holds one file of each kind for a variant."""

    format: str
    dialect: str
    precision: str
    scheme: str | None = None  # of quantisation
    shape: Shape | None = None  # a fixed batch and sequence; None: both are free

    @property
    def label(self) -> str:
        shape = f"{self.shape[0]}x{self.shape[1]}" if self.shape else None
        return "-".join(filter(None, (self.format, self.dialect, self.precision, self.scheme, shape)))


@dataclass(frozen=True)
class Profile:
    """Hold the smallest, the usual and the largest (batch, sequence) that an engine takes."""

    smallest: Shape
    usual: Shape
    largest: Shape

    def __str__(self) -> str:
        return ":".join(f"{b}x{t}" for b, t in (self.smallest, self.usual, self.largest))


def read_profile(text: str) -> Profile | Shape:
    """Read "1x128" (a fixed shape) or "1x8:1x128:8x384" (smallest, usual, largest). Raises InputError."""
    parts = [re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", part.strip()) for part in text.split(":")]
    shapes = [(int(p[1]), int(p[2])) for p in parts if p]
    if len(shapes) != len(parts) or len(shapes) not in (1, 3):
        raise InputError(
            f"'{text}' is no profile.",
            hint="Write BATCHxLENGTH, as 1x128, or smallest:usual:largest, as 1x8:1x128:8x384.",
        )
    if len(shapes) == 1:
        return shapes[0]
    if any(not shapes[0][i] <= shapes[1][i] <= shapes[2][i] for i in (0, 1)):
        raise InputError(f"The profile {text} does not rise from the smallest to the largest.", hint="Mind the order.")
    return Profile(*shapes)


@dataclass(frozen=True)
class Options:
    """Say how files are made; every field has a flag of the export command and a key of the recipe."""

    dialects: tuple[str, ...] = ("opset23",)
    schemes: tuple[str, ...] = SCHEMES
    shape: Shape | None = None
    profile: Profile | None = None
    calibrate_by: Literal["minmax", "percentile", "entropy"] = "minmax"
    calibration_rows: int = 256
    external_data_above_bytes: int = PROTOBUF_BYTES
    builder_level: int | None = None
    version_compatible: bool = False
    hardware_compatible: bool = False
    refit: bool = False
    strip: bool = False
    compute_capabilities: tuple[str, ...] = ()  # "8.9"; none: every one that the builder knows
    aot_inductor: bool = False
    exporter: Literal["torch", "optimum"] = "torch"

    @classmethod
    def of(cls, settings: ExportSettings) -> Options:
        """Take over a recipe's or the command line's settings. Raises InputError for a profile that is none."""
        same = {
            f.name: getattr(settings, f.name) for f in fields(cls) if hasattr(settings, f.name) and f.name != "profile"
        }
        profile = read_profile(settings.profile) if settings.profile else None
        if isinstance(profile, tuple):
            return cls(**same, shape=profile)
        return cls(**same, profile=profile)


@dataclass
class Source:
    """Hold what is exported: a model with its head, what it takes, and what the file says of its origin.

    `feeds` gives the calibration batches of static quantisation; `make` makes another kind of file of
    the same model, checked, and returns its path: engines and OpenVINO files are made from ONNX files.
    """

    model: nn.Module
    head: Head
    inputs: Signature | Sequence[str]
    metadata: Mapping[str, str]
    options: Options = field(default_factory=Options)
    usual_length: int = 128  # tokens; the budget's
    feeds: Callable[[], Sequence[Feeds]] | None = None
    make: Callable[[Kind], Path] | None = None

    @cached_property
    def signature(self) -> Signature:
        """What the model takes."""
        return signature_of(getattr(self.model, "config", None), self.inputs)

    @property
    def input_names(self) -> tuple[str, ...]:
        return self.signature.inputs

    @cached_property
    def program(self) -> Any:
        """The model as one ExportedProgram with free batch and sequence; all dialects are made from it."""
        from .program import program_from_torch

        return program_from_torch(self.model, self.head, self.signature)

    def calibration(self) -> Sequence[Feeds]:
        """Return the calibration batches. Raises InputError when there are none."""
        if self.feeds is None:
            raise InputError(
                "Static int8 needs calibration data, and there are none.",
                hint="Give the task's data, or export --scheme dynamic.",
            )
        return self.feeds()

    def made(self, kind: Kind) -> Path:
        """Return the checked file of another kind, made now if it was not yet."""
        if self.make is None:
            raise InputError(f"{kind.label} cannot be made here.", hint="Export a bundle, not a single model.")
        return self.make(kind)


class Exporter(Protocol):
    """Write one format.

    A module of this folder offers its exporters in a table `EXPORTERS` (format -> Exporter); other
    packages do so through the entry-point group "deploy_prune.exporters".
    """

    suffix: str  # of the file, ".onnx"
    packages: tuple[str, ...]  # whose versions a file depends on, as pip names them

    def missing(self) -> Exception | None:
        """Return the error that says which package is not here, or None."""

    def kinds(self, precision: str, options: Options) -> Sequence[Kind | str] | str:
        """Return the kinds of file that a precision stands for, and reasons for those that there are not."""

    def export(self, kind: Kind, source: Source, path: Path) -> Mapping[str, Any]:
        """Write the source to `path`, and to one companion beside it where the format needs that.

        Returns what the manifest shall say of the file beyond its kind: `engine`, `reproduce`, `signature`, and
        `source`, the kind of the file it was built from where the bundle shall keep that one too.
        """

    def runner(self, artifact: Artifact, path: Path) -> Runner | str:
        """Return a runner of such a file, to compare it with its model, or why it cannot run on this machine."""

    def rename_data(self, path: Path, name: str) -> None:
        """Make the file at `path` read its companion under another name beside it."""


def missing_package(extra: str, *modules: str) -> Exception | None:
    """Return the error that names the first module that is not installed, and the extra that holds it."""
    return next((MissingExtraError(m, extra) for m in modules if find_spec(m) is None), None)


@cache
def available_exporters() -> dict[str, Exporter]:
    """Map every format's name to its exporter."""
    found: dict[str, Exporter] = {}
    for module in pkgutil.iter_modules(importlib.import_module(__package__).__path__):
        found |= getattr(importlib.import_module(f"{__package__}.{module.name}"), "EXPORTERS", {})
    return found | {point.name: point.load() for point in entry_points(group="deploy_prune.exporters")}


@dataclass(frozen=True)
class Skipped:
    """Say why a format in a precision is not exported."""

    format: str
    precision: str | None
    reason: str


def plan_kinds(formats: Sequence[str], precisions: Sequence[str], options: Options) -> tuple[list[Kind], list[Skipped]]:
    """Return the kinds of files to make, and what is skipped with the reason; "auto" is every format that can be built.

    Raises InputError for an unknown format, precision, dialect or scheme, and the format's own error when
    a package that was asked for by name is not installed.
    """
    exporters = available_exporters()
    _known("format", [f for f in formats if f != "auto"], [*exporters, "auto"])
    _known("precision", precisions, PRECISIONS)
    _known("dialect", options.dialects, DIALECTS)
    _known("scheme", options.schemes, SCHEMES)
    kinds: list[Kind] = []
    skipped: list[Skipped] = []
    for name in dict.fromkeys(f for given in formats for f in (sorted(exporters) if given == "auto" else [given])):
        if (error := exporters[name].missing()) is not None:
            if name in formats:
                raise error
            skipped.append(Skipped(name, None, str(error).splitlines()[0]))
            continue
        for precision in dict.fromkeys(precisions):
            found = exporters[name].kinds(precision, options)
            for entry in [found] if isinstance(found, str) else found:
                if isinstance(entry, Kind):
                    kinds.append(entry)
                else:
                    skipped.append(Skipped(name, precision, entry))
    return kinds, skipped


def _known(what: str, given: Sequence[str], there: Sequence[str]) -> None:
    for name in given:
        if name not in there:
            raise InputError(f"No {what} '{name}'.", hint=f"There are: {', '.join(sorted(there))}.")
