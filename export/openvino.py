"""OpenVINO IR from the ONNX file: fp32, fp16-compressed weights, int8 by NNCF's post-training quantisation."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from ..bundle import Artifact
from ..errors import InputError
from ..runtimes import Runner
from ..runtimes.openvino import OpenVinoRunner
from .program import quiet
from .registry import Kind, Options, Source, missing_package

DIALECT = "opset23"  # of the ONNX file that the IR is made from


class OpenVinoExporter:
    """Write an IR: model.xml, and its weights in model.bin beside it."""

    suffix = ".xml"
    packages: tuple[str, ...] = ("torch", "onnx", "onnxscript", "openvino", "nncf")

    def missing(self) -> Exception | None:
        return missing_package("openvino", "openvino", "nncf") or missing_package("cpu", "torch", "onnx", "onnxscript")

    def kinds(self, precision: str, options: Options) -> Sequence[Kind] | str:
        if precision == "bf16":
            return "an IR holds no bf16 weights; OpenVINO computes in bf16 where the CPU has it, when it is asked to"
        if precision == "int8":
            if "qdq" not in options.schemes:
                return "OpenVINO's int8 is static (--scheme qdq)"
            return [Kind("openvino", "ir", precision, "qdq", options.shape)]
        return [Kind("openvino", "ir", precision, None, options.shape)]

    def export(self, kind: Kind, source: Source, path: Path) -> Mapping[str, Any]:
        import openvino

        onnx_file = source.made(Kind("onnx", DIALECT, "fp32", None, kind.shape))
        try:
            model = openvino.Core().read_model(onnx_file)
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[-1]
            raise InputError(f"OpenVINO cannot read the ONNX file: {reason}") from error
        said: dict[str, Any] = {}
        if kind.precision == "int8":
            model, said = self._quantised(model, source)
        for key, value in source.metadata.items():
            model.set_rt_info(value, key.split("."))
        openvino.save_model(model, path, compress_to_fp16=kind.precision == "fp16")
        return said

    def _quantised(self, model: Any, source: Source) -> tuple[Any, dict[str, Any]]:
        os.environ.setdefault("NNCF_CI", "1")  # else nncf reports its use over the network
        import nncf

        batches = source.calibration()
        with quiet("nncf"), redirect_stdout(io.StringIO()):
            quantised = nncf.quantize(
                model,
                nncf.Dataset(batches),
                model_type=nncf.ModelType.TRANSFORMER,
                preset=nncf.QuantizationPreset.MIXED,
                subset_size=len(batches),
            )
        return quantised, {"calibration": {"method": "nncf", "rows": sum(len(next(iter(b.values()))) for b in batches)}}

    def runner(self, artifact: Artifact, path: Path) -> Runner | str:
        return OpenVinoRunner(path, precision=artifact.precision)

    def rename_data(self, path: Path, name: str) -> None:
        """Do nothing: an IR finds its weights by its own name."""


EXPORTERS = {"openvino": OpenVinoExporter()}
