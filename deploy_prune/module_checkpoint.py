"""Sliced models that are no transformers: safetensors, the factory that makes the dense class, and the cut sizes.

    model.safetensors   the weights
    sliced.json         {"format": "deploy-prune-module", "version": 1, "factory": "torchvision.models.resnet18",
                         "kwargs": {...}, "spec": {"plan_hash": ..., "channels": {"inputs": {...}, "outputs": {...}}}}

`inputs` and `outputs` map the path of every module that was cut to what is left of its input and output features.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import nn

from .bundle import disk_errors
from .errors import BundleError, InputError
from .modeling_sliced import resize

FORMAT, VERSION = "deploy-prune-module", 1
SPEC, WEIGHTS = "sliced.json", "model.safetensors"
LOADING = ("weights", "weights_backbone", "pretrained", "checkpoint_path")  # arguments that fetch or read weights


def save_module(
    model: nn.Module, folder: str | Path, factory: str, kwargs: Mapping[str, Any] | None = None
) -> list[Path]:
    """Write a sliced model, and how to make its class: a factory's dotted name and its arguments (plain JSON).

    Returns the files. Raises InputError for a model that was not sliced, or arguments that JSON cannot hold.
    """
    spec = getattr(model, "deploy_prune", None)
    if not spec:
        raise InputError(f"This {type(model).__name__} was not sliced.", hint="Give what slice_model returned.")
    entry = {"format": FORMAT, "version": VERSION, "factory": factory, "kwargs": dict(kwargs or {}), "spec": spec}
    try:
        text = json.dumps(entry, indent=1) + "\n"
    except TypeError as error:
        raise InputError(
            f"The factory's arguments are no plain JSON: {error}.", hint="Use numbers and names."
        ) from error
    folder = Path(folder)
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        state = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
        save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
        (folder / SPEC).write_text(text, encoding="utf-8")
    return [folder / WEIGHTS, folder / SPEC]


def load_module(
    folder: str | Path, factory: Callable[..., nn.Module] | None = None, *, allow: Sequence[str] = ()
) -> nn.Module:
    """Rebuild a sliced model from its folder, every tensor strictly as saved.

    The class comes from `factory` where it is given, else from the name in the folder. Calling what a folder names
    runs code, so that only torchvision's registered models and timm.create_model are called, without weights of their
    own, and what lies in the modules that `allow` names.
    Raises BundleError for a folder that is damaged, InputError for a factory that is not allowed or not there.
    """
    folder = Path(folder)
    entry = _read(folder / SPEC)
    kwargs = {k: v for k, v in entry["kwargs"].items() if k not in LOADING}
    model = (factory or _factory(entry["factory"], allow))(**kwargs)
    spec = entry["spec"]
    try:
        resize(model, spec)
        model.load_state_dict(load_file(folder / WEIGHTS), strict=True)
    except (RuntimeError, OSError, AttributeError) as error:
        raise BundleError(
            f"{folder} does not hold the weights its {SPEC} describes: {str(error).splitlines()[0]}",
            hint=f"Is {entry['factory']} the factory, of the same version, that the model was made by?",
        ) from error
    model.deploy_prune = spec
    return model.eval()


def _read(path: Path) -> dict[str, Any]:
    try:
        entry = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise BundleError(f"No {path.name} that can be read in {path.parent}: {error}") from error
    if not isinstance(entry, dict) or entry.get("format") != FORMAT:
        raise BundleError(f"{path} does not describe a sliced module.", hint="Save it by save_module.")
    if int(entry.get("version", 0)) > VERSION:
        raise BundleError(f"{path} is of version {entry['version']}, newer than this package reads ({VERSION}).")
    missing = {"factory", "kwargs", "spec"} - set(entry)
    if missing:
        raise BundleError(f"{path} lacks {', '.join(sorted(missing))}.")
    return entry


def _factory(name: str, allow: Sequence[str]) -> Callable[..., nn.Module]:
    module, _, attribute = name.rpartition(".")
    try:
        if name == "timm.create_model":
            return partial(importlib.import_module("timm").create_model, pretrained=False)
        if module == "torchvision.models":
            return partial(importlib.import_module(module).get_model, attribute, weights=None)
        if module in allow:
            return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise InputError(f"The factory {name} is not there: {error}.", hint="Install its package.") from error
    raise InputError(
        f"The folder asks to call {name}, which would run that module's code.",
        hint="Give the factory itself (factory=...), or allow its module by allow=('...',) if you trust it.",
    )
