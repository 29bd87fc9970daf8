"""ONNX in three dialects: opset 18 (widest support), opset 23 (Attention nodes), MHA (for the CUDA provider)."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..bundle import Artifact
from ..errors import InputError, MissingExtraError
from ..runtimes import Runner
from ..runtimes.ort import OrtRunner
from ..signature import Signature, signature_of
from . import lower
from .mha import mha_from_attention
from .optimum import DIALECT, missing_optimum, onnx_from_optimum
from .program import program_from_torch, quiet
from .registry import PROTOBUF_BYTES, Feeds, Kind, Options, Shape, Source, missing_package

if TYPE_CHECKING:
    from torch import nn

    from ..heads import Head

OPSETS = {"opset18": 18, "opset23": 23, "mha": 23}


def onnx_from_torch(
    model: nn.Module,
    head: Head,
    path: str | Path,
    *,
    input_names: Signature | Sequence[str],
    dialect: str = "opset23",
    shape: Shape | None = None,
    metadata: Mapping[str, str] | None = None,
    external_data_above_bytes: int = PROTOBUF_BYTES,
) -> None:
    """Write a model with its head as ONNX: inputs (batch, sequence) int64 or images, outputs named by the head.

    `shape` fixes the axes; else batch and sequence are free. Weights above `external_data_above_bytes` in all go to
    `path` + ".data" beside it. The file has passed the ONNX checker. Raises InputError when the model
    cannot be traced or has an empty weight, MissingExtraError without torch, onnx or onnxscript.
    """
    signature = signature_of(getattr(model, "config", None), input_names)
    program = program_from_torch(model, head, signature)
    proto = proto_from_program(program, signature, head.output_names, dialect)
    write_onnx(proto, path, shape, metadata, external_data_above_bytes)


def proto_from_program(program: Any, signature: Signature, output_names: Sequence[str], dialect: str) -> Any:
    """Translate a traced program into an ONNX ModelProto of a dialect. Raises InputError where that fails."""
    try:
        import onnxscript  # noqa: F401  (the exporter needs it and names it badly)
        import torch
    except ImportError as error:
        raise MissingExtraError(str(error.name), "cpu") from error
    axes = {i: axis for i, axis in enumerate(signature.axes) if isinstance(axis, str)}
    with quiet(), redirect_stdout(io.StringIO()):
        try:
            translated: Any = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=OPSETS[dialect],
                input_names=list(signature.inputs),
                output_names=list(output_names),
                dynamic_shapes=(tuple(axes for _ in signature.inputs),),
                verbose=False,
            )
        except (torch.onnx.OnnxExporterError, torch.onnx.errors.OnnxExporterError) as error:
            raise InputError(
                f"The model cannot be exported to ONNX: {str(error).strip().splitlines()[0]}",
                hint="See the chained error with --debug.",
            ) from error
    _free_names(translated.model, output_names)
    proto = translated.model_proto
    _check_weights(proto)
    if dialect == "mha":
        return mha_from_attention(proto)
    _sum_residuals(proto)
    return proto


def write_onnx(
    proto: Any,
    path: str | Path,
    shape: Shape | None = None,
    metadata: Mapping[str, str] | None = None,
    external_data_above_bytes: int = PROTOBUF_BYTES,
) -> None:
    """Fix the axes if asked, add the metadata, save and check."""
    import onnx

    path = Path(path)
    if shape is not None:
        _fix_axes(proto, shape)
    del proto.metadata_props[:]
    onnx.helper.set_model_props(proto, {**(metadata or {})})
    if lower.weight_bytes(proto) > external_data_above_bytes:
        data = path.name + ".data"
        onnx.save_model(proto, path, save_as_external_data=True, location=data, size_threshold=1024)
    else:
        onnx.save_model(proto, path)
    onnx.checker.check_model(str(path), full_check=True)


def _fix_axes(proto: Any, shape: Shape) -> None:
    """Give the free axes their sizes; everything derived from them is inferred anew."""
    sizes = dict(zip(("batch", "sequence"), shape, strict=True))
    for value in (*proto.graph.input, *proto.graph.output):
        for axis in value.type.tensor_type.shape.dim:
            if axis.dim_param in sizes:
                axis.dim_value = sizes[axis.dim_param]
    del proto.graph.value_info[:]


def _free_names(model: Any, names: Sequence[str]) -> None:
    """Rename inner values that bear an output's name, which the exporter lets happen ("embedding")."""
    for node in model.graph:
        for value in node.outputs:
            if value.name in names and not value.is_graph_output():
                value.name = f"{value.name}_inner"


