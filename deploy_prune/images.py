"""Turn images into a model's pixel values as its preprocessor_config.json says: numpy and Pillow, without torch.

It computes what the image processors of transformers compute on the CPU with Pillow, to the last bit.
"""

from __future__ import annotations

import io
import json
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np

from .documents import read_json
from .errors import InputError, MissingExtraError
from .image_settings import BILINEAR, MAX_EDGE, SETTINGS, model_size, pair, read_settings

if TYPE_CHECKING:
    from PIL.Image import Image

LARGE = 1 << 24  # pixels, beyond which an image's file must have a size of its own
MOST_PIXELS_PER_BYTE = 200
# Formats that Pillow reads by itself: others would run helper programs.
FORMATS = ("PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP", "PPM")


@dataclass(frozen=True)
class ImageProcessor:
    """Hold how a checkpoint wants its images, and do it: channels, resize, centre crop, rescale, normalise.

    `offset` is added to the rescaled pixels, and `last_std` divides the normalised ones again: EfficientNet's do so.
    `round_crop` halves a crop's margin as torchvision does: rounded, where transformers takes the floor.
    """

    output_size: tuple[int, int, int]  # (C, H, W) of every image
    resize: tuple[int, int] | int | None = None  # (height, width), or the shortest edge
    resample: int = BILINEAR
    crop: tuple[int, int] | None = None  # (height, width)
    round_crop: bool = False
    scale: float | None = None
    offset: float = 0.0
    mean: tuple[float, ...] | None = None  # per channel
    std: tuple[float, ...] | None = None
    last_std: tuple[float, ...] | None = None
    settings: Mapping[str, Any] = field(default_factory=dict, compare=False)  # as the file gave them

    @classmethod
    def from_folder(cls, folder: str | Path, config: Any = None) -> ImageProcessor:
        """Read a checkpoint's preprocessor_config.json, and the model's own size from `config` or its config.json.

        Raises InputError where there is none or it is not JSON; else as `from_dict`.
        """
        own = Path(folder) / "config.json"
        if config is None:
            config = SimpleNamespace(**(_read_json(own) if own.is_file() else {}))
        return cls.from_dict(_read_json(Path(folder) / SETTINGS), config)

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any], config: Any = None) -> ImageProcessor:
        """Read the settings of a preprocessor_config.json; `config` gives the model's channels and image size.

        Raises UnsupportedModelError naming a setting that this does not follow, InputError for one that is wrong.
        """
        return cls(**read_settings(settings, config), settings=dict(settings))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the settings that it was read from beside a checkpoint."""
        text = json.dumps(self.settings, indent=2, ensure_ascii=False) + "\n"
        (Path(folder) / SETTINGS).write_text(text, encoding="utf-8")

    def __call__(self, images: Sequence[Any], first: int = 0) -> np.ndarray:
        """Return the pixel values (B, C, H, W), float32, of uint8 arrays (H, W) or (H, W, C), or of Pillow's images.

        Raises InputError, with the number of the image, counted from `first`, for what is no such image or comes out
        in another size.
        """
        out = np.empty((len(images), *self.output_size), dtype=np.float32)
        for i, image in enumerate(images):
            try:
                out[i] = self._values(image)
            except InputError as error:
                raise InputError(f"Image {first + i}: {error.message}", hint=error.hint) from error
        return out

    def _values(self, image: Any) -> np.ndarray:
        channels, height, width = self.output_size
        picture = _with_channels(_as_picture(image), channels)
        if self.resize is not None:
            size = _keep_ratio(picture, self.resize) if isinstance(self.resize, int) else self.resize
            picture = picture.resize(size[::-1], resample=self.resample)
        if self.crop is not None:
            half = _rounded_half if self.round_crop else _floored_half
            top, left = (half(edge - crop) for edge, crop in zip(picture.size[::-1], self.crop, strict=True))
            picture = picture.crop((left, top, left + self.crop[1], top + self.crop[0]))
        if picture.size != (width, height):
            raise InputError(
                f"It comes out {picture.size[1]} x {picture.size[0]} (height x width), but the model takes "
                f"{height} x {width}, and its {SETTINGS} does not make them so.",
                hint=f"Give images of {height} x {width}, or set do_resize and size in {SETTINGS}.",
            )
        pixels = np.asarray(picture).reshape(height, width, channels)
        return np.stack([self._table[c][pixels[:, :, c]] for c in range(channels)])

    @cached_property
    def _table(self) -> np.ndarray:
        """The value of each of the 256 shades (C, 256), with transformers' order of roundings."""
        values = np.arange(256, dtype=np.uint8)
        scaled = (values.astype(np.float64) * (1.0 if self.scale is None else self.scale)).astype(np.float32)
        table = np.tile(scaled + np.float32(self.offset), (self.output_size[0], 1))
        if self.mean is not None and self.std is not None:
            table = (table - np.array(self.mean, np.float32)[:, None]) / np.array(self.std, np.float32)[:, None]
        return table if self.last_std is None else table / np.array(self.last_std, np.float32)[:, None]


