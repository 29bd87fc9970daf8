"""Add real work to an ONNX file without changing what it computes, to see whether a gate finds it."""

from __future__ import annotations

from pathlib import Path

import numpy as np

_ROWS = 64


def slow_down(source: Path, path: Path, inner: int) -> Path:
    """Write a copy that also multiplies a (64, inner) by an (inner, 64) matrix, 8,192 x inner FLOPs a run.

    The product depends on the first output, so that no optimiser computes it beforehand, and is added to it
    times zero.
    """
    import onnx
    from onnx import helper, numpy_helper

    proto = onnx.load(source)
    graph = proto.graph
    output, elements = graph.output[0].name, graph.output[0].type.tensor_type.elem_type
    before = f"{output}_before"
    for node in graph.node:
        for names in (node.input, node.output):
            names[:] = [before if name == output else name for name in names]
    dtype = helper.tensor_dtype_to_np_dtype(elements)
    constants = {
        "slow_a": np.ones((_ROWS, inner), np.float32),
        "slow_b": np.ones((inner, _ROWS), np.float32),
        "slow_zero": np.zeros((), dtype),
    }
    graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in constants.items())
    graph.node.extend(
        [
            helper.make_node("ReduceMax", [before], ["slow_x"], keepdims=0),
            helper.make_node("Cast", ["slow_x"], ["slow_f"], to=onnx.TensorProto.FLOAT),
            helper.make_node("Mul", ["slow_b", "slow_f"], ["slow_c"]),
            helper.make_node("MatMul", ["slow_a", "slow_c"], ["slow_d"]),
            helper.make_node("ReduceMax", ["slow_d"], ["slow_e"], keepdims=0),
            helper.make_node("Cast", ["slow_e"], ["slow_g"], to=elements),
            helper.make_node("Mul", ["slow_g", "slow_zero"], ["slow_h"]),
            helper.make_node("Add", [before, "slow_h"], [output]),
        ]
    )
    onnx.save_model(proto, path)
    return path
