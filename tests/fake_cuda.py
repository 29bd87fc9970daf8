"""CUDA tensors without CUDA: shapes, dtypes and devices are followed, nothing is computed."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

CUDA = torch.device("cuda", 0)
_CUDA_TYPE, _META_TYPE = 1, 14  # c10::DeviceType


class _Mode(FakeTensorMode):
    def __deepcopy__(self, memo: dict[int, Any]) -> _Mode:
        return self  # copied models stay in the same mode


def _lend_device_guard() -> None:
    """Let a CPU-only torch record autograd on fake CUDA tensors: the meta device's guard, which does nothing, serves.

    A torch built with CUDA has a guard of its own, and is left alone.
    """
    if torch.version.cuda is not None:
        return
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    registry = (ctypes.c_void_p * 20).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    registry[_CUDA_TYPE] = registry[_META_TYPE]


def on_cuda(model: Any, device: torch.device = CUDA) -> Any:
    """Give a model fake tensors of a device for parameters and buffers, in place; call it inside `fake_cuda`."""
    for module in model.modules():
        for store in (module._parameters, module._buffers):
            for name, tensor in store.items():
                if tensor is not None:
                    fake = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
                    grad = tensor.requires_grad
                    store[name] = torch.nn.Parameter(fake, grad) if store is module._parameters else fake
    return model


@contextmanager
def fake_cuda() -> Iterator[None]:
    """Let torch.device("cuda", 0) be used on any machine; a mix of devices raises as on a real one.

    Modules move by new fake tensors: those that they have cannot be exchanged in place.
    """
    _lend_device_guard()
    memory = mock.patch("torch.cuda.mem_get_info", return_value=(1 << 40, 1 << 40))
    moving = mock.patch("torch.nn.Module.to", on_cuda)
    files = mock.patch("torch.from_file", lambda name, shared, size, dtype: torch.empty(size, dtype=dtype))
    with _Mode(), mock.patch("torch.autograd.grad", _gradients), memory, moving, files:
        yield


def _gradients(output: Tensor, inputs: Sequence[Tensor], grad_outputs: Tensor | None = None) -> tuple[Tensor, ...]:
    """Stand for the backward pass, whose engine insists on a real device: gradients lie where their inputs lie."""
    assert output.requires_grad
    assert grad_outputs is None or (grad_outputs.device, grad_outputs.shape) == (output.device, output.shape)
    assert all(x.requires_grad for x in inputs)
    return tuple(torch.empty_like(x) for x in inputs)
