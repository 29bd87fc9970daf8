"""Run an encoder layer by layer over many batches, keeping the hidden states of one depth only."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .archs import arch_of
from .batches import Batch
from .errors import SystemStateError
from .heads import Head
from .offload import Rotation
from .units import UnitGroup

DEFAULT_CACHE_BYTES = 16_000_000_000


class Stop(Exception):
    """End a forward pass once everything wanted has been seen."""


class Taps:
    """Record the first input and the output of modules while they run; `stop_at` names one to stop before."""

    def __init__(self, modules: dict[str, nn.Module], stop_at: str = "") -> None:
        self.modules, self.stop_at = modules, stop_at
        self.inputs: dict[str, Tensor] = {}
        self.outputs: dict[str, Tensor] = {}

    def __enter__(self) -> Taps:
        self.handles = []
        for name, module in self.modules.items():
            self.handles.append(module.register_forward_pre_hook(self._before(name), with_kwargs=True))
            self.handles.append(module.register_forward_hook(self._after(name)))
        return self

    def __exit__(self, *exc: object) -> None:
        for handle in self.handles:
            handle.remove()

    def _before(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.inputs[name] = next(v for v in (*args, *kwargs.values()) if isinstance(v, Tensor))
            if name == self.stop_at:
                raise Stop

        return hook

    def _after(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            self.outputs[name] = first(output)

        return hook


class Replay:
    """Let an attention core hand on what its output projection reads, as it was computed before."""

    def __init__(self, model: nn.Module, group: UnitGroup, inputs: Tensor) -> None:
        self.core: Any = model.get_submodule(group.core)
        inside = group.consumer.startswith(f"{group.core}.")
        consumer = model.get_submodule(group.consumer)
        self.forward = lambda *args, **kwargs: (consumer(inputs) if inside else inputs, None)

    def __enter__(self) -> None:
        self.core.forward = self.forward

    def __exit__(self, *exc: object) -> None:
        del self.core.forward  # the class's own comes back


def first(output: Any) -> Tensor:
    """Return a layer's hidden states, whether it gives them alone or in a tuple."""
    return output[0] if isinstance(output, tuple) else output


class StateCache:
    """Keep arrays of hidden states (B, T, d) by batch, in memory-mapped files; on a GPU, in its memory.

    Batches beyond `most_bytes` are not kept: their states are computed anew whenever they are needed; without such a
    limit all are. `kept_on` the CPU they lie in files although the `device` that reads them is a GPU.
    """

    def __init__(
        self,
        feeds: Sequence[Batch],
        hidden: int,
        arrays: int,
        device: torch.device,
        most_bytes: int | None = DEFAULT_CACHE_BYTES,
        kept_on: torch.device | None = None,
    ) -> None:
        self.most_bytes = most_bytes
        self.shapes = [(*f.mask.shape, hidden) for f in feeds]
        sizes = [b * t * d for b, t, d in self.shapes]
        self.needed_bytes = 4 * arrays * sum(sizes)
        self.offsets, used = [], 0
        for size in sizes:
            fits = most_bytes is None or 4 * arrays * (used + size) <= most_bytes
            self.offsets.append(used if fits else None)
            used += size if fits else 0
        self.used, self.device, self.kept_on = used, device, kept_on or device
        self.kept_bytes = 4 * arrays * used

    def holds(self, number: int) -> bool:
        """Say whether a batch's states are kept."""
        return self.offsets[number] is not None

    def role(self) -> States:
        """Return a new array of states. Raises SystemStateError when the disk has no room for it."""
        if self.kept_on.type == "cuda" or self.used == 0:
            return States(self, torch.empty(self.used, device=self.kept_on))
        handle, name = tempfile.mkstemp(prefix="deploy-prune-states-")
        os.close(handle)
        try:
            reserve(Path(name), 4 * self.used)
            data = torch.from_file(name, shared=True, size=self.used, dtype=torch.float32)
        except OSError as error:
            size, folder = f"{self.kept_bytes / 1e9:.2f} GB of hidden states", Path(name).parent
            fewer = "use fewer --samples" if self.most_bytes is None else "keep fewer of them with --cache-gb"
            raise SystemStateError(
                f"No room for {size} in {folder}: {error.strerror}.",
                hint=f"Name another folder by TMPDIR, or {fewer}.",
            ) from error
        finally:
            os.unlink(name)  # the mapping keeps the bytes until it goes, however the process ends
        return States(self, data)


