"""What is in an ONNX file of each dialect and precision, and what is refused."""

from __future__ import annotations

import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from bundles_tiny import input_names, run_torch, tiny_inputs, tiny_model, tiny_plan
from exports_tiny import made, runner, source
from onnx import numpy_helper
from torch import nn

from deploy_prune.errors import InputError
from deploy_prune.export import lower
from deploy_prune.export.onnx import onnx_from_torch, proto_from_program, write_onnx
from deploy_prune.export.program import program_from_torch
from deploy_prune.export.registry import Kind, Options, available_exporters, plan_kinds, read_profile
from deploy_prune.heads import Head
from deploy_prune.runtimes import Runner
from deploy_prune.runtimes.fixed import FixedShape
from deploy_prune.runtimes.ort import OrtRunner
from deploy_prune.signature import Signature
from deploy_prune.slicing import slice_model
from deploy_prune.units import SlicePlan


@pytest.fixture(scope="module")
def bert_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("onnx") / "bert.onnx"
    onnx_from_torch(tiny_model(), Head("classification"), path, input_names=input_names("bert"), metadata={"a": "b"})
    return path


def test_graph_has_attention_nodes_dynamic_axes_and_metadata(bert_file: Path) -> None:
    proto = onnx.load(bert_file)
    assert [n.op_type for n in proto.graph.node].count("Attention") == 2
    assert [(o.domain, o.version) for o in proto.opset_import if o.domain == ""] == [("", 23)]
    axes = {v.name: [d.dim_param for d in v.type.tensor_type.shape.dim] for v in proto.graph.input}
    assert axes == {name: ["batch", "sequence"] for name in input_names("bert")}
    assert proto.graph.output[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    assert [(p.key, p.value) for p in proto.metadata_props] == [("a", "b")]


def test_export_is_quiet(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        onnx_from_torch(
            tiny_model("distilbert", "token"),
            Head("token"),
            tmp_path / "m.onnx",
            input_names=input_names("distilbert"),
        )
    out = capfd.readouterr()
    assert (out.out, out.err, [str(w.message) for w in caught]) == ("", "", [])


def test_empty_weights_are_refused(tmp_path: Path) -> None:
    model = tiny_model()
    layer = model.bert.encoder.layer[0]
    layer.intermediate.dense = nn.Linear(32, 0)
    layer.output.dense = nn.Linear(0, 32)
    with pytest.raises(InputError, match=r"shape .*0.*runtimes refuse empty weights"):
        onnx_from_torch(model, Head("classification"), tmp_path / "m.onnx", input_names=input_names("bert"))
    assert not list(tmp_path.iterdir())


def test_untraceable_model_is_refused(tmp_path: Path) -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = tiny_model()

        def forward(self, **batch: torch.Tensor) -> torch.Tensor:
            return self.inner(**batch) if batch["input_ids"].sum().item() > 7 else self.inner(batch["input_ids"])

    with pytest.raises(InputError, match="Branches cannot be traced"):
        onnx_from_torch(Branches(), Head("classification"), tmp_path / "m.onnx", input_names=input_names("bert"))


def test_formats_and_precisions_are_listed() -> None:
    assert "onnx" in available_exporters()
    with pytest.raises(InputError, match=r"There are: auto, onnx"):
        plan_kinds(["coreml"], ["fp32"], Options())
    with pytest.raises(InputError, match=r"There are: bf16, fp16, fp32, int8"):
        plan_kinds(["onnx"], ["fp3"], Options())
    with pytest.raises(InputError, match=r"There are: mha, opset18, opset23"):
        plan_kinds(["onnx"], ["fp32"], Options(dialects=("opset9",)))
    with pytest.raises(InputError, match=r"There are: dynamic, qdq"):
        plan_kinds(["onnx"], ["int8"], Options(schemes=("magic",)))


def test_pairs_that_do_not_exist_are_skipped_with_a_reason() -> None:
    kinds, skipped = plan_kinds(["onnx", "pt2"], ["fp32", "bf16", "int8"], Options(dialects=("mha",)))
    assert [k.label for k in kinds] == ["onnx-mha-fp32", "pt2-export-fp32", "pt2-export-bf16"]
    assert [(s.format, s.precision) for s in skipped] == [("onnx", "bf16"), ("onnx", "int8"), ("pt2", "int8")]
    assert all(s.reason for s in skipped)
    kinds, skipped = plan_kinds(["onnx"], ["int8"], Options(dialects=("opset18", "mha")))
    assert [k.dialect for k in kinds] == ["opset18", "opset18"]
    assert ["mha" in s.reason for s in skipped] == [True]


@pytest.mark.parametrize("text", ["", "128", "1x", "0x8", "1x8:2x8", "8x8:4x8:9x9", "1x8:1x9:1x10:1x11"])
def test_a_profile_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="profile"):
        read_profile(text)


def graph(kind: Kind) -> onnx.ModelProto:
    return onnx.load(made("bert", kind)[0])


def translated(model: torch.nn.Module, dialect: str) -> onnx.ModelProto:
    names = input_names("bert")
    program = program_from_torch(model, Head("classification"), names)
    return proto_from_program(program, Signature(tuple(names)), ["logits"], dialect)


def counts(proto: onnx.ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in proto.graph.node)


def test_opset18_has_plain_nodes_only() -> None:
    proto = graph(Kind("onnx", "opset18", "fp32"))
    assert [(o.domain, o.version) for o in proto.opset_import if o.domain == ""] == [("", 18)]
    assert not {"Attention", "Gelu", "MultiHeadAttention"} & set(counts(proto))
    assert not [n for n in proto.graph.node if n.domain]


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_the_cpu_does_not_fuse_residuals_into_slower_nodes(precision: str, tmp_path: Path) -> None:
    """ONNX Runtime's fused SkipLayerNormalization once cost a sliced model a tenth of its time."""
    import onnxruntime as ort

    kind = Kind("onnx", "opset23", precision, "dynamic" if precision == "int8" else None)
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    ort.InferenceSession(str(made("bert", kind)[0]), options, providers=["CPUExecutionProvider"])
    found = counts(onnx.load(tmp_path / "optimised.onnx"))
    assert found["SkipLayerNormalization"] == 0
    assert (found["Sum"], found["LayerNormalization"]) == (5, 5)  # two a layer, and the embeddings'


def test_mha_has_one_node_a_layer_with_its_own_heads() -> None:
    dense = tiny_model("bert", "classification")
    model = slice_model(dense, *tiny_plan(dense, empty=False))
    proto = translated(model, "mha")
    fused = [n for n in proto.graph.node if n.op_type == "MultiHeadAttention"]
    heads = [a.i for n in fused for a in n.attribute if a.name == "num_heads"]
    assert heads == [layer.attention.self.query.out_features // 8 for layer in model.bert.encoder.layer]
    assert all(n.domain == "com.microsoft" for n in fused)
    found = counts(proto)
    assert (found["SkipLayerNormalization"], found["BiasGelu"], found["Attention"]) == (4, 2, 0)
    assert not {"Transpose", "GatherND"} & set(found)  # the splitting into heads and the mask of pairs are gone


def test_half_keeps_inputs_outputs_and_reductions() -> None:
    proto = graph(Kind("onnx", "opset18", "fp16"))
    assert {v.type.tensor_type.elem_type for v in proto.graph.output} == {onnx.TensorProto.FLOAT}
    weights = [t for t in proto.graph.initializer if len(t.dims) == 2]
    assert {t.data_type for t in weights} - {onnx.TensorProto.INT64} == {onnx.TensorProto.FLOAT16}
    makers = {name: node for node in proto.graph.node for name in node.output}
    softmaxes = [n for n in proto.graph.node if n.op_type == "Softmax"]
    assert softmaxes
    for node in softmaxes:  # fed by a cast to fp32
        cast = makers[node.input[0]]
        assert (cast.op_type, cast.attribute[0].i) == ("Cast", onnx.TensorProto.FLOAT)


def test_weights_beyond_half_are_clipped() -> None:
    model = tiny_model()
    with torch.no_grad():
        model.classifier.bias[0] = 1e6
    proto = translated(model, "opset23")
    lowered = lower.to_fp16(proto)
    half = [t for t in lowered.graph.initializer if t.data_type == onnx.TensorProto.FLOAT16]
    largest = max(np.abs(numpy_helper.to_array(t)).max() for t in half)
    assert largest == 65504


def test_dynamic_int8_stores_bytes() -> None:
    proto = graph(Kind("onnx", "opset23", "int8", "dynamic"))
    assert counts(proto)["MatMulInteger"] >= 5
    assert counts(proto)["DynamicQuantizeLinear"] >= 1
    small = made("bert", Kind("onnx", "opset23", "int8", "dynamic"))[0]
    whole = made("bert", Kind("onnx", "opset23", "fp32"))[0]
    assert small.stat().st_size < 0.75 * whole.stat().st_size


@pytest.mark.parametrize("method", ["minmax", "percentile", "entropy"])
def test_static_int8_is_what_tensorrt_takes(method: str) -> None:
    base = graph(Kind("onnx", "opset23", "fp32"))
    proto = lower.to_qdq_int8(base, source("bert").calibration(), method)
    constants = {t.name: t for t in proto.graph.initializer}
    makers = {name: node for node in proto.graph.node for name in node.output}
    products = [n for n in proto.graph.node if n.op_type in ("MatMul", "Gemm") and n.input[1] in makers]
    quantised = [n for n in products if makers[n.input[1]].op_type == "DequantizeLinear"]
    assert len(quantised) >= 5
    for node in quantised:
        assert makers[node.input[0]].op_type == "DequantizeLinear"
        scale = constants[makers[node.input[1]].input[1]]
        assert len(scale.dims) == 1 or scale.dims == []  # per channel
        bias = node.input[2] if len(node.input) > 2 else None
        assert bias is None or bias in constants  # not quantised
    for node in proto.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            zero = numpy_helper.to_array(constants[node.input[2]])
            assert zero.dtype == np.int8
            assert not zero.any()
    weights = [constants[makers[n.input[1]].input[0]] for n in quantised]
    scales = [constants[makers[n.input[1]].input[1]] for n in quantised]
    assert all(int(np.prod(s.dims)) in w.dims for s, w in zip(scales, weights, strict=True))


def test_calibration_methods_differ() -> None:
    def ranges(method: str) -> dict[str, float]:
        proto = lower.to_qdq_int8(graph(Kind("onnx", "opset23", "fp32")), source("bert").calibration(), method)
        names = [n.input[1] for n in proto.graph.node if n.op_type == "QuantizeLinear"]
        return {t.name: float(numpy_helper.to_array(t)) for t in proto.graph.initializer if t.name in names}

    assert ranges("minmax") != ranges("percentile")


@pytest.mark.parametrize("method", ["percentile", "entropy"])
def test_regression_histograms_of_batches_of_several_lengths(method: str) -> None:
    feeds = source("bert").calibration()
    assert len({f["input_ids"].shape for f in feeds}) > 1
    lower.to_qdq_int8(graph(Kind("onnx", "opset23", "fp32")), feeds, method)


def test_fixed_shape_is_in_the_file_and_takes_any_batch() -> None:
    kind = Kind("onnx", "opset23", "fp32", None, (2, 24))
    proto = graph(kind)
    assert {tuple(d.dim_value for d in v.type.tensor_type.shape.dim) for v in proto.graph.input} == {(2, 24)}
    opened, given = runner("bert", kind), source("bert")
    assert isinstance(opened, Runner)
    with FixedShape(opened, (2, 24), 0) as fixed:
        for shape in ((1, 7), (3, 24), (5, 13)):
            inputs = tiny_inputs(list(given.input_names), *shape, seed=2)
            expected = run_torch(given.model, given.head, inputs)
            np.testing.assert_allclose(fixed.infer(inputs)["logits"], expected["logits"], atol=1e-5)
        with pytest.raises(InputError, match="25 tokens do not fit into 24"):
            fixed.infer(tiny_inputs(list(given.input_names), 1, 25))


def test_regression_embedding_as_wide_as_the_fixed_length() -> None:
    kind = Kind("onnx", "opset23", "fp32", None, (2, 32))  # the tiny models are 32 wide
    opened, given = runner("mpnet", kind), source("mpnet")
    assert isinstance(opened, Runner)
    inputs = tiny_inputs(list(given.input_names), 3, 7, seed=2)
    with FixedShape(opened, (2, 32), 0) as fixed:
        found = fixed.infer(inputs)["embedding"]
    np.testing.assert_allclose(found, run_torch(given.model, given.head, inputs)["embedding"], atol=1e-5)


@pytest.mark.parametrize("heads", [(1, 2), (2, 1), (1, 1), (0, 1)])
def test_regression_mha_of_layers_with_a_single_head(heads: tuple[int, int], tmp_path: Path) -> None:
    dense, head = tiny_model("bert", "classification"), Head("classification")
    groups, _ = tiny_plan(dense)
    kept = {g.name: heads[g.layer] if g.kind == "head" else g.size for g in groups}
    masks = {g.name: (np.arange(g.size) < kept[g.name]).astype(float) for g in groups}
    model = slice_model(dense, groups, SlicePlan.from_masks(groups, masks))
    proto = translated(model, "mha")
    found = counts(proto)
    assert (found["MultiHeadAttention"], found["Attention"]) == (sum(h > 0 for h in heads), 0)
    write_onnx(proto, tmp_path / "m.onnx")
    inputs = tiny_inputs(input_names("bert"), 3, 9, seed=4)
    with OrtRunner(tmp_path / "m.onnx") as runner:
        difference = runner.infer(inputs)["logits"] - run_torch(model, head, inputs)["logits"]
    assert np.abs(difference).max() < 1e-5


@pytest.mark.parametrize("scheme", ["dynamic", "static"])
def test_int8_of_weights_beyond_one_file(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lower, "PROTOBUF_BYTES", 1000)
    base = graph(Kind("onnx", "opset23", "fp32"))
    if scheme == "dynamic":
        found = lower.to_dynamic_int8(base)
    else:
        found = lower.to_qdq_int8(base, source("bert").calibration(), "minmax")
    monkeypatch.undo()
    small = lower.weight_bytes(found)
    assert small < lower.weight_bytes(graph(Kind("onnx", "opset23", "fp32")))
    onnx.checker.check_model(found)
