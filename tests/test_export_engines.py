"""TensorRT-RTX engines, built without a GPU for real; and what is refused where an engine cannot run."""

from __future__ import annotations

import ctypes
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from bundles_tiny import exported_bundle
from exports_tiny import FAMILIES, made, runner, source

from deploy_prune.bundle import Bundle
from deploy_prune.config import ALLOW_CODE, ENGINES
from deploy_prune.errors import InputError, MissingExtraError, SystemStateError, VerdictError
from deploy_prune.export import Options, export_bundle, verify_bundle
from deploy_prune.export.engines import EXPORTERS, EngineExporter
from deploy_prune.export.registry import Kind, Profile, Source, plan_kinds, read_profile
from deploy_prune.runtimes import open_runner
from deploy_prune.runtimes.engine import API, RTX, TENSORRT, EngineRunner, check_machine, missing_gpu

rtx = pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
no_gpu = pytest.mark.skipif(missing_gpu() is None, reason="this machine has a GPU")
KINDS = [Kind("rtx", "opset23", p, "qdq" if p == "int8" else None) for p in ("fp32", "fp16", "int8")]


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.precision)
@pytest.mark.parametrize("family", FAMILIES)
def test_engines_are_built_ahead_of_time(family: str, kind: Kind) -> None:
    path, said = made(family, kind)
    assert path.stat().st_size > 10_000
    engine, given = said["engine"], source(family)
    assert said["source"] == Kind("onnx", "opset23", kind.precision, kind.scheme)
    assert engine["builder"] == "tensorrt-rtx"
    assert engine["version"] == rtx.__version__
    assert engine["gpu"] is None
    assert engine["inputs"] == dict.fromkeys(given.input_names, "FLOAT" if given.signature.image else "INT64")
    assert engine["outputs"] == dict.fromkeys(given.head.output_names, "FLOAT")
    limit = 66 if family not in ("roberta", "mpnet") else 64  # two positions of theirs mean padding
    tokens = given.signature.tokens
    assert engine["profile"] == (f"1x{tokens}:1x{tokens}:8x{tokens}" if tokens else f"1x1:1x32:8x{limit}")


@no_gpu
def test_without_a_gpu_the_reason_is_said() -> None:
    assert "libcuda" in str(runner("bert", KINDS[0])) or "no GPU" in str(runner("bert", KINDS[0]))
    path, _ = made("bert", KINDS[0])
    with pytest.raises(SystemStateError, match="engines run on a GPU"), EngineRunner(path, RTX):
        pass


@no_gpu
def test_a_bundle_keeps_an_unrun_engine_with_its_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = exported_bundle(tmp_path)
    (engine,) = export_bundle(bundle, formats=["rtx"], variants=["sliced"]).artifacts
    bundle.commit()
    bundle = Bundle.open(bundle.root)
    engine = next(a for a in bundle.manifest.artifacts if a.format == "rtx")
    assert engine.parity.status == "not_run"
    assert engine.parity.reason == missing_gpu()
    assert engine.source is not None
    graph = next(a for a in bundle.manifest.artifacts if a.path == engine.source)
    assert (graph.format, graph.dialect, graph.parity.status) == ("onnx", "opset23", "passed")
    command = engine.reproduce[0]
    assert f"--onnx={graph.path}" in command
    assert f"--saveEngine={engine.path}" in command
    assert "--optShapes=input_ids:1x12,attention_mask:1x12,token_type_ids:1x12" in command
    found = verify_bundle(bundle)
    assert [(a.format, reason) for a, reason in found.unchecked] == [("rtx", missing_gpu())]
    assert len(found.artifacts) == 3
    with pytest.raises(InputError, match="--allow-code engines"), open_runner(bundle, "rtx", "sliced"):
        pass
    monkeypatch.setenv(ALLOW_CODE, ENGINES)
    with pytest.raises(SystemStateError, match="GPU"), open_runner(bundle, "rtx", "sliced"):
        pass


def changed(options: Options) -> Source:
    given = source("bert")
    return Source(given.model, given.head, given.input_names, {}, options, make=given.make)


def test_options_reach_the_builder(tmp_path: Path) -> None:
    options = Options(profile=Profile((1, 4), (2, 8), (4, 16)), builder_level=1, compute_capabilities=("8.9",))
    said = EngineExporter(RTX).export(KINDS[0], changed(options), tmp_path / "other.engine")
    assert said["engine"]["profile"] == "1x4:2x8:4x16"
    assert said["engine"]["compute_capabilities"] == ["8.9"]
    assert "--minShapes=input_ids:1x4" in said["reproduce"][0]
    assert "--builderOptimizationLevel=1" in said["reproduce"][0]


@no_gpu
@pytest.mark.parametrize("option", ["refit", "strip"])
def test_refit_and_strip_need_a_gpu(option: str, tmp_path: Path) -> None:
    with pytest.raises(SystemStateError, match="built on a GPU"):
        EngineExporter(RTX).export(KINDS[0], changed(Options(**{option: True})), tmp_path / "x")


def test_unknown_compute_capability_names_the_known(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"No compute capability SM90"):
        EngineExporter(RTX).export(KINDS[0], changed(Options(compute_capabilities=("9.0",))), tmp_path / "x")


def test_profile_longer_than_the_model_is_refused(tmp_path: Path) -> None:
    profile = read_profile("1x1:1x8:8x999")
    assert isinstance(profile, Profile)
    with pytest.raises(InputError, match="longer than the model's 66 positions"):
        EngineExporter(RTX).export(KINDS[0], changed(Options(profile=profile)), tmp_path / "x")


