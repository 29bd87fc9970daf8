"""What is measured: a variant of a bundle in a precision, or any ONNX file; and the inputs that it is fed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..bundle import PRECISIONS, VARIANTS, Bundle, Variant
from ..errors import InputError
from ..runtimes import Runner, open_onnx, open_runner
from ..signature import Signature

SEED = 0  # of the token ids
FILE_LENGTH = 128  # tokens, where nothing says how long texts are
_TOKEN_INPUTS = ("input_ids", "attention_mask", "token_type_ids")
_VOCABULARY = 1000  # token ids below this suit a file that does not say how many it knows


@dataclass(frozen=True)
class Subject:
    """Name a model to measure: `path` is a bundle's folder or, without a variant and precision, an ONNX file."""

    name: str
    path: str
    variant: Variant | None = None
    precision: str | None = None
    rows: Mapping[str, int] = field(default_factory=dict)  # of a file's tables, by the input that looks up in them

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def open(self, runtime: str, threads: int | None) -> Runner:
        """Return its runner, not yet open."""
        if self.variant is None:
            return open_onnx(self.path, runtime, threads=threads)
        bundle = Bundle.open(self.path, verify=False)  # the parent has checked the hashes
        return open_runner(bundle, runtime, self.variant, threads=threads, precision=self.precision or "fp32")

    def feeds(self, runner: Runner, batch: int, seq: int) -> dict[str, np.ndarray]:
        """Return inputs for its open runner, always the same ones."""
        if self.variant is None:
            return file_feeds(self.rows, runner, batch, seq)
        return bundle_feeds(Bundle.open(self.path, verify=False), runner, batch, seq)

    def flops(self, batch: int, seq: int) -> int | None:
        """Return the FLOPs (2 x MAC) of a run, counted on the ONNX file (a bundle's: of fp32), or None without one."""
        if self.variant is None:
            return _file_flops(Path(self.path), batch, seq)
        bundle = Bundle.open(self.path, verify=False)
        kinds = [(a.variant, a.format, a.precision, a.shape) for a in bundle.manifest.artifacts]
        wanted = (self.variant, "onnx", "fp32", None)
        if wanted not in kinds:
            return None
        from .flops import count_onnx

        path = bundle.path(bundle.manifest.artifacts[kinds.index(wanted)].path)
        return count_onnx(path, Signature.of_manifest(bundle.manifest.model).shapes(batch, seq))


def bundle_subjects(bundle: Bundle, models: Sequence[str], prefix: str = "") -> list[Subject]:
    """Read models as "sliced" or "sliced:int8". Raises InputError for a variant or precision that there is not."""
    found = []
    for model in models:
        variant, _, precision = model.partition(":")
        if variant not in VARIANTS:
            raise InputError(f"No variant '{variant}'.", hint=f"There are: {', '.join(VARIANTS)}; sliced:int8 is one.")
        if precision and precision not in PRECISIONS:
            raise InputError(f"No precision '{precision}'.", hint=f"There are: {', '.join(PRECISIONS)}.")
        found.append(Subject(f"{prefix}{model}", str(bundle.root.resolve()), variant, precision or "fp32"))
    return found


def distinct_names(paths: Sequence[str]) -> list[str]:
    """Return the last parts of paths, as many as tell them from each other, without ".onnx"."""
    parts = [Path(path.removesuffix(".onnx")).resolve().parts for path in paths]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(p[-count:]) for p in parts]
        if len(set(names)) == len(names):
            return names
    raise InputError("The same path is named twice.", hint="The control in each run compares a model with itself.")


def bundle_feeds(bundle: Bundle, runner: Runner, batch: int, seq: int) -> dict[str, np.ndarray]:
    """Return random token ids (batch, seq) within the vocabulary, without padding, or random pixels, always the same.

    Raises InputError for a length the model has no positions for, or an input unknown here.
    """
    signature = Signature.of_manifest(bundle.manifest.model)
    if signature.image:
        pixels = np.random.default_rng(SEED).normal(size=signature.shape(batch, seq)).astype(np.float32)
        return dict.fromkeys(runner.input_names, pixels)
    config = json.loads(Path(bundle.path("sliced/config.json")).read_text("utf-8"))
    longest = config.get("max_position_embeddings")
    if longest is not None and seq > longest:
        raise InputError(f"The model has {longest} positions, not {seq}.", hint="Bench at a shorter length.")
    feeds = _token_feeds((batch, seq), config["vocab_size"], config.get("pad_token_id"))
    if unknown := [name for name in runner.input_names if name not in feeds]:
        raise InputError(f"The bench does not know how to fill the inputs {', '.join(unknown)}.")
    return {name: feeds[name] for name in runner.input_names}


