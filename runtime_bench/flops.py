"""Count FLOPs exactly: 2 x MAC of matrix products and convolutions, in an ONNX graph or a torch model."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError, MissingExtraError

if TYPE_CHECKING:
    from torch import Tensor, nn

Shape = tuple[int, ...]
Lookup = Callable[[str], Shape]  # value name -> its shape; raises InputError when unknown

# Contrib operators that hold no matrix product; any other operator outside the ONNX standard is refused.
_FREE_CONTRIB = {"BiasGelu", "FastGelu", "Gelu", "QuickGelu", "LayerNormalization", "SimplifiedLayerNormalization"}
_FREE_CONTRIB |= {"SkipLayerNormalization", "SkipSimplifiedLayerNormalization", "QuantizeLinear", "DequantizeLinear"}
_UNCOUNTED = {"Einsum", "ConvTranspose", "DeformConv", "LSTM", "GRU", "RNN", "If", "Loop", "Scan"}
_UNCOUNTED |= {"QLinearMatMul", "QLinearConv", "ConvInteger", "LinearAttention"}


def count_onnx(path: str | Path, shapes: Mapping[str, Shape]) -> int:
    """Return the FLOPs (2 x MAC) of an ONNX graph run on inputs of the given shapes.

    Raises InputError for a node that computes products but cannot be counted: an operator not known
    here, or one whose shapes ONNX shape inference does not find. None is left out silently.
    """
    graph = _with_shapes(Path(path), shapes)
    known = {v.name: _dims(v) for v in (*graph.input, *graph.value_info, *graph.output)}

    def shape_of(name: str) -> Shape:
        shape = known.get(name)
        if shape is None:
            raise InputError(f"The shape of '{name}' in {path} is unknown: its FLOPs cannot be counted.")
        return shape

    return sum(_node_flops(node, shape_of, path) for node in graph.node)


def input_axes(path: str | Path) -> dict[str, tuple[int | None, ...]]:
    """Return the axes of an ONNX file's inputs by name, None for a free axis."""
    proto, names = _weightless(Path(path).resolve(), Path(path).stat().st_mtime_ns)
    values = {v.name: v.type.tensor_type.shape.dim for v in proto.graph.input if v.name in names}
    return {name: tuple(d.dim_value if d.HasField("dim_value") else None for d in v) for name, v in values.items()}


def _node_flops(node: Any, shape_of: Lookup, path: str | Path) -> int:
    if node.domain in ("", "ai.onnx"):
        if node.op_type in _COUNTERS:
            return _COUNTERS[node.op_type](node, shape_of)
        if node.op_type not in _UNCOUNTED:
            return 0
    elif node.domain == "com.microsoft":
        if node.op_type == "MultiHeadAttention":
            return _multi_head_attention(node, shape_of)
        if node.op_type in _FREE_CONTRIB:
            return 0
    raise InputError(f"The FLOPs of {node.domain or 'ai.onnx'}::{node.op_type} ('{node.name}' in {path}) are unknown.")


def _matmul(node: Any, shape_of: Lookup) -> int:
    inner = shape_of(node.input[0])[-1]
    return 2 * math.prod(shape_of(node.output[0])) * inner


def _gemm(node: Any, shape_of: Lookup) -> int:
    rows = shape_of(node.input[0])  # (M, K), or (K, M) when transposed
    inner = rows[0] if _attribute(node, "transA", 0) else rows[1]
    return 2 * math.prod(shape_of(node.output[0])) * inner


def _conv(node: Any, shape_of: Lookup) -> int:
    kernel = shape_of(node.input[1])  # (C_out, C_in / groups, *window)
    return 2 * math.prod(shape_of(node.output[0])) * math.prod(kernel[1:])


