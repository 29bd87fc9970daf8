"""A Triton model repository from a bundle: the model, and for texts an ensemble with the tokenizer before it."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...bundle import Artifact, Bundle, Variant
from ...disk import disk_errors, write_atomically
from ...errors import InputError, MissingExtraError
from ...runtimes.base import find_artifact
from ...signature import Signature

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TOKENIZER = "-tokenizer"  # behind the model's name: token ids of texts
ANSWERS = "-texts"  # the ensemble of the two: outputs of texts
KEPT_VERSIONS = 2
QUEUE_MICROSECONDS = 0  # a busy model gathers what waits; an idle one does not wait for company
TEXT_MODEL = Path(__file__).with_name("triton_tokenizer.py")
# Triton's ONNX Runtime is often older than the exporter: the lower opset first.
DIALECTS = ("opset18", "opset23")


def write_triton(
    bundle: Bundle,
    repository: Path,
    *,
    name: str | None = None,
    variant: Variant = "sliced",
    precision: str = "fp32",
    batch_rows: int = 32,
    instances: int = 1,
) -> list[Path]:
    """Add a bundle's model to a Triton model repository, as a new version where the name is there already.

    Takes the ONNX file of a variant and precision, and the TensorRT engine of the same as NAME-tensorrt where the
    bundle has one. Returns the models' folders. Raises InputError without an ONNX file of free axes, MissingExtraError
    without the protobuf of Triton's client.
    """
    name = name or bundle.root.resolve().name
    if not all(c.isalnum() or c in "-_." for c in name):
        raise InputError(f"{name!r} is no name for a model of Triton.", hint="Use letters, digits, '-', '_' and '.'.")
    onnx = find_artifact(bundle, variant, "onnx", precision, DIALECTS)
    if onnx.shape is not None:
        raise InputError(
            f"The bundle {bundle.root} has the {variant} {precision} model as ONNX of the one shape {onnx.shape} only.",
            hint="Triton gathers requests of any size: "
            f"deploy-prune export {bundle.root} --format onnx --precision {precision}",
        )
    engines = [
        a
        for a in bundle.manifest.artifacts
        if (a.variant, a.format, a.precision) == (variant, "tensorrt", precision) and a.parity.status == "passed"
    ]
    wrote = [_model(bundle, repository, name, onnx, "onnxruntime", batch_rows, instances)]
    for engine in engines[:1]:
        wrote.append(_model(bundle, repository, f"{name}-tensorrt", engine, "tensorrt", batch_rows, instances))
    if Signature.of_manifest(bundle.manifest.model).image is None:
        wrote.append(_tokenizer(bundle, repository, name, batch_rows))
        wrote.append(_ensemble(bundle, repository, name, batch_rows))
    return wrote


def _model(
    bundle: Bundle, repository: Path, name: str, artifact: Artifact, backend: str, batch_rows: int, instances: int
) -> Path:
    pb, signature = _protobuf(), Signature.of_manifest(bundle.manifest.model)
    config = pb.ModelConfig(name=name, backend=backend, max_batch_size=_rows(artifact, batch_rows))
    for tensor in _inputs(bundle, artifact):
        config.input.add(**tensor)
    for tensor in _outputs(bundle):
        config.output.add(**tensor)
    config.dynamic_batching.max_queue_delay_microseconds = QUEUE_MICROSECONDS
    gpu = backend == "tensorrt"
    group = pb.ModelInstanceGroup
    config.instance_group.add(count=instances, kind=group.KIND_GPU if gpu else group.KIND_AUTO)
    config.version_policy.latest.num_versions = KEPT_VERSIONS
    config.default_model_filename = "model.plan" if gpu else "model.onnx"
    warm = config.model_warmup.add(name="once", batch_size=1)
    for tensor in config.input:
        shape = list(signature.image) if signature.image else [16 if n < 0 else n for n in tensor.dims]
        given = pb.ModelWarmup.Input(data_type=tensor.data_type, dims=shape, zero_data=True)
        warm.inputs[tensor.name].CopyFrom(given)
    config.parameters["deploy_prune.plan_hash"].string_value = str(bundle.manifest.plan.get("hash"))
    files = {config.default_model_filename: bundle.path(artifact.path)}
    if artifact.data_path:
        files[Path(artifact.data_path).name] = bundle.path(artifact.data_path)
    return _write(repository, config, files)


def _tokenizer(bundle: Bundle, repository: Path, name: str, batch_rows: int) -> Path:
    """Write the model that tokenises; it needs the package `tokenizers` in Triton's Python."""
    from ...serve.preparation import Texts, open_preparation, read_json

    pb = _protobuf()
    config = pb.ModelConfig(name=name + TOKENIZER, backend="python", max_batch_size=batch_rows)
    config.input.add(name="TEXT", data_type=pb.TYPE_STRING, dims=[_parts(bundle)])
    for tensor in _inputs(bundle, None):
        config.output.add(**tensor)
    config.version_policy.latest.num_versions = KEPT_VERSIONS
    config.instance_group.add(count=1, kind=pb.ModelInstanceGroup.KIND_CPU)
    pad_id = int(bundle.manifest.model.get("pad_id", 0))
    texts: Any = open_preparation(bundle, read_json(bundle, "config.json"), pad_id, None)
    assert isinstance(texts, Texts)
    tokenizer: Tokenizer = texts.tokenizer  # as the edge loader pads and cuts
    with tempfile.TemporaryDirectory() as folder:
        saved = Path(folder) / "tokenizer.json"
        tokenizer.save(str(saved))
        return _write(repository, config, {"model.py": TEXT_MODEL, "tokenizer.json": saved})


