"""What is fuzzed: each target reads bytes as a user's or a client's, and may raise nothing but DeployPruneError.

The first byte of some inputs chooses a variant of the format, so that one corpus serves several readers.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from deploy_prune import images
from deploy_prune.bundle import Bundle
from deploy_prune.config import BenchSettings, ExportSettings, GateSettings, Recipe, ServeSettings, load_settings
from deploy_prune.costs import latency_table
from deploy_prune.errors import DeployPruneError
from deploy_prune.images import ImageProcessor, open_image
from deploy_prune.latency_table import ChannelLatency, LatencyTable, LatencyTables, read_latency_table
from deploy_prune.lengths import Lengths
from deploy_prune.npz import read_npz
from deploy_prune.signature import Signature
from deploy_prune.tasks.arrays import read_arrays
from deploy_prune.tasks.conll import read_sentences
from deploy_prune.tasks.squad import read_questions
from deploy_prune.tasks.table import read_table
from deploy_prune.tune import TuneSettings
from deploy_prune.units import UnitGroup

ROOT = Path(tempfile.mkdtemp(prefix="fuzz-", dir="/dev/shm" if os.path.isdir("/dev/shm") else None))
MOST_ELEMENTS = 1 << 20  # of a tensor of a request
HEADS = UnitGroup("L00.heads", "head", 0, 4, 8, 32, 1, ("q", "k", "v"), "o", "residual")
Target = Callable[[bytes], None]


def file_of(data: bytes, name: str) -> Path:
    path = ROOT / name
    path.write_bytes(data)
    return path


def manifest(data: bytes) -> None:
    """Read manifest.json, with all that hangs on it: hashes, plan, golden cases, signature."""
    (ROOT / "bundle").mkdir(exist_ok=True)
    file_of(data, "bundle/manifest.json")
    bundle = Bundle.open(ROOT / "bundle")
    bundle.manifest.model_dump_json()
    for artifact in bundle.manifest.artifacts:
        bundle.path(artifact.path)
        assert isinstance(artifact.label + artifact.quality_text(), str)
    for read in (bundle.golden, bundle.plan, lambda: Signature.of_manifest(bundle.manifest.model)):
        attempt(read)


def plan(data: bytes) -> None:
    """Read plan.json."""
    (ROOT / "planned").mkdir(exist_ok=True)
    file_of(b"{}", "planned/manifest.json")
    file_of(data, "planned/plan.json")
    found = Bundle.open(ROOT / "planned").plan()
    found.masks()
    found.layer_counts()
    assert type(found).from_dict(found.to_dict()) == found


def recipe(data: bytes) -> None:
    """Read a TOML file as each command that takes one does."""
    path = file_of(data, "recipe.toml")
    for settings in (Recipe, BenchSettings, ExportSettings, GateSettings, ServeSettings, TuneSettings):
        attempt(lambda settings=settings: load_settings(settings, path, "run"))


def lut(data: bytes) -> None:
    """Read a latency table and look it up."""
    table = read_latency_table(file_of(data, "lut.json"))
    if isinstance(table, ChannelLatency):
        table.check([HEADS], table.image)
    else:
        table.check([HEADS])
    if isinstance(table, LatencyTables):
        latency_table([HEADS], table, Lengths.one(table.tables[0].seq))
    if isinstance(table, LatencyTable):
        assert table.costs(HEADS).shape == (HEADS.size + 1,)


def npz(data: bytes) -> None:
    """Read arrays as masks and as images."""
    path = file_of(data, "arrays.npz")
    for read in (read_npz, read_arrays):
        attempt(lambda read=read: read(path))


def separated(data: bytes) -> None:
    """Read tab- or comma-separated rows, and tagged words."""
    kind = data[:1]
    path = file_of(data[1:], "rows.csv" if kind < b"T" else "rows.tsv" if kind < b"Z" else "rows.conll")
    if path.suffix == ".conll":
        read_sentences(path, None, None)
    else:
        attempt(lambda: read_table(path, header=("a", "b"), skip_malformed=True))
        table = read_table(path)
        assert all(len(table.column(name)) == len(table) for name in table.columns)


def json(data: bytes) -> None:
    """Read JSON rows as a table, as questions and as tagged words."""
    path = file_of(data, "rows.json")
    for read in (read_table, read_questions, lambda p: read_sentences(p, None, None)):
        attempt(lambda read=read: read(path))


def image(data: bytes) -> None:
    """Decode an image and bring it to a model's size."""
    images.LARGE = 1 << 16  # a blank image takes its time, but is no news
    ImageProcessor((3, 8, 8), resize=(8, 8))([open_image(data, "it")])


