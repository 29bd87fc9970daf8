"""Read a checkpoint's preprocessor_config.json: what it says, what its processor does where it is silent."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from .errors import InputError, UnsupportedModelError

SETTINGS = "preprocessor_config.json"
MAX_EDGE = 8192  # pixels of a model's input

BILINEAR, _BICUBIC = 2, 3  # of Pillow's filters, which are numbered from 0 to 5
_STANDARD = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
_CLIP = {
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "resample": _BICUBIC,
    "size": {"shortest_edge": 224},
    "crop_size": {"height": 224, "width": 224},
    "do_center_crop": True,
    "default_to_square": False,
}
_EVERY = {"do_resize": True, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True}
_MOBILENET = {
    **_EVERY,
    **_STANDARD,
    "resample": BILINEAR,
    "size": {"shortest_edge": 256},
    "crop_size": {"height": 224, "width": 224},
    "do_center_crop": True,
    "default_to_square": False,
}
# What each processor does where its file is silent. Source: transformers, models/*/image_processing_pil_*.py.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "ViT": {**_EVERY, **_STANDARD, "resample": BILINEAR, "size": {"height": 224, "width": 224}},
    "DeiT": {
        **_EVERY,
        **_STANDARD,
        "resample": _BICUBIC,
        "size": {"height": 256, "width": 256},
        "crop_size": {"height": 224, "width": 224},
        "do_center_crop": True,
    },
    "Bit": {**_EVERY, **_CLIP},
    "CLIP": {**_EVERY, **_CLIP},
    "ConvNext": {
        **_EVERY,
        **_STANDARD,
        "resample": _BICUBIC,
        "size": {"shortest_edge": 384},
        "crop_pct": 224 / 256,
        "default_to_square": False,
    },
    "MobileNetV1": _MOBILENET,
    "MobileNetV2": _MOBILENET,
    "EfficientNet": {
        **_EVERY,
        **_STANDARD,
        "resample": _BICUBIC,
        "size": {"height": 346, "width": 346},
        "crop_size": {"height": 289, "width": 289},
        "rescale_offset": False,
        "include_top": True,
    },
}
_READ = {"size", "crop_size", "crop_pct", "resample", "rescale_factor", "image_mean", "image_std", "default_to_square"}
_READ |= {"round_crop"}  # none of transformers': timm's folders are read as files that say so
_READ |= {"do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb"}
# These say who wrote the file, how fast to compute, or what only counts when something else is on.
_IDLE = {"image_processor_type", "feature_extractor_type", "processor_class", "transformers_version", "device"}
_IDLE |= {"_valid_processor_keys", "model_input_names", "return_tensors", "disable_grouping", "pad_size"}


def read_settings(settings: Mapping[str, Any], config: Any) -> dict[str, Any]:
    """Return the fields of an `images.ImageProcessor`; `config` gives the model's channels and image size.

    Raises UnsupportedModelError naming a setting that is not followed, InputError for one that is wrong.
    """
    family = _family(settings)
    given = {k: v for k, v in settings.items() if v is not None and k not in _IDLE}
    _refuse_unknown({k: v for k, v in given.items() if k not in _DEFAULTS[family]})
    s = {**_DEFAULTS[family], **given}
    channels = _channels(s, config)
    resize = _resize_of(s) if s["do_resize"] else None
    crop = pair(s["crop_size"], "crop_size") if s.get("do_center_crop") else None
    if family == "ConvNext" and s["do_resize"]:
        resize, crop = _convnext(s, resize)
    if crop is not None:
        height, width = crop
    elif resize is not None:
        height, width = (resize, resize) if isinstance(resize, int) else resize
    else:
        height, width = model_size(config) or pair(s["size"], "size")
    mean, std = (_per_channel(s, name, channels) for name in ("image_mean", "image_std"))
    resample = s["resample"]
    if not isinstance(resample, int) or not 0 <= resample <= 5:
        raise InputError(f"{SETTINGS}: resample {resample!r} is none of Pillow's filters, 0 to 5.")
    return {
        "output_size": (channels, height, width),
        "resize": resize,
        "resample": resample,
        "crop": crop,
        "round_crop": bool(s.get("round_crop")),
        "scale": _number(s["rescale_factor"], "rescale_factor") if s["do_rescale"] else None,
        "offset": -1.0 if s["do_rescale"] and s.get("rescale_offset") else 0.0,
        "mean": mean,
        "std": std,
        "last_std": _per_channel(s | {"do_normalize": True}, "image_std", channels) if s.get("include_top") else None,
    }


def model_size(config: Any) -> tuple[int, int] | None:
    """Return the (height, width) that a model's config.json names, if any."""
    size = getattr(config, "image_size", None)
    return None if size is None else pair(size, "image_size", "config.json")