def room(device: torch.device) -> int:
    """Return the bytes that are free where hidden states are kept: the temporary folder's disk, or the GPU."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return shutil.disk_usage(tempfile.gettempdir()).free


def reserve(path: Path, size: int) -> None:
    """Make a file of `size` bytes that the disk really has: a mapped file on a full disk would kill the process."""
    with open(path, "wb") as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)
        else:
            file.truncate(size)


class States:
    """Hold one array of a cache: a tensor (B, T, d) per batch."""

    def __init__(self, cache: StateCache, data: Tensor) -> None:
        self.cache, self.data = cache, data

    def _view(self, number: int) -> Tensor | None:
        offset, shape = self.cache.offsets[number], self.cache.shapes[number]
        return None if offset is None else self.data[offset : offset + shape[0] * shape[1] * shape[2]].view(shape)

    def get(self, number: int) -> Tensor | None:
        """Return a copy of a batch's states, or None where they are not kept."""
        view = self._view(number)
        return None if view is None else view.to(self.cache.device, copy=True)

    def put(self, number: int, value: Tensor) -> None:
        """Keep a batch's states (B, T, n <= d) where there is room."""
        view = self._view(number)
        if view is not None:
            view[..., : value.shape[-1]].copy_(value)


class LayerRunner:
    """Run one model's layers over batches; the hidden states that enter layer `depth` are kept in a cache."""

    def __init__(self, model: nn.Module, head: Head, feeds: Sequence[Batch], cache: StateCache) -> None:
        self.model, self.head, self.feeds = model, head, feeds
        self.paths = arch_of(model).layer_paths(model)
        self.rotation = Rotation(model)
        self.device = self.rotation.device
        self.states = cache.role()
        self.depth = 0

    def layer(self, depth: int) -> nn.Module:
        """Return a layer, on the device."""
        return self.rotation.bring(depth)

    def inputs(self, number: int, depth: int | None = None) -> tuple[Tensor, Any, Any]:
        """Return what enters a layer (default: the current one): hidden states (B, T, d), other arguments."""
        hidden, args, kwargs = self._embed(self.feeds[number])
        depth = self.depth if depth is None else depth
        kept = self.states.get(number) if depth == self.depth > 0 else None
        if kept is not None:
            return kept, args, kwargs
        for below in range(depth):
            hidden = first(self.layer(below)(hidden, *args, **kwargs))
        return hidden, args, kwargs

    def run(self, number: int) -> None:
        """Run the current layer on a batch and keep what enters the next one; `step` when all are done."""
        hidden, args, kwargs = self.inputs(number)
        self.states.put(number, first(self.layer(self.depth)(hidden, *args, **kwargs)))

    def step(self) -> None:
        """Go on to the next layer."""
        self.depth += 1
        if self.depth == len(self.paths):
            self.rotation.release()

    def _embed(self, batch: Batch) -> tuple[Tensor, Any, Any]:
        """Run the embeddings; return the first layer's hidden states (B, T, d) and its other arguments."""
        found: list[Any] = []

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found.extend((args, kwargs))
            raise Stop

        lowest = self.model.get_submodule(self.paths[0])  # it does not run: no need to bring it
        handle = lowest.register_forward_pre_hook(hook, with_kwargs=True)
        try:
            self.head.outputs(self.model, batch.to(self.device).inputs)
        except Stop:
            args, kwargs = found
            return args[0], args[1:], kwargs
        finally:
            handle.remove()
        raise RuntimeError(f"{self.paths[0]} did not run")
