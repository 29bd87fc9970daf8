"""PyTorch in eager mode, the reference that exported files are compared with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..bundle import Bundle, Variant
from ..errors import InputError, MissingExtraError
from .base import Arrays, Runner, TensorSpec

if TYPE_CHECKING:
    from torch import nn

    from ..heads import Head


class TorchRunner(Runner):
    """Run a module and its head on the device it lies on.

    `threads` holds for the whole process while the runner is open; closing it puts the old number back.
    """

    def __init__(self, model: nn.Module, head: Head, input_names: Sequence[str], threads: int | None = None) -> None:
        self.model = model
        self.head = head
        self.threads = threads
        self.inputs = tuple(TensorSpec(n, np.dtype(np.int64), ("batch", "sequence")) for n in input_names)
        self.output_names = head.output_names

    def _activate(self) -> None:
        try:
            import torch
        except ImportError as error:
            raise MissingExtraError("torch", "cpu") from error
        self.model.eval()
        self.device = next(self.model.parameters()).device
        self.provider = str(self.device)
        self._old_threads = torch.get_num_threads()
        if self.threads is not None:
            torch.set_num_threads(self.threads)

    def _infer(self, feeds: Arrays) -> Arrays:
        import torch

        with torch.inference_mode():
            batch = {name: torch.from_numpy(array).to(self.device) for name, array in feeds.items()}
            return {name: out.cpu().numpy() for name, out in self.head.outputs(self.model, batch).items()}

    def _deactivate(self) -> None:
        import torch

        torch.set_num_threads(self._old_threads)


def open_torch(bundle: Bundle, variant: Variant, *, threads: int | None = None, precision: str = "fp32") -> Runner:
    """Load a variant of a bundle in torch on the CPU; its inputs are those the bundle names."""
    if precision != "fp32":
        raise InputError(f"The runtime torch computes in fp32, not {precision}.", hint="Use pt2, or another runtime.")
    try:
        from ..checkpoint import head_of, load_variant
    except ModuleNotFoundError as error:
        if error.name not in ("torch", "transformers"):
            raise
        raise MissingExtraError(str(error.name), "cpu") from error
    names = bundle.manifest.model["inputs"]
    return TorchRunner(load_variant(bundle, variant), head_of(bundle), names, threads)


RUNTIMES = {"torch": open_torch}
