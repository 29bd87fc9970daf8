"""torch.export programs (.pt2), plain or compiled ahead of time: torch, but neither transformers nor our models."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

from ..bundle import Bundle, Variant
from ..config import PROGRAMS, allowed_code
from ..errors import InputError, MissingExtraError
from ..signature import Signature
from .base import Arrays, Runner, TensorSpec, find_artifact

SIGNATURE = "deploy_prune.json"  # in the archive: names of inputs and outputs, and the file's origin


class ProgramRunner(Runner):
    """Run a .pt2 file on the CPU. `threads` holds for the whole process while the runner is open."""

    def __init__(
        self, path: str | Path, signature: dict[str, list[Any]], *, aoti: bool = False, threads: int | None = None
    ) -> None:
        self.path = Path(path)
        self.signature = signature
        self.aoti = aoti
        self.threads = threads
        self.provider = "torch.export CPU" if not aoti else "AOTInductor CPU"
        self.call: Any = None

    def _activate(self) -> None:
        try:
            import torch
        except ImportError as error:
            raise MissingExtraError("torch", "cpu") from error
        if not self.path.is_file():
            raise InputError(f"No program at {self.path}.", hint="Export it: deploy-prune export BUNDLE --format pt2")
        try:
            if self.aoti:
                self.call = torch._inductor.aoti_load_package(str(self.path))
            else:
                self.call = torch.export.load(self.path).module()
        except (RuntimeError, ValueError, OSError, zipfile.BadZipFile) as error:
            reason = str(error).strip().splitlines()[0]
            raise InputError(f"torch cannot load {self.path}: {reason}", hint="Export it again.") from error
        takes = Signature.of_manifest(self.signature)
        self.inputs = tuple(TensorSpec(n, takes.dtype, takes.axes) for n in takes.inputs)
        self.output_names = tuple(self.signature["outputs"])
        self._old_threads = torch.get_num_threads()
        if self.threads is not None:
            torch.set_num_threads(self.threads)

    def _infer(self, feeds: Arrays) -> Arrays:
        import torch

        with torch.inference_mode():
            out = self.call(*(torch.from_numpy(feeds[name]) for name in self.input_names))
        return {name: t.float().numpy() for name, t in zip(self.output_names, out, strict=True)}

    def _deactivate(self) -> None:
        import torch

        self.call = None
        torch.set_num_threads(self._old_threads)


def open_program(bundle: Bundle, variant: Variant, *, threads: int | None = None, precision: str = "fp32") -> Runner:
    """Open a variant's .pt2 on the CPU; the compiled one where there is one. Raises InputError unless it is allowed."""
    if refusal := programs_refused():
        raise InputError(f"{refusal}.", hint="If you trust the bundle: deploy-prune --allow-code pt2 ...")
    artifact = find_artifact(bundle, variant, "pt2", precision, ("aoti", "export"))
    return ProgramRunner(
        bundle.path(artifact.path), artifact.signature, aoti=artifact.dialect == "aoti", threads=threads
    )


def programs_refused() -> str:
    """Say why a bundle's programs are not opened, or "": torch unpickles, and calls, what the file names."""
    return "" if PROGRAMS in allowed_code() else "A .pt2 file can run any code when torch opens it"


RUNTIMES = {"pt2": open_program}
LIBRARIES = {"pt2": ("torch",)}