def _family(settings: Mapping[str, Any]) -> str:
    name = str(settings.get("image_processor_type") or settings.get("feature_extractor_type") or "")
    stem = name
    for ending in ("Pil", "Fast", "ImageProcessor", "FeatureExtractor"):
        stem = stem.removesuffix(ending)
    if stem not in _DEFAULTS:
        raise UnsupportedModelError(
            f"{SETTINGS} names the image processor '{name}', which is not one of those that can be followed.",
            hint=f"Known: {', '.join(f'{known}ImageProcessor' for known in _DEFAULTS)}.",
        )
    return stem


def _refuse_unknown(given: Mapping[str, Any]) -> None:
    for name, value in given.items():
        harmless = value is False or (name == "data_format" and value == "channels_first")
        if name not in _READ and not harmless:
            raise UnsupportedModelError(
                f"{SETTINGS} sets {name} to {value!r}, which is not followed here, so that the pixels would differ.",
                hint="Remove it if the model was trained without it; otherwise this model cannot be used yet.",
            )


def _channels(s: Mapping[str, Any], config: Any) -> int:
    own = getattr(config, "num_channels", None)
    mean = s["image_mean"]
    channels = int(own) if own is not None else len(mean) if s["do_normalize"] and isinstance(mean, list | tuple) else 3
    if channels not in (1, 3):
        raise UnsupportedModelError(f"The model takes images of {channels} channels; only grey and RGB can be made.")
    if channels == 1 and s.get("do_convert_rgb"):
        raise InputError(
            f"{SETTINGS} converts to RGB, but the model takes one channel.", hint="Set do_convert_rgb to false."
        )
    return channels


def _per_channel(s: Mapping[str, Any], name: str, channels: int) -> tuple[float, ...] | None:
    if not s["do_normalize"]:
        return None
    value = s[name]
    numbers = [_number(n, name) for n in (value if isinstance(value, list | tuple) else [value] * channels)]
    if len(numbers) != channels:
        raise InputError(
            f"{SETTINGS}: {name} is {value!r}, but the images have {channels} channels.",
            hint=f"Give {channels} numbers (without one, the processor's own for RGB count).",
        )
    if name == "image_std" and not all(numbers):
        raise InputError(f"{SETTINGS}: image_std holds 0, by which pixels are divided.", hint="Correct it.")
    return tuple(numbers)


def _number(value: Any, name: str) -> float:
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise InputError(f"{SETTINGS}: {name} is {value!r}, not a number.", hint="Correct it.")
    return float(value)


def _resize_of(s: Mapping[str, Any]) -> tuple[int, int] | int:
    size = s["size"]
    if isinstance(size, Mapping):
        known = {name: value for name, value in size.items() if value is not None}
        if set(known) == {"shortest_edge"}:
            return _edge(known["shortest_edge"], "size")
        if set(known) != {"height", "width"}:
            raise UnsupportedModelError(
                f"{SETTINGS}: size {dict(size)} is not followed here.",
                hint='Known: {"height", "width"}, or {"shortest_edge"}.',
            )
    elif isinstance(size, int) and not s.get("default_to_square", True):
        return _edge(size, "size")
    return pair(size, "size")


def _convnext(s: Mapping[str, Any], short: Any) -> tuple[tuple[int, int] | int, tuple[int, int] | None]:
    """Return ConvNeXt's resize and crop: below 384 it resizes to more than it wants and crops."""
    if not isinstance(short, int) or s.get("do_center_crop"):
        raise UnsupportedModelError(
            f"{SETTINGS}: a ConvNextImageProcessor is followed only with a shortest_edge and without do_center_crop."
        )
    if short >= 384:
        return (short, short), None
    try:
        return _edge(int(short / s["crop_pct"]), "size"), (short, short)
    except (TypeError, ZeroDivisionError, ValueError, OverflowError) as error:
        raise InputError(f"{SETTINGS}: crop_pct {s['crop_pct']!r} is no share of an edge.") from error


def pair(value: Any, name: str, file: str = SETTINGS) -> tuple[int, int]:
    """Read a size as (height, width): {"height", "width"}, a pair, or one number for both."""
    if isinstance(value, Mapping) and {k for k, v in value.items() if v is not None} == {"height", "width"}:
        value = (value["height"], value["width"])
    numbers = list(value) if isinstance(value, list | tuple) else [value, value]
    if len(numbers) != 2:
        raise InputError(f"{file}: {name} is {value!r}, not a height and a width.", hint="Give two numbers.")
    return _edge(numbers[0], name, file), _edge(numbers[1], name, file)


def _edge(value: Any, name: str, file: str = SETTINGS) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_EDGE:
        raise InputError(f"{file}: {name} names an edge of {value!r} pixels.", hint=f"Give 1 to {MAX_EDGE}.")
    return value
