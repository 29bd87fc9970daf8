"""What an adapter says of an architecture, and how a model is taken apart by it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import UnsupportedModelError
from ..units import UnitGroup

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Sublayer:
    """Name the modules of a sub-layer by their paths below a layer (`residual` "" = the layer itself).

    `gain` is a parameter (d,) that the sub-layer's output is multiplied by before the residual is added.
    """

    producers: tuple[str, ...]
    consumer: str
    residual: str
    core: str = ""
    gain: str = ""


@dataclass(frozen=True)
class Layout:
    """Name a model's layers and, below each, the modules of its two sub-layers."""

    layers: str
    attention: Sublayer
    ffn: Sublayer

    def fits(self, encoder: nn.Module) -> bool:
        """Say whether an encoder's first layer has all these modules."""
        paths = [*self.attention.producers, self.attention.consumer, *self.ffn.producers, self.ffn.consumer]
        try:
            for path in paths:
                encoder.get_submodule(f"{self.layers}.0.{path}")
        except AttributeError:
            return False
        return True


@dataclass(frozen=True)
class Arch:
    """Describe a family: where its layers are and which modules are cut together in each.

    A model has the first of the `layouts` that fits it: releases of transformers name modules differently.
    `select_heads` names an attention argument with one slice per head, axis 1 ("" = none), of which
    only the kept heads' slices may reach a sliced layer. `tolerance` bounds |masked - sliced| in fp32.
    """

    name: str
    model_types: tuple[str, ...]
    layouts: tuple[Layout, ...]
    select_heads: str = ""
    tolerance: float = 1e-5

    def prefix(self, model: nn.Module) -> str:
        """Return the path of the encoder inside a model with a task head ("" for a bare encoder)."""
        prefix = str(getattr(model, "base_model_prefix", ""))
        return f"{prefix}." if prefix and hasattr(model, prefix) else ""

    def layer_paths(self, model: nn.Module) -> list[str]:
        """Return the path of every encoder layer, bottom first, of a dense or sliced model."""
        for layout in self.layouts:
            path = self.prefix(model) + layout.layers
            try:
                return [f"{path}.{i}" for i in range(len(list(model.get_submodule(path).children())))]
            except AttributeError:
                continue
        raise UnsupportedModelError(f"{type(model).__name__} has none of the layers that {self.name} models have.")

    def layout(self, model: nn.Module) -> Layout:
        """Return the layout of a dense model. Raises UnsupportedModelError where none fits."""
        encoder = model.get_submodule(self.prefix(model).rstrip("."))
        for layout in self.layouts:
            if layout.fits(encoder):
                return layout
        raise UnsupportedModelError(
            f"The layers of this {type(model).__name__} are built in none of the ways that are known here.",
            hint="Give a plain, dense checkpoint, or install the transformers release named in constraints.txt.",
        )

    def groups(self, model: nn.Module) -> tuple[UnitGroup, ...]:
        """Return the unit groups of a dense model, layer by layer, heads before neurons."""
        layout, groups = self.layout(model), []
        for index, layer in enumerate(self.layer_paths(model)):
            core = model.get_submodule(f"{layer}.{layout.attention.core}")
            width: Any = getattr(core, "attention_head_size", None) or core.head_dim
            groups.append(_group(model, layer, index, "head", int(width), layout.attention))
            groups.append(_group(model, layer, index, "neuron", 1, layout.ffn))
        return tuple(groups)


def _group(model: nn.Module, layer: str, index: int, kind: str, width: int, sub: Sublayer) -> UnitGroup:
    from torch import nn

    def linear(path: str) -> nn.Linear:
        module = model.get_submodule(f"{layer}.{path}")
        if not isinstance(module, nn.Linear):
            raise UnsupportedModelError(
                f"{layer}.{path} is a {type(module).__name__}, expected a Linear.",
                hint="Quantised, LoRA-wrapped or already sliced models cannot be pruned; give the plain one.",
            )
        return module

    producers = [linear(p) for p in sub.producers]
    consumer = linear(sub.consumer)
    per_row = sum(p.in_features + (p.bias is not None) for p in producers)
    return UnitGroup(
        name=f"L{index:02d}.{kind}s",
        kind=kind,  # type: ignore[arg-type]
        layer=index,
        size=consumer.in_features // width,
        width=width,
        hidden=consumer.out_features,
        params=width * (per_row + consumer.out_features),
        producers=tuple(f"{layer}.{p}" for p in sub.producers),
        consumer=f"{layer}.{sub.consumer}",
        residual=f"{layer}.{sub.residual}" if sub.residual else layer,
        core=f"{layer}.{sub.core}" if sub.core else "",
        gain=f"{layer}.{sub.gain}" if sub.gain else "",
    )


def per_layer(groups: Sequence[UnitGroup]) -> list[list[UnitGroup]]:
    """Return the groups of each layer, in the order in which the layer runs them."""
    layers: dict[int, list[UnitGroup]] = {}
    for g in groups:
        layers.setdefault(g.layer, []).append(g)
    return [layers[i] for i in sorted(layers)]
