"""What a model takes: token ids (batch, sequence), or images (batch, C, H, W). No torch here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .errors import InputError

PIXELS = "pixel_values"


@dataclass(frozen=True)
class Signature:
    """Name a model's inputs; `image` is the size (C, H, W) of what an image model takes, None for tokens.

    An image model makes `tokens` tokens of every image, so that its sequence length is no choice.
    """

    inputs: tuple[str, ...]
    image: tuple[int, int, int] | None = None
    tokens: int | None = None

    @classmethod
    def of_manifest(cls, model: Mapping[str, Any]) -> Signature:
        """Read what a bundle's manifest says of its model."""
        image = model.get("image")
        return cls(tuple(model["inputs"]), tuple(image) if image else None, model.get("tokens"))

    def entry(self) -> dict[str, Any]:
        """Return what the manifest says: inputs, and of an image model the image's size and the tokens."""
        images = {"image": list(self.image), "tokens": self.tokens} if self.image else {}
        return {"inputs": list(self.inputs), **images}

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(np.float32 if self.image else np.int64)

    @property
    def axes(self) -> tuple[int | str, ...]:
        """Return every input's axes; those with a name are free."""
        return ("batch", *self.image) if self.image else ("batch", "sequence")

    def shape(self, batch: int, seq: int) -> tuple[int, ...]:
        """Return every input's shape. Raises InputError for a length that an image model does not have."""
        if self.image is None:
            return (batch, seq)
        self.check_length(seq)
        return (batch, *self.image)

    def shapes(self, batch: int, seq: int) -> dict[str, tuple[int, ...]]:
        """Return the shape of every input by name."""
        return dict.fromkeys(self.inputs, self.shape(batch, seq))

    def check_length(self, seq: int) -> None:
        """Raise InputError where an image model is asked for another number of tokens than it makes."""
        if self.tokens is not None and seq != self.tokens:
            raise InputError(
                f"The model makes {self.tokens} tokens of every image, not {seq}.",
                hint=f"Leave the length out, or give {self.tokens}.",
            )


def takes_images(config: Any) -> bool:
    """Say whether a model with this transformers config takes images."""
    return hasattr(config, "num_channels")


def signature_of(config: Any, inputs: Sequence[str]) -> Signature:
    """Return the signature of a model with a transformers config that takes these inputs."""
    if PIXELS not in inputs:
        return Signature(tuple(inputs))
    height, width = _pair(config.image_size)
    return Signature(tuple(inputs), (int(config.num_channels), height, width), image_tokens(config))


def image_tokens(config: Any) -> int:
    """Return how many tokens a vision transformer makes of an image: its patches and its special tokens."""
    (height, width), (down, across) = _pair(config.image_size), _pair(config.patch_size)
    special = 2 if config.model_type == "deit" else 1  # DeiT has a distillation token beside [CLS]
    return (height // down) * (width // across) + special


def _pair(size: Any) -> tuple[int, int]:
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    return int(height), int(width)