def file_subject(name: str, path: Path) -> Subject:
    """Return an ONNX file as a subject. Raises InputError when there is none, or it is none."""
    import onnx

    if not path.is_file():
        raise InputError(f"No ONNX file at {path}.")
    try:
        graph = onnx.load(path, load_external_data=False).graph
    except Exception as error:  # protobuf's own
        raise InputError(f"{path} is no ONNX file: {error}") from error
    tables = {t.name: int(t.dims[0]) for t in graph.initializer if t.dims}
    rows = {n.input[1]: tables[n.input[0]] for n in graph.node if n.op_type == "Gather" and n.input[0] in tables}
    return Subject(name, str(path.resolve()), rows=rows)


def file_feeds(rows: Mapping[str, int], runner: Runner, batch: int, seq: int) -> dict[str, np.ndarray]:
    """Return inputs for an ONNX file that says nothing of its vocabulary.

    A free first axis is the batch, any other free axis the sequence. Inputs named as tokenizers name them hold token
    ids below the rows of the table that they are looked up in; other integers are 0, floats are normal. Raises
    InputError for a file that is fixed to another shape.
    """
    firsts = [spec.shape[0] for spec in runner.inputs if len(spec.shape) > 1]
    if firsts and batch not in firsts and all(isinstance(first, int) for first in firsts):
        raise InputError(f"This file is fixed to batches of {firsts[0]}.", hint="Bench it at that batch.")
    feeds = {}
    for spec in runner.inputs:
        shape = _filled(spec.shape, batch, seq)
        if spec.name in _TOKEN_INPUTS and len(shape) == 2 and shape != (batch, seq):
            raise InputError(f"This file is fixed to {shape[0]}x{shape[1]}.", hint="Bench it at that batch and length.")
        tokens = _token_feeds(shape, rows.get(spec.name, _VOCABULARY), pad_id=None)
        if spec.name in tokens:
            feeds[spec.name] = tokens[spec.name].astype(spec.dtype)
        elif spec.dtype.kind == "f":
            feeds[spec.name] = np.random.default_rng(SEED).normal(size=shape).astype(spec.dtype)
        else:
            feeds[spec.name] = np.zeros(shape, spec.dtype)
    return feeds


def file_length(path: Path) -> int:
    """Return the length to run an ONNX file at by default: 128 tokens, or 1 for one that takes no texts."""
    from .flops import input_axes

    axes = input_axes(path)
    free = any(not isinstance(axis, int) for own in axes.values() for axis in own[1:])
    return FILE_LENGTH if free or set(axes) & set(_TOKEN_INPUTS) else 1


def _filled(axes: Sequence[int | str | None], batch: int, seq: int) -> tuple[int, ...]:
    """Give the free axes of a file's input their size: the first is the batch, any other the sequence."""
    return tuple(axis if isinstance(axis, int) else batch if place == 0 else seq for place, axis in enumerate(axes))


def _file_flops(path: Path, batch: int, seq: int) -> int | None:
    """Count a file's FLOPs, or return None for one that holds a node which cannot be counted."""
    from .flops import count_onnx, input_axes

    try:
        return count_onnx(path, {name: _filled(axes, batch, seq) for name, axes in input_axes(path).items()})
    except InputError:
        return None


def _token_feeds(shape: tuple[int, ...], vocabulary: int, pad_id: int | None) -> Mapping[str, np.ndarray]:
    ids = np.random.default_rng(SEED).integers(0, vocabulary, shape, dtype=np.int64)
    if pad_id is not None:  # some models count positions by it
        ids[ids == pad_id] = (pad_id + 1) % vocabulary
    return dict(zip(_TOKEN_INPUTS, (ids, np.ones_like(ids), np.zeros_like(ids)), strict=True))
