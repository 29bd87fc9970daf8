"""Make a model's inputs of texts or of images: one interface, a class for each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from ..documents import one_line
from ..documents import read_json as read_document
from ..errors import BundleError, InputError
from ..image_settings import SETTINGS
from ..images import ImageProcessor, open_image, pillow
from ..signature import PIXELS, Signature
from .answers import Text, check_texts

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer

    from ..bundle import Bundle

_FEATURES = {"input_ids": "ids", "attention_mask": "attention_mask", "token_type_ids": "type_ids"}
_NO_LIMIT = 1_000_000  # tokens; tokenizers without a limit of their own name 10^30, which no integer type holds


class Preparation(Protocol):
    """Make a model's inputs of what people give."""

    most_tokens: int | None  # of a row, beyond which texts are cut; None for images

    def check(self, given: Any) -> list[Any]:
        """Return what is given as a list, a single one as a list of one. Raises InputError for the wrong kind."""
        ...

    def prepare(self, batch: Sequence[Any], first: int) -> Any:
        """Tokenise or decode a batch whose first row has the number `first`, for messages."""
        ...

    def feed(self, name: str, prepared: Any) -> np.ndarray | None:
        """Return the model's input of this name for a prepared batch; None where it has none."""
        ...


class Texts:
    """Tokenise texts."""

    def __init__(self, tokenizer: Tokenizer, head: str) -> None:
        self.tokenizer, self.head = tokenizer, head
        cut = tokenizer.truncation
        self.most_tokens: int | None = int(cut["max_length"]) if cut else None

    def check(self, given: Any) -> list[Text]:
        return check_texts(given, self.head)

    def prepare(self, batch: Sequence[Text], first: int) -> list[Encoding]:
        return self.tokenizer.encode_batch(list(batch))

    def feed(self, name: str, prepared: Sequence[Encoding]) -> np.ndarray | None:
        if name not in _FEATURES:
            return None
        return np.array([getattr(encoding, _FEATURES[name]) for encoding in prepared], dtype=np.int64)  # (B, T)


class Images:
    """Decode images, and bring them to the model's size, channels and values."""

    most_tokens: int | None = None

    def __init__(self, processor: ImageProcessor) -> None:
        pillow()  # without it, say so before the first image
        self.processor = processor

    def check(self, given: Any) -> list[Any]:
        picture = pillow().Image
        single = isinstance(given, str | Path | bytes | picture)
        if isinstance(given, np.ndarray):  # one image, or several of one size
            single = given.ndim < 3 or (given.ndim == 3 and given.shape[2] in (1, 3, 4))
        if not single and not isinstance(given, list | tuple | np.ndarray):
            raise InputError(
                f"Images are expected, not {type(given).__name__}.",
                hint="Give a list of uint8 arrays, Pillow images or paths.",
            )
        images = [given] if single else list(given)
        for i, image in enumerate(images):
            if not isinstance(image, str | Path | bytes | np.ndarray | picture):
                raise InputError(
                    f"Image {i} is {type(image).__name__}, which is no image.",
                    hint="Give a uint8 array (H, W) or (H, W, C), a Pillow image, a path, or the bytes of a file.",
                )
        return images

    def prepare(self, batch: Sequence[Any], first: int) -> np.ndarray:
        values = np.empty((len(batch), *self.processor.output_size), dtype=np.float32)  # (B, C, H, W)
        for i, image in enumerate(batch):
            values[i] = self._values(image, first + i)
        return values

    def _values(self, image: Any, number: int) -> np.ndarray:
        """Decode one image and forget it again: a small file may be large, and a batch of them beyond any memory."""
        if isinstance(image, str | Path | bytes):
            name = f"Image {number}" if isinstance(image, bytes) else f"Image {number}, {image}"
            image = open_image(image, name)
        return self.processor([image], number)[0]

    def feed(self, name: str, prepared: np.ndarray) -> np.ndarray | None:
        return prepared if name == PIXELS else None


def open_preparation(
    bundle: Bundle, config: Mapping[str, Any], pad_id: int, shape: tuple[int, int] | None
) -> Preparation:
    """Open a bundle's tokenizer, or image processor. Raises BundleError without a usable one."""
    image = Signature.of_manifest(bundle.manifest.model).image
    if image is None:
        return Texts(_open_tokenizer(bundle, config, pad_id, shape), str(bundle.manifest.task["head"]))
    if f"sliced/{SETTINGS}" not in bundle.manifest.files:
        raise BundleError(
            f"The bundle {bundle.root} has no sliced/{SETTINGS}, which says how the model wants its images.",
            hint="Save the checkpoint with its image processor, and make the bundle again.",
        )
    own = {"num_channels": image[0], "image_size": list(image[1:]), **config}
    processor = ImageProcessor.from_dict(read_json(bundle, SETTINGS), SimpleNamespace(**own))
    if processor.output_size != image:
        raise BundleError(
            f"sliced/{SETTINGS} of {bundle.root} makes images of {processor.output_size}, but the model takes {image}.",
            hint="Make the bundle again.",
        )
    return Images(processor)


def _open_tokenizer(bundle: Bundle, config: Mapping[str, Any], pad_id: int, shape: tuple[int, int] | None) -> Tokenizer:
    """Read tokenizer.json and make it pad and cut as the model needs it. Raises BundleError without a usable one."""
    from tokenizers import Tokenizer

    if "sliced/tokenizer.json" not in bundle.manifest.files:
        raise BundleError(
            f"The bundle {bundle.root} has no sliced/tokenizer.json, the file of a fast tokenizer.",
            hint="Save the checkpoint's tokenizer as a fast one, and make the bundle again.",
        )
    path = bundle.path("sliced/tokenizer.json")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise BundleError(f"Cannot read the tokenizer {path}: {error}", hint="Upgrade tokenizers.") from error
    settings = read_json(bundle, "tokenizer_config.json")
    limits = [_NO_LIMIT, int(settings.get("model_max_length") or _NO_LIMIT)]
    if config.get("max_position_embeddings"):
        from ..archs import max_positions

        padding = config.get("pad_token_id")
        known = {**config, "pad_token_id": pad_id if padding is None else padding}
        limits.append(max_positions(SimpleNamespace(config=SimpleNamespace(**known))))
    if shape is not None:
        limits.append(shape[1])
    # A right-padded row gives the same answer alone and in a batch, also where positions are absolute.
    tokenizer.enable_padding(pad_id=pad_id, pad_token=tokenizer.id_to_token(pad_id) or "[PAD]")
    tokenizer.enable_truncation(min(limits), direction=settings.get("truncation_side") or "right")
    return tokenizer


def read_json(bundle: Bundle, name: str) -> dict[str, Any]:
    """Return the contents of a file in sliced/; nothing where the bundle lacks it."""
    if f"sliced/{name}" not in bundle.manifest.files:
        return {}
    try:
        return dict(read_document(bundle.path(f"sliced/{name}")))
    except (OSError, ValueError, TypeError) as error:
        raise BundleError(
            f"sliced/{name} of {bundle.root} cannot be read: {one_line(error)}", hint="Make the bundle again."
        ) from error
