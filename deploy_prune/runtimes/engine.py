"""TensorRT and TensorRT-RTX engines: the only place that deserialises one. Needs an NVIDIA GPU, and no torch."""

from __future__ import annotations

import ctypes
import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..bundle import Bundle, Variant
from ..config import ENGINES, allowed_code
from ..errors import InputError, MissingExtraError, SystemStateError
from .base import Arrays, Runner, TensorSpec, find_artifact


@dataclass(frozen=True)
class API:
    """Name one of the two products; both have the same Python interface."""

    format: str
    module: str
    package: str
    title: str
    command: str  # its command-line builder
    needs_gpu_to_build: bool


TENSORRT = API("tensorrt", "tensorrt", "tensorrt", "TensorRT", "trtexec", needs_gpu_to_build=True)
RTX = API("rtx", "tensorrt_rtx", "tensorrt-rtx", "TensorRT-RTX", "tensorrt_rtx", needs_gpu_to_build=False)


def load_api(api: API) -> Any:
    """Import the product. Raises MissingExtraError where it, or the libraries behind it, are not installed."""
    try:
        module = importlib.import_module(api.module)
        module.Builder  # noqa: B018  (without its libraries the package imports as an empty shell)
    except (ImportError, OSError, AttributeError) as error:
        raise MissingExtraError(api.package, api.format) from error
    return module


def missing_gpu() -> str | None:
    """Return why no CUDA device can be used here, or None."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "this machine has no NVIDIA driver (libcuda.so.1)"
    count = ctypes.c_int(0)
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0 or count.value == 0:
        return "the NVIDIA driver finds no GPU"
    return None


def gpu_name() -> str | None:
    """Return the first GPU's name and compute capability, "NVIDIA L4 8.9", or None."""
    if missing_gpu():
        return None
    driver, name = ctypes.CDLL("libcuda.so.1"), ctypes.create_string_buffer(128)
    driver.cuDeviceGetName(name, len(name), 0)
    major, minor = ctypes.c_int(0), ctypes.c_int(0)
    driver.cuDeviceGetAttribute(ctypes.byref(major), 75, 0)  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR
    driver.cuDeviceGetAttribute(ctypes.byref(minor), 76, 0)
    return f"{name.value.decode()} {major.value}.{minor.value}"


def _axes(shape: Sequence[int]) -> tuple[int | str, ...]:
    return tuple(("batch", "sequence")[i] if size == -1 else int(size) for i, size in enumerate(shape))