def test_an_unsupported_operator_is_the_parsers_report(tmp_path: Path) -> None:
    proto = onnx.load(made("bert", Kind("onnx", "opset23", "fp32"))[0])
    next(n for n in proto.graph.node if n.op_type == "Gelu").op_type = "Hyphenate"
    onnx.save_model(proto, tmp_path / "odd.onnx")
    given = source("bert")
    odd = Source(given.model, given.head, given.input_names, {}, make=lambda kind: tmp_path / "odd.onnx")
    with pytest.raises(VerdictError, match=r"parser does not support this graph.*Hyphenate"):
        EngineExporter(RTX).export(KINDS[0], odd, tmp_path / "odd.engine")
    assert not (tmp_path / "odd.engine").exists()


@pytest.mark.parametrize(
    ("built", "words"),
    [
        ({"version": "10.1"}, "built by TensorRT 10.1; here is 11.4"),
        ({"gpu": "NVIDIA L4 8.9"}, "built for NVIDIA L4 8.9; here is NVIDIA T4 7.5"),
        ({"compute_capabilities": ["8.9"]}, "compute capability 8.9; this GPU has 7.5"),
    ],
)
def test_another_machine_is_refused(built: dict[str, Any], words: str) -> None:
    with pytest.raises(SystemStateError, match=words):
        check_machine(built, "11.4", "NVIDIA T4 7.5", TENSORRT)


def test_compatible_engines_go_elsewhere() -> None:
    flags = ["VERSION_COMPATIBLE", "AMPERE_PLUS"]
    check_machine({"version": "11.1", "gpu": "NVIDIA L4 8.9", "flags": flags}, "11.4", "NVIDIA A10 8.6", TENSORRT)
    check_machine({"version": "11.4", "gpu": "NVIDIA A10 8.6"}, "11.4", "NVIDIA A10 8.6", TENSORRT)


def test_a_missing_package_is_an_error_by_name_and_a_line_with_auto(monkeypatch: pytest.MonkeyPatch) -> None:
    absent = API("rtx", "no_such_module", "tensorrt-rtx", "TensorRT-RTX", "x", needs_gpu_to_build=False)
    monkeypatch.setitem(EXPORTERS, "rtx", EngineExporter(absent))
    from deploy_prune.export.registry import available_exporters

    monkeypatch.setitem(available_exporters(), "rtx", EngineExporter(absent))
    with pytest.raises(MissingExtraError, match=r"tensorrt-rtx"):
        plan_kinds(["rtx"], ["fp32"], Options())
    kinds, skipped = plan_kinds(["auto"], ["fp32"], Options())
    assert "rtx" not in {k.format for k in kinds}
    assert "tensorrt-rtx" in next(s.reason for s in skipped if s.format == "rtx")


@no_gpu
def test_tensorrt_says_what_it_lacks() -> None:
    error = EXPORTERS["tensorrt"].missing()
    assert isinstance(error, MissingExtraError | SystemStateError)
    assert error.exit_code in (3, 4)


class HostMemory:
    """Answer as `cuda.bindings.runtime` does, with the host's memory for the device's and a clock of 3 ms a run."""

    class cudaMemcpyKind:
        cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost = 1, 2

    def __init__(self) -> None:
        self.blocks: dict[int, Any] = {}
        self.calls: list[str] = []

    def cudaMalloc(self, size: int) -> tuple[int, int]:
        block = ctypes.create_string_buffer(size)
        self.blocks[ctypes.addressof(block)] = block
        return 0, ctypes.addressof(block)

    def cudaFree(self, pointer: int) -> tuple[int]:
        del self.blocks[pointer]
        return (0,)

    def cudaMemcpy(self, target: int, source: int, size: int, kind: int) -> tuple[int]:
        ctypes.memmove(target, source, size)
        return (0,)

    def cudaEventRecord(self, event: str, stream: int) -> tuple[int]:
        self.calls.append(event)
        return (0,)

    def cudaStreamSynchronize(self, stream: int) -> tuple[int]:
        self.calls.append("wait")
        return (0,)

    def cudaEventElapsedTime(self, begin: str, end: str) -> tuple[int, float]:
        assert (begin, end) == ("begin", "end")
        return 0, 3.0


class Doubling:
    """Compute y = 2 x as an engine's execution context would."""

    def __init__(self, cuda: HostMemory) -> None:
        self.cuda = cuda
        self.shape: tuple[int, ...] = (0,)
        self.places: dict[str, int] = {}

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shape = shape
        return shape[0] <= 8

    def set_tensor_address(self, name: str, pointer: int) -> None:
        self.places[name] = pointer

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.shape

    def execute_async_v3(self, stream: int) -> bool:
        self.cuda.calls.append("run")
        read, write = ((ctypes.c_float * self.shape[0]).from_address(self.places[n]) for n in ("x", "y"))
        write[:] = [2 * value for value in read]
        return True


def test_an_engine_tells_the_devices_own_time_and_frees_its_memory() -> None:
    opened, cuda = EngineRunner("x.engine", TENSORRT, {"profile": "1:4:8"}), HostMemory()
    opened.cudart, opened.context, opened.stream = cuda, Doubling(cuda), 0
    opened.begin, opened.end, opened.output_names = "begin", "end", ("y",)
    opened.engine = SimpleNamespace(get_tensor_dtype=lambda name: "FLOAT")
    opened.trt = SimpleNamespace(nptype=lambda dtype: np.float32)
    found = opened._infer({"x": np.array([1.0, 2.5, -3.0], np.float32)})
    assert found["y"].tolist() == [2.0, 5.0, -6.0]
    assert cuda.calls == ["begin", "run", "end", "wait"]
    assert opened.device_ns == 3_000_000
    with pytest.raises(InputError, match="lies outside of 1:4:8"):
        opened._infer({"x": np.zeros(9, np.float32)})
    assert cuda.blocks == {}