def http(data: bytes) -> None:
    """Decode a request over HTTP; the first byte says how much of it is JSON (255: all)."""
    from deploy_prune.server.engine import Answer
    from deploy_prune.server.http import HEADER_LENGTH, decode, encode

    share, body = data[:1] or b"\xff", data[1:]
    length = {} if share == b"\xff" else {HEADER_LENGTH: str(len(body) * share[0] // 254)}
    asked, feeds = decode(body, length, MOST_ELEMENTS)
    encode(Answer("m", 1, feeds), asked)


def grpc(data: bytes) -> None:
    """Decode a request over gRPC."""
    from google.protobuf.message import DecodeError
    from tritonclient.grpc import service_pb2 as pb

    from deploy_prune.server.rpc import decode
    from deploy_prune.server.tensors import to_bytes

    try:
        request = pb.ModelInferRequest.FromString(data)
    except DecodeError:  # grpc answers it before our code is asked
        return
    for array in decode(request, MOST_ELEMENTS).values():
        to_bytes(array)


def served(data: bytes) -> None:
    """Check a decoded request as a model of token ids does before it runs, or read its texts."""
    from deploy_prune.server.http import decode

    _, feeds = decode(data, {}, MOST_ELEMENTS)
    if "text" in feeds:
        small_version().read_given(feeds)
    else:
        asyncio.run(small_version().infer(feeds))


@cache
def small_version() -> Any:
    """Return a model of at most 8 tokens of a vocabulary of 100, which answers nothing."""
    from deploy_prune.runtimes.base import TensorSpec
    from deploy_prune.server.versions import Serving, Version

    class Batcher:
        async def infer(self, feeds: Any) -> Any:
            return {}

    names = ("input_ids", "attention_mask", "token_type_ids")
    specs = tuple(TensorSpec(n, np.dtype(np.int64), ("batch", "sequence")) for n in names)
    version: Any = Version.__new__(Version)
    version.predictor = SimpleNamespace(
        runner=SimpleNamespace(inputs=specs), preparation=SimpleNamespace(most_tokens=8), vocabulary=100, token_types=2
    )
    version.serving, version.batcher = Serving(), Batcher()
    version.signature, version.head = SimpleNamespace(image=None), "classification"
    return version


def message(data: bytes) -> None:
    """Decode a request over gRPC that is written as JSON, so that its shapes and contents are what is changed."""
    from google.protobuf import json_format
    from tritonclient.grpc import service_pb2 as pb

    from deploy_prune.server.rpc import decode
    from deploy_prune.server.tensors import to_bytes

    try:
        request = json_format.Parse(data, pb.ModelInferRequest(), ignore_unknown_fields=True)
    except (json_format.Error, ValueError, TypeError, OverflowError, RecursionError):
        return  # it is none, whatever the client's language
    for array in decode(request, MOST_ELEMENTS).values():
        to_bytes(array)


def attempt(read: Callable[[], object]) -> None:
    """Read; a refusal is fine, and the next reader has its turn."""
    with contextlib.suppress(DeployPruneError):
        read()


TARGETS: dict[str, Target] = {
    f.__name__: f for f in (manifest, plan, recipe, lut, npz, separated, json, image, http, grpc, served, message)
}


def run(name: str, data: bytes) -> None:
    """Run a target; whatever it raises is a finding."""
    attempt(lambda: TARGETS[name](data))
