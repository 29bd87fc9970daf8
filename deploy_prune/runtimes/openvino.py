"""OpenVINO on the CPU: the only place that compiles an OpenVINO model. No torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ..bundle import Bundle, Variant
from ..errors import InputError, MissingExtraError
from .base import Arrays, Runner, TensorSpec, find_artifact

_HINTS = {"fp32": "f32", "fp16": "f32", "int8": "f32"}  # what is not quantised computes in fp32, on every CPU


class OpenVinoRunner(Runner):
    """Run an OpenVINO IR (.xml with its .bin) or an ONNX file on the CPU.

    `threads` None leaves the choice to the runtime. Opening raises MissingExtraError without openvino and
    InputError when the file cannot be read.
    """

    def __init__(self, path: str | Path, threads: int | None = None, precision: str = "fp32") -> None:
        self.path = Path(path)
        self.threads = threads
        self.precision = precision
        self.provider = "OpenVINO CPU"
        self.compiled: Any = None

    def _activate(self) -> None:
        try:
            import openvino
        except ImportError as error:
            raise MissingExtraError("openvino", "openvino") from error
        if not self.path.is_file():
            raise InputError(
                f"No OpenVINO file at {self.path}.", hint="Export it: deploy-prune export BUNDLE --format openvino"
            )
        # Without the hint, CPUs with bf16 units would compute in bf16 whatever the file holds.
        settings: dict[str, Any] = {"INFERENCE_PRECISION_HINT": _HINTS[self.precision], "PERFORMANCE_HINT": "LATENCY"}
        if self.threads is not None:
            settings["INFERENCE_NUM_THREADS"] = self.threads
        try:
            self.compiled = openvino.Core().compile_model(self.path, "CPU", settings)
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[-1]
            raise InputError(f"OpenVINO cannot load {self.path}: {reason}", hint="Export it again.") from error
        self.request = self.compiled.create_infer_request()
        self.inputs = tuple(_spec(port) for port in self.compiled.inputs)
        self.output_names = tuple(port.get_any_name() for port in self.compiled.outputs)

    def _infer(self, feeds: Arrays) -> Arrays:
        try:
            results = self.request.infer(feeds, share_inputs=True)
        except RuntimeError as error:  # ids or lengths that the model has no rows for
            reason = str(error).strip().splitlines()[-1]
            raise InputError(f"{self.path.name} cannot be run on these inputs: {reason}") from error
        return {
            name: np.array(results[port]) for name, port in zip(self.output_names, self.compiled.outputs, strict=True)
        }

    def _deactivate(self) -> None:
        self.compiled = self.request = None


def _spec(port: Any) -> TensorSpec:
    axes = ("batch", "sequence")
    shape = tuple(
        axes[i] if dim.is_dynamic and i < len(axes) else dim.get_length() if dim.is_static else f"axis{i}"
        for i, dim in enumerate(port.get_partial_shape())
    )
    return TensorSpec(port.get_any_name(), port.get_element_type().to_dtype(), shape)


def open_openvino(bundle: Bundle, variant: Variant, *, threads: int | None = None, precision: str = "fp32") -> Runner:
    """Open a variant's OpenVINO IR on the CPU."""
    artifact = find_artifact(bundle, variant, "openvino", precision)
    return OpenVinoRunner(bundle.path(artifact.path), threads, precision)


RUNTIMES = {"openvino": open_openvino}
LIBRARIES = {"openvino": ("openvino",)}
ONNX_RUNTIMES = {"openvino": OpenVinoRunner}
