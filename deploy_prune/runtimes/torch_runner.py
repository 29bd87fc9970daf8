"""PyTorch, eager (the reference that exported files are compared with) or compiled, on the CPU or a GPU."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..bundle import Bundle, Variant
from ..errors import InputError, MissingExtraError, SystemStateError
from ..signature import Signature, signature_of
from .base import Arrays, Opener, Runner, TensorSpec

if TYPE_CHECKING:
    from torch import nn

    from ..heads import Head


class TorchRunner(Runner):
    """Run a module and its head on the device it lies on, through torch.compile if `compiled`.

    `cuda_graphs` compiles for a GPU with captured graphs, which spares the launch of each kernel. `threads` holds for
    the whole process while the runner is open; closing it puts the old number back. On a GPU `device_ns` is the time
    between events around the last run, copies left out. Opening a compiled one raises SystemStateError without a C++
    compiler.
    """

    def __init__(
        self,
        model: nn.Module,
        head: Head,
        inputs: Signature | Sequence[str],
        threads: int | None = None,
        *,
        compiled: bool = False,
        cuda_graphs: bool = False,
    ) -> None:
        self.model: Any = model
        self.compiled, self.cuda_graphs = compiled, cuda_graphs
        self.compiles_in_first_run = compiled
        self.head = head
        self.threads = threads
        signature = signature_of(getattr(self.model, "config", None), inputs)
        self.inputs = tuple(TensorSpec(n, signature.dtype, signature.axes) for n in signature.inputs)
        self.output_names = head.output_names

    def _activate(self) -> None:
        try:
            import torch
        except ImportError as error:
            raise MissingExtraError("torch", "cpu") from error
        self.model.eval()
        parameter = next(self.model.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype
        self.provider = str(self.device)
        if self.compiled:
            if self.device.type == "cpu" and not any(map(shutil.which, ("g++", "clang++"))):
                raise SystemStateError("torch.compile needs a C++ compiler.", hint="Install g++ or clang++.")
            self.provider += ", compiled"
            # Else code compiled for the dense model also runs the virtual one, whose masks are hooks.
            torch._dynamo.config.skip_nnmodule_hook_guards = False
            self.model = torch.compile(self.model, mode="reduce-overhead" if self.cuda_graphs else None)
        self._old_threads = torch.get_num_threads()
        if self.threads is not None:
            torch.set_num_threads(self.threads)

    def _infer(self, feeds: Arrays) -> Arrays:
        import torch

        with torch.inference_mode():
            batch = {name: torch.from_numpy(array).to(self.device) for name, array in feeds.items()}
            batch = {name: t.to(self.dtype) if t.is_floating_point() else t for name, t in batch.items()}
            if self.device.type != "cuda":
                return {name: out.float().numpy() for name, out in self.head.outputs(self.model, batch).items()}
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            outputs = self.head.outputs(self.model, batch)
            end.record()
            found = {name: out.float().cpu().numpy() for name, out in outputs.items()}  # waits for the device
            self.device_ns = round(1e6 * begin.elapsed_time(end))
            return found

    def _deactivate(self) -> None:
        import torch

        torch.set_num_threads(self._old_threads)


def opener(device: str, *, compiled: bool, cuda_graphs: bool = False) -> Opener:
    """Return what loads a variant of a bundle on a device; its inputs are those the bundle names.

    On a GPU the sixteen-bit precisions are those of all weights and of the arithmetic.
    """
    precisions = ("fp32", "fp16", "bf16") if device == "cuda" else ("fp32",)

    def open_torch(bundle: Bundle, variant: Variant, *, threads: int | None = None, precision: str = "fp32") -> Runner:
        if precision not in precisions:
            there = " or ".join(precisions)
            raise InputError(f"torch computes in {there} here, not {precision}.", hint="Use pt2, or another runtime.")
        try:
            import torch

            from ..checkpoint import head_of, load_variant
        except ModuleNotFoundError as error:
            if error.name not in ("torch", "transformers"):
                raise
            raise MissingExtraError(str(error.name), "cpu") from error
        if device == "cuda" and not torch.cuda.is_available():
            raise SystemStateError("torch finds no CUDA device.", hint="See: deploy-prune doctor")
        dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]
        model, inputs = load_variant(bundle, variant).to(device, dtype), Signature.of_manifest(bundle.manifest.model)
        return TorchRunner(model, head_of(bundle), inputs, threads, compiled=compiled, cuda_graphs=cuda_graphs)

    return open_torch


RUNTIMES = {
    "torch": opener("cpu", compiled=False),
    "torch-compile": opener("cpu", compiled=True),
    "torch-cuda": opener("cuda", compiled=False),
    "torch-compile-cuda": opener("cuda", compiled=True),
    "torch-graphs-cuda": opener("cuda", compiled=True, cuda_graphs=True),
}
LIBRARIES = dict.fromkeys(RUNTIMES, ("torch", "transformers.modeling_utils"))