def _ensemble(bundle: Bundle, repository: Path, name: str, batch_rows: int) -> Path:
    pb = _protobuf()
    config = pb.ModelConfig(name=name + ANSWERS, platform="ensemble", max_batch_size=batch_rows)
    config.input.add(name="TEXT", data_type=pb.TYPE_STRING, dims=[_parts(bundle)])
    for tensor in _outputs(bundle):
        config.output.add(**tensor)
    inner = [tensor["name"] for tensor in _inputs(bundle, None)]
    steps = config.ensemble_scheduling.step
    steps.add(
        model_name=name + TOKENIZER, model_version=-1, input_map={"TEXT": "TEXT"}, output_map={n: n for n in inner}
    )
    outputs = [tensor["name"] for tensor in _outputs(bundle)]
    steps.add(model_name=name, model_version=-1, input_map={n: n for n in inner}, output_map={n: n for n in outputs})
    return _write(repository, config, {})


def _write(repository: Path, config: Any, files: Mapping[str, Path]) -> Path:
    """Put a model's files into its next version, then its config; what is half written is never a version."""
    from google.protobuf import text_format

    folder = repository / config.name
    with disk_errors(repository):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".new-", dir=folder) as staging:
            made = Path(staging) / "version"
            made.mkdir()
            for name, path in files.items():
                shutil.copy(path, made / name)
            numbers = [int(p.name) for p in folder.iterdir() if p.name.isdigit()]
            made.rename(folder / str(max(numbers, default=0) + 1))
        write_atomically(folder / "config.pbtxt", text_format.MessageToString(config))
    return folder


def _inputs(bundle: Bundle, artifact: Artifact | None) -> Sequence[dict[str, Any]]:
    pb, signature = _protobuf(), Signature.of_manifest(bundle.manifest.model)
    kind = pb.TYPE_FP32 if signature.image else pb.TYPE_INT64
    fixed = artifact.shape[1] if artifact is not None and artifact.shape else -1
    dims = list(signature.image) if signature.image else [fixed]
    return [{"name": name, "data_type": kind, "dims": dims} for name in signature.inputs]


def _outputs(bundle: Bundle) -> Sequence[dict[str, Any]]:
    pb, head = _protobuf(), bundle.manifest.task["head"]
    (case, *_) = bundle.golden()
    per_token = {"token": 1, "qa": 1}.get(head, 0)
    return [
        {"name": n, "data_type": pb.TYPE_FP32, "dims": [-1] * per_token + list(a.shape[1 + per_token :])}
        for n, a in case.outputs["sliced"].items()
    ]


def _parts(bundle: Bundle) -> int:
    """Return how many texts a row has: 2 for questions with their context, else one or two."""
    return 2 if bundle.manifest.task["head"] == "qa" else -1


def _rows(artifact: Artifact, batch_rows: int) -> int:
    return artifact.shape[0] if artifact.shape else batch_rows


def _protobuf() -> Any:
    try:
        from tritonclient.grpc import model_config_pb2
    except ImportError as error:
        raise MissingExtraError(str(error.name), "serve") from error
    return model_config_pb2


def settings_of(path: Path) -> Any:
    """Parse a config.pbtxt by Triton's own protobuf. Raises InputError for one that it would not take."""
    from google.protobuf import text_format

    try:
        return text_format.Parse(path.read_text("utf-8"), _protobuf().ModelConfig())
    except (text_format.ParseError, OSError) as error:
        raise InputError(f"{path} is no configuration of Triton: {error}") from error


def tokenizer_settings(folder: Path) -> dict[str, Any]:
    """Return how the tokenizer of a written model pads and cuts."""
    contents = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    return {name: contents[name] for name in ("padding", "truncation")}
