"""The MHA dialect: ONNX Runtime's fused attention, one node a layer with that layer's own number of heads.

opset 23's Attention takes (B, H, T, dh) and a mask of (B, 1, T, T); com.microsoft::MultiHeadAttention takes
the projections as they come, (B, T, H * dh), and one number a token. A residual's sum joins the LayerNormalization
after it, a bias the Gelu. ONNX Runtime's own optimizer finds neither on these graphs: its shape inference gives up
at the mask.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..errors import InputError

if TYPE_CHECKING:
    import onnx

DOMAIN = "com.microsoft"
_PADDING = "key_padding_mask"


def mha_from_attention(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Rewrite every Attention node of an opset-23 graph and fuse the layers around them.

    A node without a mask (images) is fused as well; one whose mask is more than padding (a position bias is added to
    it) stays as it is. Raises
    InputError when the graph around an Attention node is not that of a projection split into heads.
    """
    import onnx
    from onnxruntime.transformers.onnx_model import OnnxModel

    nodes = list(proto.graph.node)
    for fuse, kind in ((_attention, "Attention"), (_skip_layer_norm, "LayerNormalization"), (_bias_gelu, "Gelu")):
        graph = _Graph(proto.graph)
        for node in [n for n in nodes if n.op_type == kind]:
            fuse(graph, node)
    if any(_PADDING in node.input for node in proto.graph.node):
        _add_padding_mask(proto)
    if not any(o.domain == DOMAIN for o in proto.opset_import):
        proto.opset_import.append(onnx.helper.make_opsetid(DOMAIN, 1))
    model = OnnxModel(proto)
    model.prune_graph()
    model.topological_sort()
    return model.model


class _Graph:
    """Find nodes by what they make and what takes it."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self.graph = graph
        self.maker = {name: node for node in graph.node for name in node.output}
        self.takers: dict[str, list[Any]] = {}
        for node in graph.node:
            for name in node.input:
                self.takers.setdefault(name, []).append(node)
        self.constants = {t.name: t for t in graph.initializer}
        self.types = {v.name: v.type.tensor_type.elem_type for v in graph.value_info}
        self.shapes = {
            v.name: tuple(d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim) for v in graph.value_info
        }

    def is_boolean(self, name: str) -> bool:
        import onnx

        return self.types.get(name) == onnx.TensorProto.BOOL

    def same_shape(self, a: str, b: str) -> bool:
        return a in self.shapes and self.shapes[a] == self.shapes.get(b)

    def replace(self, node: Any, kind: str, inputs: list[str], outputs: list[str], **attributes: Any) -> None:
        """Put a fused node in the place of one that made the first of its outputs."""
        from onnx import helper

        new = helper.make_node(kind, inputs, outputs, name=f"{node.name}_fused", domain=DOMAIN, **attributes)
        self.graph.node.insert(list(self.graph.node).index(node), new)
        self.graph.node.remove(node)

    def added_bias(self, name: str) -> tuple[str, str] | None:
        """Return x and the vector b where a value is x + b and nothing else takes it."""
        node = self.maker.get(name)
        if node is None or node.op_type != "Add" or len(self.takers[name]) != 1:
            return None
        x, b = node.input
        return (x, b) if b in self.constants and len(self.constants[b].dims) == 1 and x not in self.constants else None


def _attention(graph: _Graph, node: Any) -> None:
    mask = node.input[3] if len(node.input) > 3 else ""
    if mask and not graph.is_boolean(mask):
        return
    query, key, value = (_before_split(graph, name, node) for name in node.input[:3])
    joined = _after_join(graph, node)
    heads = _heads(graph, node, query)
    graph.replace(
        joined,
        "MultiHeadAttention",
        [query, key, value, *(["", _PADDING] if mask else [])],
        [joined.output[0]],
        num_heads=heads,
        scale=_attribute(node, "scale"),
    )


def _skip_layer_norm(graph: _Graph, node: Any) -> None:
    added = graph.maker.get(node.input[0])
    if added is None or added.op_type != "Add" or not graph.same_shape(*added.input):
        return
    skip, x = added.input
    bias = graph.added_bias(skip)
    if bias is None:
        skip, x = x, skip
        bias = graph.added_bias(skip)
    inputs = [x, bias[0] if bias else skip, node.input[1], node.input[2], *([bias[1]] if bias else [])]
    outputs = [node.output[0]]
    if len(graph.takers[added.output[0]]) > 1:  # pre-norm: the sum goes on as the residual
        outputs += ["", "", added.output[0]]
        graph.graph.node.remove(added)
    graph.replace(node, "SkipLayerNormalization", inputs, outputs, epsilon=_attribute(node, "epsilon"))


def _bias_gelu(graph: _Graph, node: Any) -> None:
    bias = graph.added_bias(node.input[0])
    if bias is not None and _attribute(node, "approximate") in (None, b"none"):
        graph.replace(node, "BiasGelu", list(bias), [node.output[0]])


def _attribute(node: Any, name: str) -> Any:
    import onnx

    return next((onnx.helper.get_attribute_value(a) for a in node.attribute if a.name == name), None)


def _before_split(graph: _Graph, name: str, node: Any) -> str:
    """Return the projection (B, T, H * dh) that was reshaped and transposed into (B, H, T, dh).

    With a single head there is nothing to transpose, and the exporter leaves it out.
    """
    made = graph.maker.get(name)
    if made is not None and made.op_type == "Transpose":
        made = graph.maker.get(made.input[0])
    if made is None or made.op_type != "Reshape":
        raise InputError(f"{node.name}: its input {name} is no projection split into heads, so it cannot be fused.")
    return str(made.input[0])


def _after_join(graph: _Graph, node: Any) -> Any:
    """Return the Reshape that puts the heads' outputs side by side again, (B, T, H * dh)."""
    name = node.output[0]
    while True:
        takers = graph.takers.get(name, [])
        if len(takers) != 1 or takers[0].op_type not in ("Transpose", "Reshape"):
            raise InputError(f"{node.name}: its output is not put together by a Reshape, so it cannot be fused.")
        name = takers[0].output[0]
        if len(graph.shapes[name]) == 3:
            return takers[0]


def _heads(graph: _Graph, node: Any, projection: str) -> int:
    """Return H: the projection's width over the width of a head."""
    width, head_dim = graph.shapes[projection][-1], graph.shapes[node.input[0]][-1]
    return int(width) // int(head_dim)


def _add_padding_mask(proto: onnx.ModelProto) -> None:
    import onnx
    from onnx import helper

    cast = helper.make_node("Cast", ["attention_mask"], [_PADDING], name=_PADDING, to=onnx.TensorProto.INT32)
    proto.graph.node.insert(0, cast)
