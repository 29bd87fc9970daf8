"""Every kind of file computes what its model computes, at any batch and length, ragged and empty layers included."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from bundles_tiny import SHAPES, run_torch, tiny_inputs
from exports_tiny import FAMILIES, runner, source

from deploy_prune.export.program import TRACED_SHAPE
from deploy_prune.export.registry import Kind
from deploy_prune.runtimes import Runner


class ExporterContract:
    """Subclass this for a new kind of file; `tolerance` is a share of the largest output, 1 at least."""

    kind: Kind
    tolerance = 1e-5

    @pytest.mark.parametrize("family", FAMILIES)
    def test_matches_its_model_at_shapes_not_traced(self, family: str) -> None:
        given = source(family)
        opened = runner(family, self.kind)
        assert isinstance(opened, Runner), opened
        assert TRACED_SHAPE not in SHAPES
        with opened:
            assert opened.input_names == tuple(given.input_names)
            assert opened.output_names == given.head.output_names
            for shape in SHAPES:
                inputs = tiny_inputs(list(given.input_names), *shape, seed=1)
                got, expected = opened.infer(inputs), run_torch(given.model, given.head, inputs)
                for name in given.head.output_names:
                    assert got[name].shape == expected[name].shape
                    assert got[name].dtype == np.float32
                    difference = np.abs(got[name] - expected[name])
                    if given.head.kind in ("token", "qa"):
                        difference = difference[inputs["attention_mask"] == 1]
                    scale = max(1.0, float(np.abs(expected[name]).max()))
                    assert difference.max() < self.tolerance * scale, (name, shape)
                    assert np.abs(expected[name]).max() > 1e-2  # there is something to compare


class TestOpset18(ExporterContract):
    kind = Kind("onnx", "opset18", "fp32")


class TestOpset23(ExporterContract):
    kind = Kind("onnx", "opset23", "fp32")


class TestMha(ExporterContract):
    kind = Kind("onnx", "mha", "fp32")


class TestOpset18Half(ExporterContract):
    kind = Kind("onnx", "opset18", "fp16")
    tolerance = 5e-3


class TestOpset23Half(ExporterContract):
    kind = Kind("onnx", "opset23", "fp16")
    tolerance = 5e-3


class TestMhaHalf(ExporterContract):
    kind = Kind("onnx", "mha", "fp16")
    tolerance = 5e-3


class TestOpset18Dynamic(ExporterContract):
    kind = Kind("onnx", "opset18", "int8", "dynamic")
    tolerance = 0.15


class TestOpset23Dynamic(ExporterContract):
    kind = Kind("onnx", "opset23", "int8", "dynamic")
    tolerance = 0.15


class TestOpset18Static(ExporterContract):
    kind = Kind("onnx", "opset18", "int8", "qdq")
    tolerance = 0.15


class TestOpset23Static(ExporterContract):
    kind = Kind("onnx", "opset23", "int8", "qdq")
    tolerance = 0.15


class TestProgram(ExporterContract):
    kind = Kind("pt2", "export", "fp32")


@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler")
class TestAotInductor(ExporterContract):
    kind = Kind("pt2", "aoti", "fp32")

    @pytest.mark.parametrize("family", ["bert"])
    def test_matches_its_model_at_shapes_not_traced(self, family: str) -> None:
        super().test_matches_its_model_at_shapes_not_traced(family)


class TestProgramHalf(ExporterContract):
    kind = Kind("pt2", "export", "fp16")
    tolerance = 5e-3


class TestProgramBrain(ExporterContract):
    kind = Kind("pt2", "export", "bf16")
    tolerance = 5e-2