class EngineRunner(Runner):
    """Run an engine on the first GPU, inputs and outputs in host memory; `device_ns` is the engine's own time there.

    Opening raises MissingExtraError without the runtime, SystemStateError without a GPU or on another GPU
    or version than the engine was built for.
    """

    def __init__(self, path: str | Path, api: API, engine: dict[str, Any] | None = None) -> None:
        self.path = Path(path)
        self.api = api
        self.built = engine or {}

    def _activate(self) -> None:
        if not self.path.is_file():
            raise InputError(f"No engine at {self.path}.", hint=f"Export it: --format {self.api.format}")
        trt = load_api(self.api)
        if reason := missing_gpu():
            raise SystemStateError(f"{self.api.title} engines run on a GPU: {reason}.", hint="Use another runtime.")
        check_machine(self.built, trt.__version__, gpu_name() or "", self.api)
        try:
            from cuda.bindings import runtime as cudart
        except ImportError as error:
            raise MissingExtraError("cuda-bindings", self.api.format) from error
        self.trt, self.cudart = trt, cudart
        self.engine = trt.Runtime(trt.Logger(trt.Logger.ERROR)).deserialize_cuda_engine(self.path.read_bytes())
        if self.engine is None:
            raise SystemStateError(
                f"{self.api.title} {trt.__version__} on {gpu_name()} cannot load {self.path.name}.",
                hint="Build it for this machine: deploy-prune export BUNDLE --format " + self.api.format,
            )
        self.context = self.engine.create_execution_context()
        self.stream = self._call(cudart.cudaStreamCreate())
        self.begin, self.end = (self._call(cudart.cudaEventCreate()) for _ in range(2))
        names = [self.engine.get_tensor_name(i) for i in range(self.engine.num_io_tensors)]
        is_input = {n: self.engine.get_tensor_mode(n) == trt.TensorIOMode.INPUT for n in names}
        self.inputs = tuple(
            TensorSpec(n, np.dtype(trt.nptype(self.engine.get_tensor_dtype(n))), _axes(self.engine.get_tensor_shape(n)))
            for n in names
            if is_input[n]
        )
        self.output_names = tuple(n for n in names if not is_input[n])
        self.provider = f"{self.api.title} {trt.__version__}, {gpu_name()}"

    def _call(self, answer: tuple[Any, ...]) -> Any:
        status, *values = answer
        if int(status) != 0:
            raise SystemStateError(f"CUDA failed: {status.name}.", hint="Is the GPU's memory full?")
        return values[0] if values else None

    def _infer(self, feeds: Arrays) -> Arrays:
        cudart, memory = self.cudart, []
        to_device, to_host = cudart.cudaMemcpyKind.cudaMemcpyHostToDevice, cudart.cudaMemcpyKind.cudaMemcpyDeviceToHost
        try:
            for name, given in feeds.items():
                array = np.ascontiguousarray(given)
                if not self.context.set_input_shape(name, array.shape):
                    profile = self.built.get("profile", "its profile")
                    raise InputError(f"Input {name} of shape {array.shape} lies outside of {profile}.")
                memory.append(self._call(cudart.cudaMalloc(max(array.nbytes, 1))))
                self._call(cudart.cudaMemcpy(memory[-1], array.ctypes.data, array.nbytes, to_device))
                self.context.set_tensor_address(name, int(memory[-1]))
            outputs, places = {}, {}
            for name in self.output_names:
                dtype = self.trt.nptype(self.engine.get_tensor_dtype(name))
                outputs[name] = np.empty(tuple(self.context.get_tensor_shape(name)), dtype)
                places[name] = self._call(cudart.cudaMalloc(max(outputs[name].nbytes, 1)))
                memory.append(places[name])
                self.context.set_tensor_address(name, int(places[name]))
            self._call(cudart.cudaEventRecord(self.begin, self.stream))
            if not self.context.execute_async_v3(int(self.stream)):
                raise SystemStateError(f"{self.api.title} failed to run {self.path.name}.")
            self._call(cudart.cudaEventRecord(self.end, self.stream))
            self._call(cudart.cudaStreamSynchronize(self.stream))
            self.device_ns = round(1e6 * self._call(cudart.cudaEventElapsedTime(self.begin, self.end)))
            for name, array in outputs.items():
                self._call(cudart.cudaMemcpy(array.ctypes.data, places[name], array.nbytes, to_host))
            return outputs
        finally:
            for pointer in memory:
                cudart.cudaFree(pointer)

    def _deactivate(self) -> None:
        for event in (self.begin, self.end):
            self.cudart.cudaEventDestroy(event)
        self.cudart.cudaStreamDestroy(self.stream)
        self.context = self.engine = None


def check_machine(built: dict[str, Any], version: str, gpu: str, api: API) -> None:
    """Raise SystemStateError when an engine was built for another GPU or version than those of this machine."""
    flags = built.get("flags", [])
    again = f"Build it for this machine: deploy-prune export BUNDLE --format {api.format}"
    if built.get("version") not in (None, version) and "VERSION_COMPATIBLE" not in flags:
        raise SystemStateError(
            f"This engine was built by {api.title} {built['version']}; here is {version}.", hint=again
        )
    if built.get("gpu") not in (None, gpu) and "AMPERE_PLUS" not in flags:
        raise SystemStateError(f"This engine was built for {built['gpu']}; here is {gpu}.", hint=again)
    capability, wanted = gpu.rpartition(" ")[2], built.get("compute_capabilities") or []
    if wanted and capability not in wanted:
        raise SystemStateError(
            f"This engine was built for compute capability {', '.join(wanted)}; this GPU has {capability}.", hint=again
        )


def engines_refused() -> str:
    """Say why a bundle's engines are not opened, or ""."""
    return "" if ENGINES in allowed_code() else "An engine is a program that the GPU runs as it is"


def _opener(api: API) -> Any:
    def open_engine(bundle: Bundle, variant: Variant, *, threads: int | None = None, precision: str = "fp32") -> Runner:
        """Open a variant's engine on the first GPU; `threads` means nothing. Raises InputError unless it is allowed."""
        if refusal := engines_refused():
            raise InputError(f"{refusal}.", hint=f"If you trust the bundle: deploy-prune --allow-code {ENGINES} ...")
        artifact = find_artifact(bundle, variant, api.format, precision)
        return EngineRunner(bundle.path(artifact.path), api, artifact.engine)

    return open_engine


RUNTIMES = {api.format: _opener(api) for api in (TENSORRT, RTX)}
LIBRARIES = {api.format: (api.module,) for api in (TENSORRT, RTX)}
