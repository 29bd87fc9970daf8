"""What every runner does: open, check the feeds, run, close. No heavy imports."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Protocol

import numpy as np

from ..errors import InputError

if TYPE_CHECKING:
    from ..bundle import Artifact, Bundle, Variant

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class TensorSpec:
    """Describe one input; an axis is a fixed size or the name of a size that is free."""

    name: str
    dtype: np.dtype
    shape: tuple[int | str, ...]


class Runner(ABC):
    """Run one model in one runtime; use it as a context manager.

    `with OrtRunner(path) as runner: outputs = runner.infer(feeds)`
    """

    inputs: tuple[TensorSpec, ...] = ()  # known once it is open
    output_names: tuple[str, ...] = ()
    provider: str = ""  # what really computes, as the runtime calls it
    device_ns: int | None = None  # of the last run, on the device alone, where the runtime can tell
    compiles_in_first_run: bool = False
    cuda_graphs: bool = False  # whether a run replays a captured CUDA graph
    _open = False

    @property
    def input_names(self) -> tuple[str, ...]:
        return tuple(spec.name for spec in self.inputs)

    @abstractmethod
    def _activate(self) -> None:
        """Load the model and set `inputs`, `output_names` and `provider`."""

    @abstractmethod
    def _infer(self, feeds: Arrays) -> Arrays:
        """Run on checked feeds."""

    @abstractmethod
    def _deactivate(self) -> None:
        """Free what `_activate` took."""

    def __enter__(self) -> Runner:
        self._activate()
        self._open = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open = False
        self._deactivate()

    def file_bytes(self) -> int | None:
        """Return the size of the file it opens, companions with the weights included; None where it opens none."""
        path: Path | None = getattr(self, "path", None)
        if path is None:
            return None
        beside = weight_files(path) if path.suffix == ".onnx" else {path.with_suffix(".bin")}
        return sum(file.stat().st_size for file in {path, *beside} if file.is_file())

    def infer(self, feeds: Mapping[str, np.ndarray]) -> Arrays:
        """Return the outputs by name.

        Raises InputError for a missing or extra input, a wrong dtype, rank or size, and when not open.
        """
        if not self._open:
            raise InputError(f"{type(self).__name__} is not open.", hint="Use it in a with statement.")
        check_feeds(self.inputs, feeds)
        return self._infer(dict(feeds))


def weight_files(path: Path) -> set[Path]:
    """Return the files beside an ONNX file that hold its weights."""
    import onnx

    tensors = onnx.load(path, load_external_data=False).graph.initializer
    return {path.parent / e.value for tensor in tensors for e in tensor.external_data if e.key == "location"}


class Opener(Protocol):
    """Make the runner of one variant of a bundle; raises InputError when the bundle lacks what it needs."""

    def __call__(
        self, bundle: Bundle, variant: Variant, *, threads: int | None = None, precision: str = "fp32"
    ) -> Runner: ...


def find_artifact(
    bundle: Bundle, variant: Variant, format: str, precision: str = "fp32", prefer: Sequence[str] = ()
) -> Artifact:
    """Return the bundle's artifact of a variant in a format and precision, free axes first.

    Of several, the one whose dialect or scheme stands first in `prefer`. Raises InputError when there is none.
    """
    found = [a for a in bundle.manifest.artifacts if (a.variant, a.format, a.precision) == (variant, format, precision)]
    if not found:
        raise InputError(
            f"The bundle {bundle.root} has no {precision} {format} file of the {variant} model.",
            hint=f"Export it first: deploy-prune export {bundle.root} --format {format} --precision {precision}",
        )

    def rank(artifact: Artifact) -> tuple[bool, list[int]]:
        names = (artifact.dialect, artifact.scheme)
        return artifact.shape is not None, [
            prefer.index(n) if n is not None and n in prefer else len(prefer) for n in names
        ]

    return min(found, key=rank)


def check_feeds(specs: tuple[TensorSpec, ...], feeds: Mapping[str, np.ndarray]) -> None:
    """Check names, dtypes, ranks and sizes; sizes of one name must agree. Raises InputError."""
    names = [spec.name for spec in specs]
    takes = f"The model takes {', '.join(names)}."
    if missing := [n for n in names if n not in feeds]:
        raise InputError(f"Missing inputs: {', '.join(missing)}.", hint=f"The model takes {', '.join(names)}.")
    if extra := sorted(set(feeds) - set(names)):
        raise InputError(f"Unknown inputs: {', '.join(extra)}.", hint=takes)
    sizes: dict[str, tuple[int, str]] = {}
    for spec in specs:
        array = feeds[spec.name]
        if array.dtype != spec.dtype:
            raise InputError(
                f"Input {spec.name} is {array.dtype}, expected {spec.dtype}.",
                hint=f"Convert it with .astype('{spec.dtype}').",
            )
        wanted = f"Input {spec.name} has shape {array.shape}, expected ({', '.join(map(str, spec.shape))})"
        if array.ndim != len(spec.shape):
            raise InputError(f"{wanted}.", hint="Mind the batch axis.")
        for size, axis in zip(array.shape, spec.shape, strict=True):
            known, owner = (axis, "the model")
            if isinstance(axis, str):
                known, owner = sizes.setdefault(axis, (size, spec.name))
            if size != known:
                raise InputError(f"{wanted} with {axis} = {known} as in {owner}.", hint="Pad all inputs to one shape.")
