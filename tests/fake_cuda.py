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


def on_cuda(model: Any) -> Any:
    """Give a real model fake CUDA tensors for parameters and buffers, in place; call it inside `fake_cuda`."""
    for module in model.modules():
        for store in (module._parameters, module._buffers):
            for name, tensor in store.items():
                if tensor is not None:
                    fake = torch.empty(tensor.shape, dtype=tensor.dtype, device=CUDA)
                    store[name] = torch.nn.Parameter(fake) if store is module._parameters else fake
    return model


@contextmanager
def fake_cuda() -> Iterator[None]:
    """Let torch.device("cuda", 0) be used on any machine; a mix of devices raises as on a real one."""
    _lend_device_guard()
    memory = mock.patch("torch.cuda.mem_get_info", return_value=(1 << 40, 1 << 40))
    with _Mode(), mock.patch("torch.autograd.grad", _gradients), memory:
        yield


def _gradients(output: Tensor, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Stand for the backward pass, whose engine insists on a real device: gradients lie where their inputs lie."""
    assert output.requires_grad
    assert all(x.requires_grad for x in inputs)
    return tuple(torch.empty_like(x) for x in inputs)
