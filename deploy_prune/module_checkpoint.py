"""Checkpoints of models that are no transformers: weights, the factory that makes the dense class, the cut sizes.

    model.safetensors         the weights
    preprocessor_config.json  how images are prepared, as transformers writes it
    module.json               {"format": "deploy-prune-module", "version": 1, "factory": "torchvision.models.resnet18",
                               "kwargs": {...}, "image": [3, 224, 224], "labels": [...], "spec": {...} or null}

`spec` is null for a dense model, else {"plan_hash": ..., "channels": {"inputs": {...}, "outputs": {...}}}, which map
the path of every module that was cut to what is left of its input and output features. Folders as timm writes them to
the hub (config.json with an "architecture") are read as dense models too.
"""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .bounds import LARGEST_CUT, SMALL
from .config import ALLOW_CODE, allowed_code
from .disk import disk_errors, share
from .documents import one_line, read_json
from .errors import BundleError, InputError, UnsupportedModelError
from .image_settings import SETTINGS
from .images import ImageProcessor, check_fit
from .modeling_sliced import resize

FORMAT, VERSION = "deploy-prune-module", 1
FILE, WEIGHTS = "module.json", "model.safetensors"
LOADING = ("weights", "weights_backbone", "pretrained", "checkpoint_path")  # arguments that fetch or read weights
TIMM = "timm.create_model"
_MALFORMED = (AttributeError, IndexError, KeyError, OverflowError, RuntimeError, TypeError, ValueError)
Cut = Callable[[nn.Module, dict[str, Any]], dict[str, Any]]
_FILTERS = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3}  # Pillow's numbers


@dataclass(frozen=True)
class ModuleConfig:
    """Say how a model's class is made and what it takes; the names below are those of a transformers config."""

    factory: str
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    image: tuple[int, int, int] = (3, 224, 224)
    labels: tuple[str, ...] = ()
    spec: Mapping[str, Any] | None = None
    processor: Mapping[str, Any] | None = None  # preprocessor_config.json where the folder has none

    @property
    def deploy_prune(self) -> Mapping[str, Any] | None:
        return self.spec

    @property
    def model_type(self) -> str:
        return str(self.kwargs.get("model_name", self.factory.rpartition(".")[2]))

    @property
    def architectures(self) -> list[str]:
        return [f"{self.model_type}ForImageClassification"]

    @property
    def num_channels(self) -> int:
        return self.image[0]

    @property
    def image_size(self) -> list[int]:
        return list(self.image[1:])

    @property
    def num_labels(self) -> int:
        return len(self.labels)

    @property
    def id2label(self) -> dict[int, str]:
        return dict(enumerate(self.labels))

    @property
    def label2id(self) -> dict[str, int]:
        return {label: number for number, label in enumerate(self.labels)}


def save_module(
    model: nn.Module,
    folder: str | Path,
    factory: str | None = None,
    kwargs: Mapping[str, Any] | None = None,
    *,
    image: tuple[int, int, int] | None = None,
    labels: Sequence[str] | None = None,
    processor: Any = None,
) -> list[Path]:
    """Write a dense or sliced model, and how to make its class: a factory's dotted name and its arguments.

    `image` is the size (C, H, W) of what it takes, `labels` name its classes, `processor` is what prepares its images
    (or the contents of a preprocessor_config.json); what is left out is as the model was loaded. Returns the files.
    Raises InputError where the factory is not known, its arguments are no plain JSON, or the settings are wrong or make
    images of another size.
    """
    own = getattr(model, "module_config", None)
    if factory is None and own is None:
        raise InputError(
            f"It is not known how this {type(model).__name__} is made.", hint="Name the factory, 'module.function'."
        )
    config = own or ModuleConfig(str(factory))
    config = replace(config, image=tuple(image or config.image))
    if isinstance(processor, Mapping):
        processor = ImageProcessor.from_dict(processor, config)
    if isinstance(processor, ImageProcessor):
        check_fit(processor, config)
    entry = {
        "format": FORMAT,
        "version": VERSION,
        "factory": factory or config.factory,
        "kwargs": dict(config.kwargs if kwargs is None else kwargs),
        "image": list(config.image),
        "labels": list(config.labels if labels is None else labels),
        "spec": getattr(model, "deploy_prune", None),
    }
    try:
        text = json.dumps(entry, indent=1) + "\n"
    except TypeError as error:
        raise InputError(
            f"The factory's arguments are no plain JSON: {error}.", hint="Use numbers and names."
        ) from error
    folder = Path(folder)
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        save_file(_own_tensors(model), folder / WEIGHTS, metadata={"format": "pt"})
        share(folder / WEIGHTS)
        (folder / FILE).write_text(text, encoding="utf-8")
        if processor is not None:
            processor.save_pretrained(folder)
    return [folder / WEIGHTS, folder / FILE, *([folder / SETTINGS] if processor is not None else [])]


