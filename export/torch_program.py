"""torch.export programs (.pt2), and the same compiled ahead of time by AOTInductor where a C++ compiler is there."""

from __future__ import annotations

import copy
import io
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..bundle import Artifact
from ..runtimes import Runner
from ..runtimes.torch_program import SIGNATURE, ProgramRunner
from .program import program_from_torch, quiet
from .registry import Kind, Options, Source, missing_package


class ProgramExporter:
    """Write a .pt2 that torch loads without this package or transformers."""

    suffix = ".pt2"
    packages: tuple[str, ...] = ("torch",)

    def missing(self) -> Exception | None:
        return missing_package("cpu", "torch")

    def kinds(self, precision: str, options: Options) -> Sequence[Kind] | str:
        if precision == "int8":
            return "torch.export programs are not quantised; use onnx or openvino"
        if options.shape is not None:
            return "a program keeps free axes; fixed shapes are for onnx, openvino and engines"
        dialects = ["export"]
        if options.aot_inductor:
            if shutil.which("g++") is None and shutil.which("clang++") is None:
                return "AOTInductor needs a C++ compiler (g++ or clang++)"
            dialects.append("aoti")
        return [Kind("pt2", dialect, precision) for dialect in dialects]

    def export(self, kind: Kind, source: Source, path: Path) -> Mapping[str, Any]:
        import torch

        program = source.program
        if kind.precision != "fp32":
            dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}[kind.precision]
            model = copy.deepcopy(source.model).to(dtype)
            program = program_from_torch(model, source.head, source.signature)
        said: dict[str, list[Any]] = {"outputs": list(source.head.output_names), "inputs": list(source.input_names)}
        if source.signature.image:
            said["image"] = list(source.signature.image)
        with quiet("torch._inductor", "torch._dynamo"):
            if kind.dialect == "aoti":
                torch._inductor.aoti_compile_and_package(program, package_path=str(path))
            else:
                written = io.BytesIO()  # torch's own file writer aborts the whole process when the disk is full
                torch.export.save(program, written, extra_files={SIGNATURE: json.dumps(said | dict(source.metadata))})
                path.write_bytes(written.getbuffer())
        return {"signature": said}

    def runner(self, artifact: Artifact, path: Path) -> Runner | str:
        # An AOTInductor package holds no names of inputs and outputs: the manifest has them.
        return ProgramRunner(path, artifact.signature, aoti=artifact.dialect == "aoti")

    def rename_data(self, path: Path, name: str) -> None:
        """Do nothing: a program is one file."""


EXPORTERS = {"pt2": ProgramExporter()}
