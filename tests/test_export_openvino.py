"""OpenVINO files, run on the CPU."""

from __future__ import annotations

import pytest
from exports_tiny import made, source
from test_export_contract import ExporterContract

from deploy_prune.export.registry import Kind

openvino = pytest.importorskip("openvino", reason="openvino is not installed")
nncf = pytest.importorskip("nncf", reason="nncf is not installed")
FP32, FP16, INT8 = (Kind("openvino", "ir", p, s) for p, s in (("fp32", None), ("fp16", None), ("int8", "qdq")))


class TestOpenVino(ExporterContract):
    kind = FP32


class TestOpenVinoHalf(ExporterContract):
    kind = FP16
    tolerance = 5e-3


class TestOpenVinoStatic(ExporterContract):
    kind = INT8
    tolerance = 0.3


def test_weights_lie_beside_and_shrink() -> None:
    sizes = {}
    for kind in (FP32, FP16, INT8):
        path, _ = made("bert", kind)
        sizes[kind.precision] = path.with_suffix(".bin").stat().st_size
        assert [p.suffix for p in sorted(path.parent.iterdir())] == [".bin", ".xml"]
    assert sizes["fp16"] < 0.6 * sizes["fp32"]
    assert sizes["int8"] < 0.9 * sizes["fp32"]  # the embeddings of a tiny model are most of it


def test_origin_is_in_the_file() -> None:
    path, _ = made("bert", FP32)
    model = openvino.Core().read_model(path)
    assert model.get_rt_info(["deploy_prune", "variant"]).astype(str) == "sliced"


def test_int8_has_quantised_products() -> None:
    path, said = made("bert", INT8)
    kinds = [op.get_type_name() for op in openvino.Core().read_model(path).get_ops()]
    assert kinds.count("FakeQuantize") > 0
    assert said["calibration"]["rows"] == 48
    assert source("bert").options.calibration_rows == 48
