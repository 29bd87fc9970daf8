"""ONNX by the dynamo exporter: opset 23, with real Attention nodes, dynamic batch and sequence."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError, MissingExtraError
from ..runtimes import Runner
from ..runtimes.ort import OrtRunner
from .registry import Source

if TYPE_CHECKING:
    from torch import nn

    from ..heads import Head

OPSET = 23
TRACED_SHAPE = (3, 11)  # batch, sequence: neither 0 nor 1 (dynamo fixes those), nor equal to each other
EXTERNAL_DATA_ABOVE_BYTES = 2_000_000_000  # protobuf holds at most 2 GiB


def onnx_from_torch(
    model: nn.Module,
    head: Head,
    path: str | Path,
    *,
    input_names: Sequence[str],
    opset: int = OPSET,
    metadata: Mapping[str, str] | None = None,
    external_data_above_bytes: int = EXTERNAL_DATA_ABOVE_BYTES,
) -> None:
    """Write a model with its head as ONNX: inputs (batch, sequence) int64, outputs named by the head.

    Weights above `external_data_above_bytes` in all go to `path` + ".data" beside it. The file has
    passed the ONNX checker. Raises InputError when the model cannot be traced or has an empty weight,
    MissingExtraError without torch, onnx or onnxscript.
    """
    try:
        import onnx
        import onnxscript  # noqa: F401  (the exporter needs it and names it badly)
        import torch
    except ImportError as error:
        raise MissingExtraError(str(error.name), "cpu") from error
    path = Path(path)
    model.eval()
    device = next(model.parameters()).device
    batch = torch.ones(TRACED_SHAPE, dtype=torch.long, device=device)
    with _quiet(), _sdpa(model):
        try:
            program: Any = torch.onnx.export(
                _with_head(model, head, input_names),
                tuple(batch.clone() for _ in input_names),
                dynamo=True,
                opset_version=opset,
                input_names=list(input_names),
                output_names=list(head.output_names),
                dynamic_shapes=(tuple({0: "batch", 1: "sequence"} for _ in input_names),),
                verbose=False,
            )
        except (torch.onnx.OnnxExporterError, torch.onnx.errors.OnnxExporterError) as error:
            reason = str(error).strip().splitlines()[0]
            raise InputError(
                f"{type(model).__name__} cannot be exported to ONNX: {reason}",
                hint="Its forward pass is not traceable; see the chained error with --debug.",
            ) from error
    _free_names(program.model, head.output_names)
    proto = program.model_proto
    _check_weights(proto)
    onnx.helper.set_model_props(proto, {**(metadata or {})})
    if sum(_weight_bytes(t) for t in proto.graph.initializer) > external_data_above_bytes:
        data = path.name + ".data"
        onnx.save_model(proto, path, save_as_external_data=True, location=data, size_threshold=1024)
    else:
        onnx.save_model(proto, path)
    onnx.checker.check_model(str(path), full_check=True)


def _with_head(model: nn.Module, head: Head, input_names: Sequence[str]) -> nn.Module:
    """Wrap a model so that it takes its inputs by position and returns its head's outputs as a tuple."""
    from torch import Tensor, nn

    class WithHead(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
            outputs = head.outputs(self.model, dict(zip(input_names, inputs, strict=True)))
            return tuple(outputs[name] for name in head.output_names)

    return WithHead().eval()


@contextmanager
def _sdpa(model: Any) -> Iterator[None]:
    """Use scaled_dot_product_attention where the model can: only that becomes an Attention node."""
    config = getattr(model, "config", None)
    before = getattr(config, "_attn_implementation", None)
    if before in (None, "sdpa") or not getattr(model, "_supports_sdpa", False):
        yield
        return
    model.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@contextmanager
def _quiet() -> Iterator[None]:
    """Hold back the exporter's progress lines and warnings; errors are raised as ever."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "transformers.modeling_utils")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _free_names(model: Any, names: Sequence[str]) -> None:
    """Rename inner values that bear an output's name, which the exporter lets happen ("embedding")."""
    for node in model.graph:
        for value in node.outputs:
            if value.name in names and not value.is_graph_output():
                value.name = f"{value.name}_inner"


def _check_weights(proto: Any) -> None:
    import onnx

    for tensor in proto.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT and 0 in tensor.dims:
            raise InputError(
                f"Weight {tensor.name} has the shape {tuple(tensor.dims)}: runtimes refuse empty weights.",
                hint="Replace the empty sub-layer by its bias (slicing does).",
            )


def _weight_bytes(tensor: Any) -> int:
    import math

    import onnx

    return math.prod(tensor.dims) * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize


class OnnxExporter:
    """Write ONNX in the dialect that ONNX Runtime's CPU provider runs fastest."""

    dialect = f"opset{OPSET}"
    scheme = None
    precisions = ("fp32",)
    suffix = ".onnx"

    def export(self, source: Source, path: Path) -> None:
        onnx_from_torch(source.model, source.head, path, input_names=source.input_names, metadata=source.metadata)

    def relocate_data(self, path: Path, name: str) -> None:
        import onnx

        proto = onnx.load(path, load_external_data=False)
        for tensor in proto.graph.initializer:
            for entry in tensor.external_data:
                if entry.key == "location":
                    entry.value = name
        onnx.save_model(proto, path)

    def runner(self, path: Path) -> Runner:
        return OrtRunner(path)


EXPORTERS = {"onnx": OnnxExporter()}
