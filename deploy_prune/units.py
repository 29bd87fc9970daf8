"""What can be cut, which of it stays, and the frozen plan of a cut. No torch here.

A *unit* is an attention head, an FFN neuron or a channel. A *unit group* says which output rows of the
producers make the unit and which input columns of the consumers read it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np

from .errors import InputError

UnitKind = Literal["head", "neuron", "channel"]
MOST_UNITS = 1 << 24  # of one group: what a plan may ask to be allocated


@dataclass(frozen=True)
class Units:
    """Name units that compete with each other: all that scores, searches and plans need to know."""

    name: str  # "L03.heads"
    kind: UnitKind
    layer: int
    size: int  # number of units
    width: int  # rows of a producer per unit: head_dim for a head, 1 for a neuron or a channel


@dataclass(frozen=True)
class UnitGroup(Units):
    """Name the modules that are cut together for one sub-layer.

    `producers` lose output rows, `consumer` loses input columns; a unit is `width` consecutive rows
    or columns. `core` is the module left out altogether when no unit stays ("" = the producers
    alone). `residual` is the module whose first input is the stream that is added to the consumer's
    output, which `gain` ("" = none), a parameter (d,), multiplies before that. Paths are relative to the model's root.
    """

    hidden: int  # d: what the producers read and the consumer writes
    params: int  # parameters that one unit takes with it
    producers: tuple[str, ...]
    consumer: str
    residual: str
    core: str = ""
    gain: str = ""

    @property
    def stand_in(self) -> str:
        """Return the path of the module that adds the sub-layer's constant when no unit stays.

        It is the consumer, or the core where that holds the consumer.
        """
        return self.core if self.core and self.consumer.startswith(f"{self.core}.") else self.consumer

    def columns(self, kept: Iterable[int]) -> list[int]:
        """Return the consumer's input columns (= the producers' output rows) of the kept units."""
        return [u * self.width + j for u in kept for j in range(self.width)]


@dataclass(frozen=True)
class Reader:
    """Name a convolution or Linear that reads a group's channels.

    Each channel is `spread` of its input features (H x W behind a flattening, else 1), and `width` columns of its
    weight (outputs, inputs * taps): a convolution has a column for every element (`taps`) of its kernel.
    """

    path: str
    spread: int = 1
    taps: int = 1

    @property
    def width(self) -> int:
        """Return the columns of the flattened weight per channel."""
        return self.spread * self.taps

    def columns(self, kept: Iterable[int]) -> list[int]:
        """Return the columns of the flattened weight that read the kept channels."""
        return [u * self.width + j for u in kept for j in range(self.width)]


@dataclass(frozen=True)
class ChannelGroup(Units):
    """Name the modules that are cut together for the channels of one stream.

    `producers` lose output rows, `through` (batch norms, depthwise convolutions) lose both, `readers` lose input
    columns. Producers of a `coupled` group are added to each other: a residual stream. Module paths are relative to
    the model's root.
    """

    producers: tuple[str, ...]
    through: tuple[str, ...]
    readers: tuple[Reader, ...]
    coupled: bool = False


@dataclass(frozen=True)
class GroupPlan:
    """Hold the kept units of one group, ascending, and the scale that each is multiplied by."""

    name: str
    kind: UnitKind
    layer: int
    total: int
    kept: tuple[int, ...]
    scales: tuple[float, ...]

    @property
    def count(self) -> int:
        return len(self.kept)


class MaskSet(dict[str, np.ndarray]):
    """Map each group name to its mask (units,) of float64; 0 cuts the unit, any other value scales it."""

    @classmethod
    def ones(cls, groups: Iterable[Units]) -> MaskSet:
        return cls({g.name: np.ones(g.size) for g in groups})


@dataclass(frozen=True)
class SlicePlan:
    """Say which units of which groups stay. Frozen, hashable, free of torch."""

    groups: tuple[GroupPlan, ...]

    @classmethod
    def from_masks(cls, groups: Sequence[Units], masks: Mapping[str, np.ndarray]) -> SlicePlan:
        """Build the plan from one mask (units,) per group.

        Raises InputError for a missing, extra, wrongly sized or non-finite mask.
        """
        names = {g.name for g in groups}
        if extra := sorted(set(masks) - names):
            raise InputError(
                f"Masks for unknown groups: {', '.join(extra)}.",
                hint=f"This model has: {', '.join(sorted(names))}.",
            )
        plans = []
        for g in groups:
            if g.name not in masks:
                raise InputError(f"No mask for group {g.name}.", hint=f"Give {g.size} values for it.")
            mask = np.asarray(masks[g.name], dtype=np.float64)
            if mask.shape != (g.size,):
                raise InputError(
                    f"The mask of {g.name} has shape {mask.shape}, but the group has {g.size} {g.kind}s.",
                    hint="Masks must be made for this very architecture.",
                )
            if not np.isfinite(mask).all():
                raise InputError(f"The mask of {g.name} holds NaN or Inf.", hint="Use finite values.")
            kept = np.flatnonzero(mask)
            plans.append(
                GroupPlan(
                    name=g.name,
                    kind=g.kind,
                    layer=g.layer,
                    total=g.size,
                    kept=tuple(int(i) for i in kept),
                    scales=tuple(float(v) for v in mask[kept]),
                )
            )
        return cls(tuple(plans))

    def masks(self) -> MaskSet:
        """Return the mask values (units,) of every group."""
        out = MaskSet()
        for g in self.groups:
            mask = np.zeros(g.total)
            mask[list(g.kept)] = g.scales
            out[g.name] = mask
        return out

    def folded(self) -> SlicePlan:
        """Return the plan of a model whose weights hold the scales: the same units, every scale 1."""
        return SlicePlan(tuple(replace(g, scales=(1.0,) * g.count) for g in self.groups))

    def __getitem__(self, name: str) -> GroupPlan:
        for g in self.groups:
            if g.name == name:
                return g
        raise KeyError(name)

    @property
    def hash(self) -> str:
        """SHA-256 of the canonical JSON of the kept indices per group (integers only)."""
        kept = {g.name: list(g.kept) for g in self.groups}
        return hashlib.sha256(json.dumps(kept, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    def layer_counts(self) -> list[dict[str, int]]:
        """Return the kept counts per layer: [{"heads": .., "neurons": ..}, ...]."""
        layers: dict[int, dict[str, int]] = {}
        for g in self.groups:
            layers.setdefault(g.layer, {})[f"{g.kind}s"] = g.count
        return [layers[i] for i in sorted(layers)]

    def to_dict(self) -> dict[str, Any]:
        return {
            "hash": self.hash,
            "groups": [
                {
                    "name": g.name,
                    "kind": g.kind,
                    "layer": g.layer,
                    "total": g.total,
                    "kept": list(g.kept),
                    "scales": list(g.scales),
                }
                for g in self.groups
            ],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> SlicePlan:
        """Read what `to_dict` wrote. Raises InputError for what is no plan, and when the hash does not match."""
        try:
            plan, wanted = cls(tuple(_group_plan(g) for g in data["groups"])), data["hash"]
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise InputError(
                f"The plan is malformed ({type(error).__name__}: {error!s:.100}).", hint="Make the bundle again."
            ) from error
        if len({g.name for g in plan.groups}) < len(plan.groups):
            raise InputError("The plan names a group twice.", hint="Make the bundle again.")
        if plan.hash != wanted:
            raise InputError("The plan's hash does not match its kept units.", hint="Make the bundle again.")
        return plan


def _group_plan(entry: Mapping[str, Any]) -> GroupPlan:
    """Read one group of a plan. Raises KeyError, TypeError, ValueError or OverflowError."""
    total, kept = int(entry["total"]), tuple(int(i) for i in entry["kept"])
    scales = tuple(float(s) for s in entry["scales"])
    if entry["kind"] not in get_args(UnitKind) or not isinstance(entry["name"], str):
        raise ValueError(f"no group: {entry['name']!r:.40} of {entry['kind']!r:.40}")
    if not 0 <= total <= MOST_UNITS or list(kept) != sorted(set(kept)) or not all(0 <= i < total for i in kept):
        raise ValueError(f"{entry['name']} keeps units that it does not have")
    if len(scales) != len(kept) or not np.isfinite(scales).all():
        raise ValueError(f"{entry['name']} has no finite scale for each unit")
    return GroupPlan(entry["name"], entry["kind"], int(entry["layer"]), total, kept, scales)