def open_image(source: str | Path | bytes, where: str) -> Image:
    """Decode an image file, or its bytes, turned upright as its EXIF data say.

    Raises InputError naming `where` for what is missing, broken, not an image, or too large to be harmless.
    """
    module = pillow()
    from PIL import ImageOps

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", module.DecompressionBombWarning)
            with module.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS) as picture:
                _refuse_bomb(picture.size, len(source) if isinstance(source, bytes) else os.path.getsize(source), where)
                picture.load()
                return ImageOps.exif_transpose(picture)
    except (module.DecompressionBombError, module.DecompressionBombWarning) as error:
        raise InputError(f"{where} is too large an image: {error}", hint="Give smaller images.") from error
    except module.UnidentifiedImageError as error:
        raise InputError(f"{where} is not an image.", hint=f"Known formats: {', '.join(FORMATS)}.") from error
    except (OSError, SyntaxError, ValueError) as error:  # Pillow raises all of them for broken files
        raise InputError(f"Cannot read the image {where}: {error}", hint="Mend or remove it.") from error


def _refuse_bomb(size: tuple[int, int], file_bytes: int, where: str) -> None:
    """Raise InputError for a large image in next to no bytes: Pillow's own limit lets them take seconds and 400 MB."""
    pixels = size[0] * size[1]
    if pixels > LARGE and pixels > MOST_PIXELS_PER_BYTE * file_bytes:
        raise InputError(
            f"{where} is too large an image: {size[0]} x {size[1]} in {file_bytes:,} bytes.",
            hint="Give smaller images.",
        )


