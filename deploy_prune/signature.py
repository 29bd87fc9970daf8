"""What a model takes: token ids (batch, sequence), or images (batch, C, H, W). No torch here."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .errors import BundleError, InputError
from .image_settings import model_size
from .images import image_tokens

PIXELS = "pixel_values"
TOKENS = ("input_ids", "attention_mask", "token_type_ids")
MOST_EDGE = 1 << 16  # pixels, and channels


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
        try:
            inputs, image, tokens = tuple(map(str, model["inputs"])), model.get("image"), model.get("tokens")
            size = tuple(int(n) for n in image) if image else None
            if size is not None and (len(size) != 3 or not all(0 < n <= MOST_EDGE for n in size)):
                raise ValueError(f"no size of an image: {size!r:.80}")
            return cls(inputs, size, None if tokens is None else int(tokens))
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise BundleError(
                f"The manifest does not say what the model takes ({type(error).__name__}: {error!s:.100}).",
                hint="Make the bundle again.",
            ) from error

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

    @property
    def part(self) -> str:
        """Say which part of the model the budget is a share of."""
        return "network" if self.image and self.tokens == 1 else "encoder"

    def length(self, seq: Any) -> str:
        """Say at which length FLOPs are counted: tokens, or of a convolutional network the image's size."""
        if self.image and self.tokens == 1:
            return f"{self.image[1]} x {self.image[2]} pixels"
        return f"{seq} tokens"

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


def token_inputs(made: Container[str], config: Any) -> tuple[str, ...]:
    """Return which of a tokenizer's outputs (T,) the model takes.

    Token types are left out where the model has fewer than two: it has none, or all are 0 anyway.
    """
    two_types = int(getattr(config, "type_vocab_size", 0) or 0) >= 2
    return tuple(n for n in TOKENS if n in made and (n != "token_type_ids" or two_types))


def takes_images(config: Any) -> bool:
    """Say whether a model with this transformers config takes images."""
    return hasattr(config, "num_channels")


def signature_of(config: Any, inputs: Signature | Sequence[str]) -> Signature:
    """Return a signature as it is, or that of a model with a transformers config which takes inputs of these names.

    Images are then of the config's size; processors of DINOv2 make smaller ones, so that theirs is the one to ask.
    """
    if isinstance(inputs, Signature):
        return inputs
    if PIXELS not in inputs:
        return Signature(tuple(inputs))
    return image_signature(config, (int(config.num_channels), *(model_size(config) or (0, 0))))


def image_signature(config: Any, image: tuple[int, int, int]) -> Signature:
    """Return the signature of a model that is given images (C, H, W)."""
    return Signature((PIXELS,), image, image_tokens(config, image[1:]))
