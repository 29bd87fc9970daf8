"""Read a sliced checkpoint that was cut under a release of transformers which names modules differently."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from torch import nn

from .archs import arch_of
from .errors import BundleError, UnsupportedModelError

T = TypeVar("T")


def renamed(model: nn.Module, spec: dict[str, Any], state: dict[str, T]) -> tuple[dict[str, Any], dict[str, T]]:
    """Return a sliced checkpoint's spec and tensors (or their shapes) under the names of a stock model's modules here.

    Where the names are the same, both are returned as they are. Raises BundleError, naming the release that wrote the
    checkpoint, where the model is built in another way.
    """
    if "groups" not in spec:
        return spec, state  # channels: transformers has not renamed these models' modules
    config: Any = model.config
    try:
        groups = {g.name: g for g in arch_of(model).groups(model)}
        if all(old["consumer"] == groups[old["name"]].consumer for old in spec["groups"]):
            return spec, state
        paths = _layer_paths(model, spec)
        for old in spec["groups"]:
            g = groups[old["name"]]
            paths |= dict(zip((*old["producers"], old["consumer"]), (*g.producers, g.consumer), strict=True))
            if not old["kept"]:
                paths[_stand_in(old)] = g.stand_in
    except (UnsupportedModelError, KeyError, ValueError) as error:
        import transformers

        if config.transformers_version == transformers.__version__:
            raise BundleError(
                f"The sliced {type(model).__name__} does not hold the units that its config describes.",
                hint="Make the bundle again.",
            ) from error
        raise BundleError(
            f"The sliced {type(model).__name__} was cut under transformers {config.transformers_version}, whose modules"
            f" are not those of transformers {transformers.__version__}.",
            hint=f"Install transformers {config.transformers_version}, or make the bundle again.",
        ) from error
    new = [
        {**old, "producers": list(g.producers), "consumer": g.consumer, "core": g.core}
        for old in spec["groups"]
        for g in [groups[old["name"]]]
    ]
    return {**spec, "groups": new}, {_moved(name, paths): tensor for name, tensor in state.items()}


def _layer_paths(model: nn.Module, spec: Mapping[str, Any]) -> dict[str, str]:
    """Map the path of every layer in the checkpoint to that in the model."""
    arch, consumer = arch_of(model), spec["groups"][0]["consumer"]
    prefix = arch.prefix(model)
    (layers,) = {x.layers for x in arch.layouts if consumer.startswith(f"{prefix}{x.layers}.0.")}
    return {f"{prefix}{layers}.{i}": path for i, path in enumerate(arch.layer_paths(model))}


def _stand_in(group: Mapping[str, Any]) -> str:
    """Return the path of what adds the constant of a sub-layer without units, as `UnitGroup.stand_in`."""
    core, consumer = group["core"], group["consumer"]
    return str(core if core and consumer.startswith(f"{core}.") else consumer)


def _moved(name: str, paths: Mapping[str, str]) -> str:
    """Return a tensor's name below the new path of the longest path that holds it."""
    parts = name.split(".")
    for end in range(len(parts) - 1, 0, -1):
        if (path := ".".join(parts[:end])) in paths:
            return ".".join((paths[path], *parts[end:]))
    return name
