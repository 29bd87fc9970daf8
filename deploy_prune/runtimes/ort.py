"""ONNX Runtime: the only place that opens an InferenceSession. No torch."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..bundle import Bundle, Variant
from ..errors import InputError, MissingExtraError, SystemStateError
from .base import Arrays, Runner, TensorSpec, find_artifact

Provider = Literal["cpu", "cuda", "tensorrt"]
_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider", "tensorrt": "TensorrtExecutionProvider"}
_DTYPES = {
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(bool)": np.bool_,
}


class OrtRunner(Runner):
    """Run an ONNX file. `threads` are the intra-op threads (None = the runtime's own choice).

    `stop_spinning` lets idle threads sleep as soon as a run ends, so that sessions measured side by
    side do not steal each other's cores. `cache` keeps TensorRT's engines and timings between sessions;
    `context_file` makes the provider write its compiled graph there, as an ONNX file of EPContext nodes that
    loads without compiling. Opening raises MissingExtraError without onnxruntime and SystemStateError when the
    asked provider is not the one that computes.
    """

    def __init__(
        self,
        path: str | Path,
        provider: Provider = "cpu",
        threads: int | None = None,
        *,
        stop_spinning: bool = False,
        cache: Path | None = None,
        context_file: Path | None = None,
    ) -> None:
        if provider not in _PROVIDERS:
            raise InputError(f"No ONNX Runtime provider '{provider}'.", hint=f"There are: {', '.join(_PROVIDERS)}.")
        if context_file is not None and provider != "tensorrt":
            raise InputError(f"The provider '{provider}' writes no EPContext file.", hint="tensorrt does.")
        self.path = Path(path)
        self.provider = _PROVIDERS[provider]
        self.extra = "cpu" if provider == "cpu" else "gpu"
        self.threads = threads
        self.stop_spinning = stop_spinning
        self.cache = cache
        self.context_file = context_file
        self.session: Any = None

    def _activate(self) -> None:
        try:
            import onnxruntime as ort
        except ImportError as error:
            raise MissingExtraError("onnxruntime", self.extra) from error
        if not self.path.is_file():
            raise InputError(f"No ONNX file at {self.path}.", hint="Export it first: deploy-prune export BUNDLE")
        if self.provider not in ort.get_available_providers():
            raise MissingExtraError("onnxruntime-gpu", "gpu")
        if self.provider != _PROVIDERS["cpu"]:
            with contextlib.redirect_stdout(sys.stderr):  # where it prints what it does not find
                ort.preload_dlls()  # CUDA and cuDNN of the packages beside it, which the loader does not look into
        options = ort.SessionOptions()
        options.log_severity_level = 3  # errors only
        if self.threads is not None:
            options.intra_op_num_threads = self.threads
        if self.stop_spinning:
            options.add_session_config_entry("session.force_spinning_stop", "1")
        if self.context_file is not None:
            options.add_session_config_entry("ep.context_enable", "1")
            options.add_session_config_entry("ep.context_file_path", str(self.context_file))
        try:
            self.session = ort.InferenceSession(str(self.path), options, providers=self._providers())
        except Exception as error:  # ONNX Runtime's own exceptions share no base class
            reason = str(error).splitlines()[0]
            raise InputError(f"ONNX Runtime cannot load {self.path}: {reason}", hint="Export it again.") from error
        if (found := self.session.get_providers())[0] != self.provider:  # ORT falls back without a word
            self.session = None
            raise SystemStateError(
                f"ONNX Runtime would compute with {found[0]}, not with {self.provider}.",
                hint="Check the driver and the CUDA libraries (deploy-prune doctor), or use the CPU.",
            )
        self.session.disable_fallback()  # a failing provider is an error, not another provider
        self.inputs = tuple(_spec(i) for i in self.session.get_inputs())
        self.output_names = tuple(o.name for o in self.session.get_outputs())

    def _providers(self) -> list[Any]:
        """Return the provider with its options; what TensorRT leaves over goes to CUDA first.

        ONNX Runtime itself adds its CPU provider behind them, for operators that the others lack.
        """
        if self.provider != _PROVIDERS["tensorrt"]:
            return [self.provider]
        settings: dict[str, Any] = {}
        if self.cache is not None:
            self.cache.mkdir(parents=True, exist_ok=True)
            settings = {"trt_engine_cache_enable": True, "trt_timing_cache_enable": True}
            settings |= {"trt_engine_cache_path": str(self.cache), "trt_timing_cache_path": str(self.cache)}
        return [(self.provider, settings), _PROVIDERS["cuda"]]

    def _infer(self, feeds: Arrays) -> Arrays:
        try:
            outputs = self.session.run(None, feeds)
        except Exception as error:  # ids or lengths that the model has no rows for
            reason = str(error).splitlines()[0]
            raise InputError(f"{self.path.name} cannot be run on these inputs: {reason}") from error
        return dict(zip(self.output_names, outputs, strict=True))

    def _deactivate(self) -> None:
        self.session = None


def _spec(node: Any) -> TensorSpec:
    if node.type not in _DTYPES:
        raise InputError(f"Input {node.name} has the type {node.type}, which this runner does not feed.")
    shape = tuple(axis if isinstance(axis, int | str) else f"{node.name}.{i}" for i, axis in enumerate(node.shape))
    return TensorSpec(node.name, np.dtype(_DTYPES[node.type]), shape)


def open_ort_cpu(bundle: Bundle, variant: Variant, *, threads: int | None = None, precision: str = "fp32") -> Runner:
    """Open a variant's ONNX file on the CPU provider."""
    artifact = find_artifact(bundle, variant, "onnx", precision, ("opset23", "opset18", "dynamic", "qdq"))
    return OrtRunner(bundle.path(artifact.path), "cpu", threads, stop_spinning=True)


def open_ort_cuda(bundle: Bundle, variant: Variant, *, threads: int | None = None, precision: str = "fp32") -> Runner:
    """Open a variant's ONNX file on the CUDA provider, the fused dialect where there is one."""
    artifact = find_artifact(bundle, variant, "onnx", precision, ("mha", "opset23", "opset18", "qdq"))
    return OrtRunner(bundle.path(artifact.path), "cuda", threads)


def open_ort_tensorrt(
    bundle: Bundle, variant: Variant, *, threads: int | None = None, precision: str = "fp32"
) -> Runner:
    """Open a variant's ONNX file on the TensorRT provider; its engines are cached with the user's other caches."""
    from platformdirs import user_cache_path

    artifact = find_artifact(bundle, variant, "onnx", precision, ("opset23", "opset18", "qdq"))
    cache = user_cache_path("deploy_prune") / "ort-tensorrt" / artifact.sha256[:16]
    return OrtRunner(bundle.path(artifact.path), "tensorrt", threads, cache=cache)


RUNTIMES = {"ort-cpu": open_ort_cpu, "ort-cuda": open_ort_cuda, "ort-tensorrt": open_ort_tensorrt}
LIBRARIES = dict.fromkeys(RUNTIMES, ("onnxruntime",))
ONNX_RUNTIMES = {
    "ort-cpu": lambda path, threads: OrtRunner(path, "cpu", threads, stop_spinning=True),
    "ort-cuda": lambda path, threads: OrtRunner(path, "cuda", threads),
    "ort-tensorrt": lambda path, threads: OrtRunner(path, "tensorrt", threads),
}
