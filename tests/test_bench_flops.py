"""The count on the graph, the count in torch and the formula agree to the last FLOP."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
from bundles_tiny import HIDDEN, LAYERS, NEURONS, exported_bundle, make_bundle, tiny_inputs
from onnx import TensorProto, helper

from deploy_prune.archs import check_config
from deploy_prune.bundle import Bundle
from deploy_prune.costs import encoder_flops
from deploy_prune.errors import InputError
from deploy_prune.runtime_bench.flops import count_onnx, count_torch

D, F = HIDDEN, NEURONS
SHAPES = [(1, 12), (1, 26), (3, 7), (2, 1)]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return exported_bundle(tmp_path_factory.mktemp("flops"))


def shapes_of(bundle: Bundle, batch: int, seq: int) -> dict[str, tuple[int, ...]]:
    return dict.fromkeys(bundle.manifest.model["inputs"], (batch, seq))


def head_flops(batch: int) -> int:
    return 2 * batch * (D * D + 2 * D)  # pooler and classifier, on one token


@pytest.mark.parametrize(("batch", "seq"), SHAPES)
def test_dense_and_virtual_graphs_equal_the_formula(bundle: Bundle, batch: int, seq: int) -> None:
    expected = batch * 2 * LAYERS * seq * (4 * D * D + 2 * D * F + 2 * seq * D) + head_flops(batch)
    for artifact in bundle.manifest.artifacts[:2]:
        assert count_onnx(bundle.path(artifact.path), shapes_of(bundle, batch, seq)) == expected


@pytest.mark.parametrize(("batch", "seq"), SHAPES)
def test_sliced_graph_equals_the_analytic_cost_and_torch(tmp_path: Path, bundle: Bundle, batch: int, seq: int) -> None:
    _, models = make_bundle(tmp_path / "models")
    groups = check_config(models["dense"].config).groups(models["dense"])
    counted = count_onnx(bundle.path(bundle.manifest.artifacts[2].path), shapes_of(bundle, batch, seq))
    assert counted == batch * encoder_flops(groups, seq, bundle.plan()) + head_flops(batch)
    inputs = tiny_inputs(bundle.manifest.model["inputs"], batch, seq)
    assert count_torch(models["sliced"], {n: torch.from_numpy(a) for n, a in inputs.items()}) == counted


def graph(
    nodes: list, inputs: dict[str, tuple], outputs: list[str], *, weights: dict[str, tuple] | None = None
) -> onnx.ModelProto:  # type: ignore[type-arg]
    floats = TensorProto.FLOAT
    return helper.make_model(
        helper.make_graph(
            nodes,
            "g",
            [helper.make_tensor_value_info(n, floats, s) for n, s in inputs.items()],
            [helper.make_tensor_value_info(n, floats, None) for n in outputs],
            [
                helper.make_tensor(n, floats, s, b"\0" * (4 * torch.Size(s).numel()), raw=True)
                for n, s in (weights or {}).items()
            ],
        ),
        opset_imports=[helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)],
    )


def count(tmp_path: Path, model: onnx.ModelProto, **shapes: tuple[int, ...]) -> int:
    onnx.save_model(model, tmp_path / "g.onnx")
    return count_onnx(tmp_path / "g.onnx", shapes)


def test_gemm_and_grouped_convolution(tmp_path: Path) -> None:
    gemm = helper.make_node("Gemm", ["x", "w"], ["y"], transA=1, transB=1)
    assert count(tmp_path, graph([gemm], {"x": ("k", "m")}, ["y"], weights={"w": (5, 7)}), x=(7, 3)) == 2 * 3 * 7 * 5
    conv = helper.make_node("Conv", ["x", "w"], ["y"], group=2, pads=[1, 1, 1, 1])
    model = graph([conv], {"x": ("b", 4, "h", "h")}, ["y"], weights={"w": (6, 2, 3, 3)})
    assert count(tmp_path, model, x=(2, 4, 8, 8)) == 2 * (2 * 6 * 8 * 8) * (2 * 9)


def test_attention_in_both_layouts(tmp_path: Path) -> None:
    batch, heads, kv_heads, q_len, k_len, width, v_width = 2, 4, 2, 5, 9, 8, 6
    expected = 2 * batch * heads * q_len * k_len * (width + v_width)
    node = helper.make_node("Attention", ["q", "k", "v"], ["y"])
    four = {"q": (batch, heads, q_len, width), "k": (batch, kv_heads, k_len, width)}
    four["v"] = (batch, kv_heads, k_len, v_width)
    assert count(tmp_path, graph([node], four, ["y"]), **four) == expected
    node = helper.make_node("Attention", ["q", "k", "v"], ["y"], q_num_heads=heads, kv_num_heads=kv_heads)
    three = {"q": (batch, q_len, heads * width), "k": (batch, k_len, kv_heads * width)}
    three["v"] = (batch, k_len, kv_heads * v_width)
    assert count(tmp_path, graph([node], three, ["y"]), **three) == expected


def test_multi_head_attention_of_the_contrib_domain(tmp_path: Path) -> None:
    shapes = {"q": (2, 5, 32), "k": (2, 9, 32), "v": (2, 9, 32)}
    node = helper.make_node("MultiHeadAttention", ["q", "k", "v"], ["y"], domain="com.microsoft", num_heads=4)
    assert count(tmp_path, graph([node], shapes, ["y"]), **shapes) == 2 * 2 * 5 * 9 * (32 + 32)
    packed = helper.make_node("MultiHeadAttention", ["q"], ["y"], domain="com.microsoft", num_heads=4)
    with pytest.raises(InputError, match="packed"):
        count(tmp_path, graph([packed], {"q": (2, 5, 4, 3, 8)}, ["y"]), q=(2, 5, 4, 3, 8))


def test_what_cannot_be_counted_is_an_error(tmp_path: Path) -> None:
    einsum = helper.make_node("Einsum", ["x", "x"], ["y"], equation="ij,ij->i")
    with pytest.raises(InputError, match="Einsum"):
        count(tmp_path, graph([einsum], {"x": (2, 3)}, ["y"]), x=(2, 3))
    contrib = helper.make_node("FusedMatMul", ["x", "x"], ["y"], domain="com.microsoft")
    with pytest.raises(InputError, match="FusedMatMul"):
        count(tmp_path, graph([contrib], {"x": (3, 3)}, ["y"]), x=(3, 3))
    nodes = [helper.make_node("NonZero", ["x"], ["i"]), helper.make_node("Cast", ["i"], ["f"], to=TensorProto.FLOAT)]
    nodes.append(helper.make_node("MatMul", ["f", "w"], ["y"]))
    with pytest.raises(InputError, match="unknown"):
        count(tmp_path, graph(nodes, {"x": (2, 3)}, ["y"], weights={"w": (6, 4)}), x=(2, 3))


def test_input_shapes_are_checked(bundle: Bundle) -> None:
    path, good = bundle.path(bundle.manifest.artifacts[0].path), shapes_of(bundle, 2, 5)
    with pytest.raises(InputError, match="takes input_ids"):
        count_onnx(path, {"input_ids": (2, 5)})
    with pytest.raises(InputError, match="has 2 axes, not 1"):
        count_onnx(path, good | {"input_ids": (2,)})
    with pytest.raises(InputError, match="is 5, not 6"):
        count_onnx(path, good | {"attention_mask": (2, 6)})
