"""Models larger than the device's memory: their layers lie in main memory and visit the device one at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from .archs import arch_of, is_convolutional

HOME = torch.device("cpu")


def settle(model: nn.Module, device: torch.device) -> None:
    """Put a model's embeddings and head on a device and its layers into main memory."""
    inside = tuple(f"{path}." for path in arch_of(model).layer_paths(model))
    for name, module in model.named_modules():
        target = HOME if f"{name}.".startswith(inside) else device
        own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        if any(tensor.device != target for tensor in own):
            module._apply(lambda tensor, target=target: tensor.to(target), recurse=False)


def offloaded(model: nn.Module) -> bool:
    """Say whether a model's layers lie elsewhere than the rest of it; those of convolutional networks never do."""
    return not is_convolutional(model) and Rotation(model).moves


class Rotation:
    """Bring one layer of a model to the device at a time; with all of them there already, nothing moves."""

    def __init__(self, model: nn.Module) -> None:
        self.layers = [model.get_submodule(path) for path in arch_of(model).layer_paths(model)]
        self.device = next(model.parameters()).device
        places = {p.device for layer in self.layers for p in layer.parameters()}
        self.moves = places not in ({self.device}, set())
        self.current: int | None = None

    def bring(self, depth: int) -> nn.Module:
        """Return a layer, on the device; the one that was there goes home."""
        if self.moves and self.current != depth:
            self.release()
            self.layers[depth].to(self.device)
            self.current = depth
        return self.layers[depth]

    def release(self) -> None:
        """Let the layer that is on the device go home."""
        if self.current is not None:
            self.layers[self.current].to(HOME)
            self.current = None

    @contextmanager
    def turning(self) -> Iterator[None]:
        """Let whole forward passes of the model bring each layer when it runs."""

        def bringing(depth: int) -> Callable[..., None]:
            def hook(module: nn.Module, args: tuple[object, ...]) -> None:
                self.bring(depth)

            return hook

        handles = [layer.register_forward_pre_hook(bringing(depth)) for depth, layer in enumerate(self.layers)]
        try:
            yield
        finally:
            self.release()
            for handle in handles:
                handle.remove()