def image_tokens(config: Any, size: tuple[int, int] | None = None) -> int:
    """Return how many tokens a model makes of an image of `size` (height, width), by default its own; 1 for CNNs.

    Raises InputError where neither is known.
    """
    if not _has_patches(config):
        return 1
    size = size or model_size(config)
    if size is None:
        raise InputError("The model's config.json has no image_size, so the number of its tokens is not known.")
    patch = pair(config.patch_size, "patch_size", "config.json")
    special = 2 if getattr(config, "model_type", "") == "deit" else 1  # class, and DeiT's distillation token
    registers = int(getattr(config, "num_register_tokens", 0) or 0)
    return (size[0] // patch[0]) * (size[1] // patch[1]) + special + registers


def check_fit(processor: ImageProcessor, config: Any) -> None:
    """Raise InputError unless the processor's images have the channels and the size that the model takes."""
    channels, *size = processor.output_size
    own = getattr(config, "num_channels", None)
    if own is not None and int(own) != channels:
        raise InputError(
            f"{SETTINGS} makes images of {channels} channels, but the model takes {own}.",
            hint=f"Correct do_convert_rgb, image_mean and image_std in {SETTINGS}.",
        )
    wanted, module = model_size(config), hasattr(config, "image")
    # Of transformers' models DINOv2 interpolates its positions, and convolutions take any size; a module's is its own.
    free = not _has_patches(config) or getattr(config, "model_type", "").startswith("dinov2")
    if wanted is None or (free and not module):
        return
    if tuple(size) != wanted:
        raise InputError(
            f"{SETTINGS} makes images of {size[0]} x {size[1]}, but the model takes {wanted[0]} x {wanted[1]}.",
            hint=f"Correct size, or crop_size, in {SETTINGS}{', or image in module.json' if module else ''}.",
        )


def _has_patches(config: Any) -> bool:
    """Say whether a model is a plain vision transformer; ConvNeXt and Swin have patches too, but also stages."""
    return getattr(config, "patch_size", None) is not None and not hasattr(config, "depths")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        contents = read_json(path)
    except FileNotFoundError as error:
        raise InputError(
            f"There is no {path}, which says how the model wants its images.",
            hint="Save the image processor with the model: AutoImageProcessor.from_pretrained(...).save_pretrained(),"
            " or of a module that is none of transformers save_module(..., processor=...).",
        ) from error
    except (OSError, ValueError) as error:
        raise InputError(f"Cannot read {path}: {error}", hint="Save the image processor again.") from error
    if not isinstance(contents, dict):
        raise InputError(f"{path} holds {type(contents).__name__}, not an object.", hint="Save it again.")
    return contents


def _keep_ratio(picture: Image, short: int) -> tuple[int, int]:
    """Return the (height, width) whose shorter edge is `short`, as transformers rounds it."""
    width, height = picture.size
    longer = int(short * max(picture.size) / min(picture.size))
    if short * longer > MAX_EDGE**2:
        raise InputError(f"It is {height} x {width}, too long and thin to resize.", hint="Crop it.")
    return (longer, short) if width <= height else (short, longer)


def _floored_half(margin: int) -> int:
    """Return what transformers cuts off before a crop, or, where negative, adds: Pillow gives 0 beyond the edge."""
    return margin // 2


def _rounded_half(margin: int) -> int:
    """Return the same of torchvision. Source: torchvision, transforms/functional.py, center_crop."""
    return round(margin / 2) if margin > 0 else -(-margin // 2)


def _as_picture(image: Any) -> Image:
    module = pillow()
    if isinstance(image, module.Image):
        return image
    if not isinstance(image, np.ndarray):
        raise InputError(
            f"{type(image).__name__} is not an image.",
            hint="Give a uint8 array (H, W) or (H, W, C), or a Pillow image.",
        )
    if image.dtype != np.uint8 or image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] not in (1, 3, 4)):
        raise InputError(
            f"It is an array {image.shape} of {image.dtype}.",
            hint="Give uint8 values from 0 to 255 of shape (H, W), (H, W, 1), (H, W, 3) or (H, W, 4).",
        )
    if not image.size:
        raise InputError(f"It is an empty array {image.shape}.", hint="Give at least one pixel.")
    return module.fromarray(image[:, :, 0] if image.ndim == 3 and image.shape[2] == 1 else image)


def _with_channels(picture: Image, channels: int) -> Image:
    """Convert to grey (1) or RGB (3); what is transparent is laid on white, as transformers does.

    Grey becomes RGB, as in every pipeline of images; RGB becomes grey only where it has no colours to lose.
    Raises InputError for colours before a model of grey images, and for more than 8 bits a channel, which Pillow would
    clip.
    """
    if picture.mode.startswith(("I", "F")):
        raise InputError(
            f"It has more than 8 bits a channel (mode {picture.mode}), which would be cut off.",
            hint="Convert the images to 8 bits first.",
        )
    mode = "L" if channels == 1 else "RGB"
    if "A" in picture.getbands() or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        white = pillow().new("RGBA", picture.size, (255, 255, 255, 255))
        picture = pillow().alpha_composite(white, picture)
    if mode == "L" and picture.mode not in ("L", "1"):
        red, green, blue = (np.asarray(band) for band in picture.convert("RGB").split())
        if not (np.array_equal(red, green) and np.array_equal(red, blue)):
            raise InputError(
                "It has colours, but the model takes grey images.",
                hint="Convert the images to grey first, as those were that it was trained on.",
            )
    return picture if picture.mode == mode else picture.convert(mode)


def pillow() -> Any:
    """Import Pillow's module of images on first use. Raises MissingExtraError."""
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingExtraError("pillow", "images") from error
    return Image
