"""Lower the precision of an fp32 ONNX graph: fp16, and int8 in two schemes, by ONNX Runtime's own tools."""

from __future__ import annotations

import io
import math
import tempfile
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .program import quiet
from .registry import PROTOBUF_BYTES, Feeds

if TYPE_CHECKING:
    import onnx

# Sums over a row or a sequence overflow or lose digits in fp16: they stay in fp32, with casts around them.
# LayerNormalization has a switch for it of its own; Attention has one too, which TensorRT refuses.
KEPT_IN_FP32 = ("Softmax", "ReduceMean", "ReduceSum", "Pow", "Sqrt")
INNER_PRECISION = {"LayerNormalization": "stash_type"}
LARGEST_FP16 = 65504.0
QUANTISED = ("MatMul", "Gemm")
FLOAT = 1  # onnx.TensorProto.FLOAT, of what shape inference cannot name


def weight_bytes(proto: onnx.ModelProto) -> int:
    """Return the bytes of all constants of a graph."""
    import onnx

    types = onnx.helper.tensor_dtype_to_np_dtype
    return sum(math.prod(t.dims) * types(t.data_type).itemsize for t in proto.graph.initializer)


def to_fp16(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Return the graph in fp16, reductions in fp32, inputs and outputs as before; larger weights are clipped."""
    import onnx
    from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16
    from onnxruntime.transformers.onnx_model import OnnxModel

    kept = [*DEFAULT_OP_BLOCK_LIST, *KEPT_IN_FP32]
    indices = _indices(proto.graph)
    _own_constants(proto.graph, [n for n in proto.graph.node if n.op_type in kept or n.name in indices])
    with quiet("onnxruntime"):
        lowered = convert_float_to_float16(
            proto,
            keep_io_types=True,
            op_block_list=kept,
            node_block_list=indices,
            max_finite_val=LARGEST_FP16,
        )
    del lowered.graph.value_info[:]  # they still name the old types
    for node in lowered.graph.node:
        if (name := INNER_PRECISION.get(node.op_type)) is not None:
            kept = [a for a in node.attribute if a.name != name]
            del node.attribute[:]
            node.attribute.extend([*kept, onnx.helper.make_attribute(name, FLOAT)])
    model = OnnxModel(lowered)
    model.topological_sort()
    return model.model


def _indices(graph: onnx.GraphProto) -> list[str]:
    """Return the names of the nodes whose numbers become whole ones (buckets of positions), which rounding changes."""
    import onnx

    whole = (onnx.TensorProto.INT32, onnx.TensorProto.INT64)
    maker = {name: node for node in graph.node for name in node.output}
    casts = [n for n in graph.node if n.op_type == "Cast" and any(a.i in whole for a in n.attribute if a.name == "to")]
    found: dict[str, None] = {}
    names = [name for cast in casts for name in cast.input]
    while names:
        node = maker.get(names.pop())
        if node is not None and node.name not in found:
            found[node.name] = None
            names += node.input
    return list(found)


def _own_constants(graph: onnx.GraphProto, nodes: Sequence[onnx.NodeProto]) -> None:
    """Give nodes constants of their own: the converter casts a shared one twice under one name."""
    constants = {t.name: t for t in graph.initializer}
    for number, node in enumerate(nodes):
        for position, name in enumerate(node.input):
            if name in constants:
                copied = graph.initializer.add()
                copied.CopyFrom(constants[name])
                copied.name = node.input[position] = f"{name}_{number}_{position}"


def to_dynamic_int8(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Return the graph with int8 weights per channel; activations are quantised as they come (ONNX Runtime's CPU)."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    return _quantised(
        lambda path, out, large: quantize_dynamic(
            path,
            out,
            use_external_data_format=large,
            op_types_to_quantize=[*QUANTISED, "Gather"],
            per_channel=True,
            weight_type=QuantType.QInt8,
            extra_options={"MatMulConstBOnly": True, "DefaultTensorType": FLOAT},
        ),
        proto,
    )


def to_qdq_int8(proto: onnx.ModelProto, batches: Sequence[Feeds], method: str) -> onnx.ModelProto:
    """Return the graph with QuantizeLinear/DequantizeLinear pairs, as TensorRT and OpenVINO want them.

    Signed and symmetric, weights per channel, zero points 0, none on biases. The activations' ranges come
    from `batches` by "minmax", "percentile" or "entropy"; one batch's activations are held at a time.
    """
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.calibrate import create_calibrator, save_tensors_data

    how = {
        "minmax": CalibrationMethod.MinMax,
        "percentile": CalibrationMethod.Percentile,
        "entropy": CalibrationMethod.Entropy,
    }[method]

    def quantise(path: Path, out: Path, large: bool) -> None:
        ranges = path.with_name("ranges.json")
        calibrator = create_calibrator(
            path,
            [*QUANTISED],
            augmented_model_path=str(path.with_name("augmented.onnx")),
            calibrate_method=how,
            use_external_data_format=large,
            extra_options={"symmetric": True},
        )
        for batch in batches:  # one at a time: histograms take no batches of several lengths, and memory stays flat
            calibrator.collect_data(_Reader([batch]))
        save_tensors_data(calibrator.compute_data(), ranges)
        quantize_static(
            path,
            out,
            calibration_cache_path=ranges,
            calibrate_method=how,
            quant_format=QuantFormat.QDQ,
            use_external_data_format=large,
            op_types_to_quantize=[*QUANTISED],
            activation_type=QuantType.QInt8,
            weight_type=QuantType.QInt8,
            per_channel=True,
            extra_options={
                "ActivationSymmetric": True,
                "WeightSymmetric": True,
                "MatMulConstBOnly": True,
                "QuantizeBias": False,
                "DefaultTensorType": FLOAT,
                "OpTypesToExcludeOutputQuantization": [*QUANTISED],
                "QDQOpTypePerChannelSupportToAxis": {"MatMul": 1},
            },
        )

    _raise_biases(proto)
    return _quantised(quantise, proto)


def _raise_biases(proto: onnx.ModelProto) -> None:
    """Give biases (N,) the shape (1, 1, N), which adds the same.

    Where axes are fixed, ONNX Runtime 1.31 fuses a product (B, T, N) and a bias vector, and then gives the quantised
    input of the fusion a zero point of another type than it says: such a file does not load.
    """
    import onnx

    if weight_bytes(proto) > PROTOBUF_BYTES:
        return  # shapes are inferred on one protobuf
    graph = proto.graph
    known = onnx.shape_inference.infer_shapes(proto).graph.value_info
    cubes = {v.name for v in known if len(v.type.tensor_type.shape.dim) == 3}
    constants = {t.name: t for t in graph.initializer}
    products = {name for node in graph.node if node.op_type == "MatMul" for name in node.output if name in cubes}
    for node in graph.node:
        if node.op_type == "Add" and products & set(node.input):
            for name in node.input:
                if name in constants and len(constants[name].dims) == 1:
                    constants[name].dims[:] = [1, 1, *constants[name].dims]


class _Reader:
    """Hand batches to a calibrator, which asks for the next one until there is none."""

    def __init__(self, batches: Sequence[Feeds]) -> None:
        self.batches = iter(batches)

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self.batches, None)


def _quantised(quantise: Any, proto: onnx.ModelProto) -> onnx.ModelProto:
    """Run a quantiser, which reads and writes files, on a graph."""
    import onnx

    # The quantiser infers shapes itself; what the exporter noted of them contradicts the new types.
    del proto.graph.value_info[:]
    large = weight_bytes(proto) > PROTOBUF_BYTES
    with tempfile.TemporaryDirectory(prefix="deploy-prune-") as folder, quiet("root"), redirect_stdout(io.StringIO()):
        path, out = Path(folder) / "fp32.onnx", Path(folder) / "int8.onnx"
        onnx.save_model(proto, path, save_as_external_data=large, location="fp32.data")
        quantise(path, out, large)
        return onnx.load(out)
