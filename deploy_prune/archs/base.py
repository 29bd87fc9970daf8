"""What an adapter says of an architecture, and how a model is taken apart by it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import UnsupportedModelError
from ..units import UnitGroup

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Sublayer:
    """Name the modules of a sub-layer by their paths below a layer (`residual` "" = the layer itself)."""

    producers: tuple[str, ...]
    consumer: str
    residual: str
    core: str = ""


@dataclass(frozen=True)
class Arch:
    """Describe a family: where its layers are and which modules are cut together in each.

    `select_heads` names an attention argument with one slice per head, axis 1 ("" = none), of which
    only the kept heads' slices may reach a sliced layer. `tolerance` bounds |masked - sliced| in fp32.
    """

    name: str
    model_types: tuple[str, ...]
    layers: str
    attention: Sublayer
    ffn: Sublayer
    select_heads: str = ""
    tolerance: float = 1e-5

    def prefix(self, model: nn.Module) -> str:
        """Return the path of the encoder inside a model with a task head ("" for a bare encoder)."""
        prefix = str(getattr(model, "base_model_prefix", ""))
        return f"{prefix}." if prefix and hasattr(model, prefix) else ""

    def layer_paths(self, model: nn.Module) -> list[str]:
        """Return the path of every encoder layer, bottom first."""
        path = self.prefix(model) + self.layers
        return [f"{path}.{i}" for i in range(len(list(model.get_submodule(path).children())))]

    def groups(self, model: nn.Module) -> tuple[UnitGroup, ...]:
        """Return the unit groups of a dense model, layer by layer, heads before neurons."""
        groups = []
        for index, layer in enumerate(self.layer_paths(model)):
            width = int(model.get_submodule(f"{layer}.{self.attention.core}").attention_head_size)  # type: ignore[arg-type]
            groups.append(_group(model, layer, index, "head", width, self.attention))
            groups.append(_group(model, layer, index, "neuron", 1, self.ffn))
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
    )


def per_layer(groups: Sequence[UnitGroup]) -> list[list[UnitGroup]]:
    """Return the groups of each layer, in the order in which the layer runs them."""
    layers: dict[int, list[UnitGroup]] = {}
    for g in groups:
        layers.setdefault(g.layer, []).append(g)
    return [layers[i] for i in sorted(layers)]
