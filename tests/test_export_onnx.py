"""ONNX files compute what their models compute, at any batch and length, ragged and empty layers included."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from bundles_tiny import SHAPES, input_names, run_torch, tiny_inputs, tiny_model, tiny_plan
from torch import nn

from deploy_prune.errors import InputError
from deploy_prune.export.onnx import TRACED_SHAPE, OnnxExporter, onnx_from_torch
from deploy_prune.export.registry import Exporter, Source, available_exporters, find_exporter
from deploy_prune.heads import Head
from deploy_prune.slicing import slice_model

PER_TOKEN = ("token", "qa")


class ExporterContract:
    """Subclass this for a new format and give its exporter."""

    exporter: Exporter
    tolerance = 1e-5

    @pytest.mark.parametrize(
        ("family", "kind"),
        [
            ("bert", "classification"),
            ("roberta", "qa"),
            ("distilbert", "token"),
            ("electra", "regression"),
            ("mpnet", "embedding"),
        ],
    )
    def test_sliced_model_at_shapes_not_traced(self, family: str, kind: str, tmp_path: Path) -> None:
        dense, head, names = tiny_model(family, kind), Head(kind), input_names(family)
        model = slice_model(dense, *tiny_plan(dense))
        path = tmp_path / f"model{self.exporter.suffix}"
        self.exporter.export(Source(model, head, names, "fp32", {"origin": "test"}), path)
        assert TRACED_SHAPE not in SHAPES
        with self.exporter.runner(path) as runner:
            assert runner.input_names == tuple(names)
            assert runner.output_names == head.output_names
            for shape in SHAPES:
                inputs = tiny_inputs(names, *shape, seed=1)
                got, expected = runner.infer(inputs), run_torch(model, head, inputs)
                for name in head.output_names:
                    difference = np.abs(got[name] - expected[name])
                    if kind in PER_TOKEN:
                        difference = difference[inputs["attention_mask"] == 1]
                    assert difference.max() < self.tolerance, (name, shape)
                    assert np.abs(expected[name]).max() > 1e-2  # there is something to compare


class TestOnnx(ExporterContract):
    exporter = OnnxExporter()


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

    with pytest.raises(InputError, match="Branches cannot be exported to ONNX"):
        onnx_from_torch(Branches(), Head("classification"), tmp_path / "m.onnx", input_names=input_names("bert"))


def test_formats_and_precisions_are_listed() -> None:
    assert "onnx" in available_exporters()
    with pytest.raises(InputError, match="There are: onnx"):
        find_exporter("coreml", "fp32")
    with pytest.raises(InputError, match="There are: fp32"):
        find_exporter("onnx", "fp3")