def _own_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return a model's tensors, each in memory of its own: a weight under two names is stored under both."""
    tensors: dict[str, Tensor] = {}
    taken: set[int] = set()
    for name, value in model.state_dict().items():
        tensor = value.detach().cpu().contiguous()
        memory = tensor.untyped_storage().data_ptr()
        tensors[name] = tensor.clone() if memory in taken else tensor
        taken.add(memory)
    return tensors


def load_module(
    folder: str | Path, factory: Callable[..., nn.Module] | None = None, *, allow: Sequence[str] = ()
) -> nn.Module:
    """Rebuild a dense or sliced model from its folder, every tensor strictly as saved, in evaluation mode.

    The class comes from `factory` where it is given, else from the name in the folder. Calling what a folder names
    runs code, so that only torchvision's registered models and timm.create_model are called, without weights of their
    own, and what lies in the modules that `allow`, or the environment's DEPLOY_PRUNE_ALLOW_CODE, names.
    Raises BundleError for a folder that is damaged or whose factory does not take its arguments, InputError for a
    factory that is not allowed or not there.
    """
    folder = Path(folder)
    config = read_module_config(folder)
    if config is None:
        raise BundleError(f"No {FILE} in {folder}.", hint="Save the model by save_module.")
    kwargs = {k: v for k, v in config.kwargs.items() if k not in LOADING}
    make = partial(_made, factory or _factory(config.factory, [*allow, *allowed_code()]), config.factory, kwargs)

    def cut(model: nn.Module, stored: dict[str, Any]) -> dict[str, Any]:
        if config.spec:
            resize(model, dict(config.spec))
        return stored

    if factory is None and config.factory.startswith("torchvision."):  # others may read values while they build
        with _RealValues():
            check_stored(make, cut, folder / WEIGHTS)
    model = make()
    try:
        model.load_state_dict(cut(model, load_file(folder / WEIGHTS)), strict=True)
    except (RuntimeError, OSError, AttributeError, KeyError, SafetensorError) as error:
        raise BundleError(
            f"{folder} does not hold the weights its {FILE} describes: {str(error).splitlines()[0]}",
            hint=f"Is {config.factory} the factory, of the same version, that the model was made by?",
        ) from error
    if config.spec:
        model.deploy_prune = dict(config.spec)  # type: ignore[assignment]
    model.module_config = config  # type: ignore[assignment]
    return model.eval()


class _RealValues(TorchFunctionMode):
    """Keep ranges and given numbers on the CPU under a device without memory: RegNet reads its own as it is built."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        return func(*args, **({**given, "device": "cpu"} if func in (torch.arange, torch.tensor) else given))


def _made(make: Callable[..., nn.Module], name: str, kwargs: Mapping[str, Any]) -> nn.Module:
    """Call a factory. Raises BundleError, with the factory's own words, where it fails."""
    try:
        return make(**kwargs)
    except _MALFORMED as error:
        given = ", ".join(f"{key}={value!r:.80}" for key, value in kwargs.items())
        raise BundleError(
            f"The factory {name}({given}) fails: {type(error).__name__}: {one_line(error, 300)}",
            hint=f"Correct kwargs in {FILE}, or install the version that knows this model.",
        ) from error


def check_stored(make: Callable[[], nn.Module], cut: Cut, path: Path, *, layers: int = 0) -> None:
    """Make a dense model and cut it without memory for weights, and compare their shapes with those in the file.

    `cut` also gives what is stored the names that it has in the model.

    Raises BundleError where they differ, or the dense model is out of all proportion: a description of a few bytes
    must not ask for any amount of memory.
    """
    try:
        with safe_open(path, framework="pt") as file:
            stored = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        if layers > len(stored):
            raise ValueError(f"{layers} layers, but {len(stored)} tensors")
        with torch.device("meta"):
            model = make()
            dense = sum(t.numel() for t in model.state_dict().values())
            stored = cut(model, stored)
        if dense > max(LARGEST_CUT * sum(map(math.prod, stored.values())), SMALL):
            raise ValueError(f"a dense model of {dense:,} weights")
        wanted = {name: tuple(t.shape) for name, t in model.state_dict().items()}
        for name in sorted({*wanted, *stored}):
            if wanted.get(name) != stored.get(name):
                raise ValueError(f"{name} is {stored.get(name)} in the file, {wanted.get(name)} in the description")
    except (*_MALFORMED, OSError, SafetensorError) as error:
        raise BundleError(
            f"{path.parent} does not hold the weights that it describes: {one_line(error, 300)}",
            hint="Make it again, by the versions that it was made with.",
        ) from error