def _attention(node: Any, shape_of: Lookup) -> int:
    """Count scores and context: 2 B H Tq Tk (dh + dv); Q (B, H, T, dh), or (B, T, H dh) with a head count."""
    q, k, v = (shape_of(name) for name in node.input[:3])
    if len(q) == 4:
        past = shape_of(node.input[4])[2] if len(node.input) > 4 and node.input[4] else 0
        return 2 * q[0] * q[1] * q[2] * (k[2] + past) * (q[3] + v[3])
    heads, kv_heads = _attribute(node, "q_num_heads", 0), _attribute(node, "kv_num_heads", 0)
    past = shape_of(node.input[4])[2] if len(node.input) > 4 and node.input[4] else 0
    return 2 * q[0] * q[1] * (k[1] + past) * (q[2] + heads * (v[2] // kv_heads))


def _multi_head_attention(node: Any, shape_of: Lookup) -> int:
    """Count scores and context of the contrib operator with query, key, value (B, T, H dh) given apart."""
    if len(node.input) < 3 or not all(node.input[:3]):
        raise InputError(f"MultiHeadAttention '{node.name}' has packed inputs: its FLOPs cannot be counted.")
    q, k, v = (shape_of(name) for name in node.input[:3])
    if len(q) != 3 or len(k) != 3 or len(v) != 3 or any(node.input[6:8]):
        raise InputError(f"MultiHeadAttention '{node.name}' has packed or past keys: FLOPs cannot be counted.")
    return 2 * q[0] * q[1] * k[1] * (q[2] + v[2])


_COUNTERS: dict[str, Callable[[Any, Lookup], int]] = {
    "MatMul": _matmul,
    "MatMulInteger": _matmul,
    "Gemm": _gemm,
    "Conv": _conv,
    "Attention": _attention,
}


def _with_shapes(path: Path, shapes: Mapping[str, Shape]) -> Any:
    """Load a graph without its weights, fix its input shapes and infer all others."""
    import onnx

    file, names = _weightless(path.resolve(), path.stat().st_mtime_ns)
    proto = onnx.ModelProto()
    proto.CopyFrom(file)
    graph = proto.graph
    inputs = [i for i in graph.input if i.name in names]
    if {i.name for i in inputs} != set(shapes):
        raise InputError(
            f"{path} takes {', '.join(i.name for i in inputs)}; shapes were given for {', '.join(shapes)}."
        )
    sizes: dict[str, int] = {}
    for value in inputs:
        _fix(value, shapes[value.name], sizes, path)
    for value in (*graph.value_info, *graph.output):  # what the exporter knew, at these sizes
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in sizes:
                dim.dim_value = sizes[dim.dim_param]
            elif dim.HasField("dim_param"):
                dim.Clear()
    try:
        inferred = onnx.shape_inference.infer_shapes(proto, strict_mode=True, data_prop=True).graph
    except onnx.shape_inference.InferenceError as error:
        raise InputError(f"The shapes in {path} contradict each other: {error}") from error
    # Inference gives no shapes of initializers that stayed.
    inferred.value_info.extend(
        onnx.helper.make_tensor_value_info(t.name, t.data_type, t.dims) for t in graph.initializer
    )
    return inferred


@lru_cache(maxsize=8)  # a matrix counts the same files at every shape
def _weightless(path: Path, changed_ns: int) -> tuple[Any, frozenset[str]]:
    """Load a graph with its functions inlined and its float weights as inputs; return the names of its real inputs.

    Of a float weight only the shape matters: as an input it needs no data, and inference is quick.
    """
    try:
        import onnx
        import onnx.inliner
    except ImportError as error:
        raise MissingExtraError("onnx", "cpu") from error
    proto = onnx.load(path, load_external_data=False)
    if proto.functions:
        proto = onnx.inliner.inline_local_functions(proto)
    graph = proto.graph
    initializers = {t.name for t in graph.initializer}
    inputs = frozenset(i.name for i in graph.input if i.name not in initializers)
    small = [t for t in graph.initializer if t.data_type in (onnx.TensorProto.INT64, onnx.TensorProto.INT32)]
    weights = [t for t in graph.initializer if t.data_type not in (onnx.TensorProto.INT64, onnx.TensorProto.INT32)]
    graph.input.extend(onnx.helper.make_tensor_value_info(t.name, t.data_type, t.dims) for t in weights)
    del graph.initializer[:]
    graph.initializer.extend(small)
    return proto, inputs


def _fix(value: Any, shape: Shape, sizes: dict[str, int], path: Path) -> None:
    """Give an input its shape and note the size of each named axis."""
    dims = value.type.tensor_type.shape.dim
    if len(dims) != len(shape):
        raise InputError(f"Input {value.name} of {path} has {len(dims)} axes, not {len(shape)}.")
    for dim, size in zip(dims, shape, strict=True):
        if dim.HasField("dim_value"):
            known = dim.dim_value
        else:
            known = sizes.setdefault(dim.dim_param or f"{value.name}, unnamed axis", size)
        if known != size:
            raise InputError(f"An axis of input {value.name} of {path} is {known}, not {size}.")
        dim.dim_value = size


def _dims(value: Any) -> Shape | None:
    if not value.type.tensor_type.HasField("shape"):
        return None
    dims = value.type.tensor_type.shape.dim
    if not all(d.HasField("dim_value") for d in dims):
        return None
    return tuple(d.dim_value for d in dims)


def _attribute(node: Any, name: str, default: int) -> int:
    return next((int(a.i) for a in node.attribute if a.name == name), default)


def count_torch(model: nn.Module, inputs: Mapping[str, Tensor]) -> int:
    """Return the FLOPs (2 x MAC) of one forward pass of a torch model."""
    from ..archs.conv import count_products

    return count_products(lambda: model(**inputs))