def _sum_residuals(proto: Any) -> None:
    """Write the residual's Add before a LayerNormalization as a Sum, which adds the same.

    ONNX Runtime fuses Add and LayerNormalization into one node that its CPU computes more slowly than the two:
    recipes/experiments/shapes.py measures it (`fusion`). The fused node is for GPUs, and in the mha dialect.
    """
    graph = proto.graph
    constants = {tensor.name for tensor in graph.initializer}
    normalised = {node.input[0] for node in graph.node if node.op_type == "LayerNormalization"}
    for node in graph.node:
        if node.op_type == "Add" and normalised & set(node.output) and not constants & set(node.input):
            node.op_type = "Sum"


def _check_weights(proto: Any) -> None:
    import onnx

    for tensor in proto.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT and 0 in tensor.dims:
            raise InputError(
                f"Weight {tensor.name} has the shape {tuple(tensor.dims)}: runtimes refuse empty weights.",
                hint="Replace the empty sub-layer by its bias (slicing does).",
            )


class OnnxExporter:
    """Write ONNX; lower precisions are made from the fp32 file of the same dialect."""

    suffix = ".onnx"
    packages: tuple[str, ...] = ("torch", "onnx", "onnxscript", "onnxruntime", "onnxruntime-gpu", "optimum-onnx")

    def missing(self) -> Exception | None:
        return missing_package("cpu", "torch", "onnx", "onnxscript", "onnxruntime")

    def kinds(self, precision: str, options: Options) -> Sequence[Kind | str] | str:
        if options.exporter == "optimum":
            if (error := missing_optimum()) is not None:
                raise error
            if precision != "fp32" or options.shape is not None:
                return "optimum writes fp32 with free axes here; lower precisions are made from torch's export"
            return [Kind("onnx", DIALECT, precision)]
        if precision == "bf16":
            return "ONNX Runtime's CPU provider does not compute in bf16, so that no file could be checked"
        schemes: tuple[str | None, ...] = options.schemes if precision == "int8" else (None,)
        # The fused nodes of the mha dialect are for the CUDA provider, which has no int8 of these.
        dialects = [d for d in options.dialects if not (d == "mha" and precision == "int8")]
        kinds: list[Kind | str] = [Kind("onnx", d, precision, s, options.shape) for d in dialects for s in schemes]
        without = len(dialects) < len(options.dialects)
        return [*kinds, *(["the mha dialect has no int8; opset18 and opset23 have"] if without else [])]

    def export(self, kind: Kind, source: Source, path: Path) -> Mapping[str, Any]:
        import onnx

        outputs, limit = source.head.output_names, source.options.external_data_above_bytes
        said: dict[str, Any] = {}
        if kind.dialect == DIALECT:
            proto = onnx_from_optimum(source.model, source.head.kind, path)
        elif kind.precision == "fp32":
            proto = proto_from_program(source.program, source.signature, outputs, kind.dialect)
        else:
            base = source.made(Kind("onnx", kind.dialect, "fp32", None, kind.shape))
            proto = onnx.load(base)
            if kind.precision == "fp16":
                proto = lower.to_fp16(proto)
            elif kind.scheme == "dynamic":
                proto = lower.to_dynamic_int8(proto)
            else:
                calibration: Sequence[Feeds] = source.calibration()
                method = source.options.calibrate_by
                proto = lower.to_qdq_int8(proto, calibration, method)
                rows = sum(len(next(iter(feeds.values()))) for feeds in calibration)
                said = {"calibration": {"method": method, "rows": rows}}
        write_onnx(proto, path, kind.shape, source.metadata, limit)
        return said

    def runner(self, artifact: Artifact, path: Path) -> Runner | str:
        return OrtRunner(path)

    def rename_data(self, path: Path, name: str) -> None:
        import onnx

        proto = onnx.load(path, load_external_data=False)
        for tensor in proto.graph.initializer:
            for entry in tensor.external_data:
                if entry.key == "location":
                    entry.value = name
        onnx.save_model(proto, path)


EXPORTERS = {"onnx": OnnxExporter()}