def read_module_config(folder: str | Path) -> ModuleConfig | None:
    """Return how the model in a folder is made, or None where the folder is one of transformers.

    Raises BundleError where its file is damaged.
    """
    folder = Path(folder)
    if (folder / FILE).is_file():
        return _own_config(folder / FILE)
    other = folder / "config.json"
    entry = _json(other) if other.is_file() else {}
    return _timm_config(entry) if "architecture" in entry and "model_type" not in entry else None


def _own_config(path: Path) -> ModuleConfig:
    entry = _json(path)
    if entry.get("format") != FORMAT:
        raise BundleError(f"{path} does not describe a module.", hint="Save it by save_module.")
    missing = {"factory", "kwargs", "image", "labels", "spec"} - set(entry)
    if missing:
        raise BundleError(f"{path} lacks {', '.join(sorted(missing))}.")
    try:
        if int(entry["version"]) > VERSION:
            raise BundleError(f"{path} is of version {entry['version']}, newer than this package reads ({VERSION}).")
        channels, height, width = (int(n) for n in entry["image"])
        kwargs, labels = dict(entry["kwargs"]), tuple(str(x) for x in entry["labels"])
    except (KeyError, TypeError, ValueError) as error:
        raise BundleError(f"{path} is damaged: {error}") from error
    return ModuleConfig(str(entry["factory"]), kwargs, (channels, height, width), labels, entry["spec"])


def _timm_config(entry: Mapping[str, Any]) -> ModuleConfig:
    """Read a folder that timm wrote. Source: timm, models/_hub.py and data/transforms_factory.py."""
    own = {key: entry[key] for key in ("num_classes", "label_names") if key in entry}
    cfg = {**entry, **(entry.get("pretrained_cfg") or {}), **own}  # older releases leave the first training's inside
    size = tuple(int(n) for n in cfg.get("input_size", (3, 224, 224)))
    if len(size) != 3 or size[1] != size[2]:
        raise UnsupportedModelError(f"The model's images are {size}; only square ones are handled of timm's models.")
    mode, filtered = cfg.get("crop_mode") or "center", cfg.get("interpolation", "bicubic")
    if mode != "center" or filtered not in _FILTERS:
        raise UnsupportedModelError(f"timm's crop_mode '{mode}' with interpolation '{filtered}' is not followed here.")
    edge = math.floor(size[1] / float(cfg.get("crop_pct") or 0.875))
    names = cfg.get("label_names") or {}  # a list or, where numbers are left out, names by number
    known = {int(n): str(name) for n, name in (names.items() if isinstance(names, Mapping) else enumerate(names))}
    labels = tuple(known.get(n, f"LABEL_{n}") for n in range(int(cfg["num_classes"])))
    processor = {
        "image_processor_type": "BitImageProcessor",
        "size": {"shortest_edge": edge},
        "crop_size": {"height": size[1], "width": size[2]},
        "round_crop": True,  # as torchvision's CenterCrop, which timm uses
        "resample": _FILTERS[filtered],
        "image_mean": list(cfg["mean"]),
        "image_std": list(cfg["std"]),
        "do_convert_rgb": size[0] == 3,
    }
    kwargs = {**(entry.get("model_args") or {}), "model_name": cfg["architecture"], "num_classes": cfg["num_classes"]}
    return ModuleConfig(TIMM, kwargs, (size[0], size[1], size[2]), labels, processor=processor)


def _json(path: Path) -> dict[str, Any]:
    try:
        entry = read_json(path)
    except (OSError, ValueError) as error:
        raise BundleError(f"No {path.name} that can be read in {path.parent}: {error}") from error
    return entry if isinstance(entry, dict) else {}


def _factory(name: str, allow: Sequence[str]) -> Callable[..., nn.Module]:
    module, _, attribute = name.rpartition(".")
    try:
        if name == TIMM:
            return partial(importlib.import_module("timm").create_model, pretrained=False)
        if module == "torchvision.models":
            return partial(importlib.import_module(module).get_model, attribute, weights=None)
        if module in allow:
            return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise InputError(f"The factory {name} is not there: {error}.", hint="Install its package.") from error
    except RuntimeError as error:  # torchvision's, where its operators do not fit the torch that is installed
        raise InputError(
            f"{module} cannot be imported: {one_line(error)}",
            hint="Install its wheel for this torch: of the same version and, CPU or CUDA, from the same index.",
        ) from error
    raise InputError(
        f"The folder asks to call {name}, which would run that module's code.",
        hint=f"If you trust it, allow its module: deploy-prune --allow-code {module} ..., or {ALLOW_CODE}={module}.",
    )
