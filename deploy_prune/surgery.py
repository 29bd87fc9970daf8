"""How one model's units are masked, cut and counted: heads and neurons of an adapter, or the channels it traces."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .archs import arch_of, check_model, config_of, is_convolutional
from .archs.conv import ChannelGraph, trace_channels
from .channel_costs import channel_flops, channel_params, counts_of
from .channel_masking import mask_channels, scatter_channels
from .channel_slicing import prove, slice_channels, without
from .costs import encoder_flops, removed_params
from .masking import Updates, mask_model, scatter
from .slicing import slice_model
from .units import ChannelGroup, SlicePlan, UnitGroup

# A hundred layers of sums in another order, on a GPU by another algorithm, each rescaled by a batch norm.
CHANNEL_TOLERANCE = 1e-4
TRIED_IMAGES = 2


class Surgery(Protocol):
    """Cut one dense model; `tolerance` bounds |masked - sliced| relative to the outputs, in fp32."""

    @property
    def model(self) -> nn.Module: ...
    @property
    def groups(self) -> tuple[Any, ...]: ...
    @property
    def name(self) -> str: ...
    @property
    def tolerance(self) -> float: ...

    def mask(self, plan: SlicePlan, updates: Updates | None = None) -> nn.Module:
        """Return the virtual model: a copy in which cut units are multiplied by 0."""

    def slice(self, plan: SlicePlan, updates: Updates | None = None) -> nn.Module:
        """Return the sliced model: a smaller copy, equal to the virtual one."""

    def restore(self, plan: SlicePlan, state: Mapping[str, Tensor]) -> nn.Module:
        """Return the virtual model that equals a sliced one of these tensors, whatever they were trained to."""

    def flops(self, seq_len: int, plan: SlicePlan | None = None) -> int:
        """Return the FLOPs (2 x MAC) of what can be cut, for one sequence or image, as a plan leaves it."""

    def removed_params(self, plan: SlicePlan) -> int:
        """Return the number of parameters that a plan cuts."""


@dataclass(frozen=True)
class UnitSurgery:
    """Cut heads and neurons."""

    model: nn.Module
    groups: tuple[UnitGroup, ...]

    @property
    def name(self) -> str:
        return arch_of(self.model).name

    @property
    def tolerance(self) -> float:
        return arch_of(self.model).tolerance

    def mask(self, plan: SlicePlan, updates: Updates | None = None) -> nn.Module:
        return mask_model(self.model, self.groups, plan, updates)

    def slice(self, plan: SlicePlan, updates: Updates | None = None) -> nn.Module:
        return slice_model(self.model, self.groups, plan, updates)

    def restore(self, plan: SlicePlan, state: Mapping[str, Tensor]) -> nn.Module:
        return mask_model(scatter(self.model, self.groups, plan, state), self.groups, plan.folded())

    def flops(self, seq_len: int, plan: SlicePlan | None = None) -> int:
        return encoder_flops(self.groups, seq_len, plan)

    def removed_params(self, plan: SlicePlan) -> int:
        return removed_params(self.groups, plan)


@dataclass(frozen=True)
class ChannelSurgery:
    """Cut channels; the FLOPs are those of the whole network, of which nearly everything can be cut."""

    model: nn.Module
    graph: ChannelGraph

    tolerance = CHANNEL_TOLERANCE

    @property
    def groups(self) -> tuple[ChannelGroup, ...]:
        return self.graph.groups

    @property
    def name(self) -> str:
        return str(config_of(self.model).model_type)

    @cached_property
    def params(self) -> int:
        """Return the parameters of the dense model."""
        return sum(p.numel() for p in self.model.parameters())

    def mask(self, plan: SlicePlan, updates: Updates | None = None) -> nn.Module:
        return mask_channels(self.model, self.graph, plan, updates)

    def slice(self, plan: SlicePlan, updates: Updates | None = None) -> nn.Module:
        return slice_channels(self.model, self.graph, plan, updates)

    def restore(self, plan: SlicePlan, state: Mapping[str, Tensor]) -> nn.Module:
        return mask_channels(scatter_channels(self.model, self.graph, plan, state), self.graph, plan.folded())

    def flops(self, seq_len: int, plan: SlicePlan | None = None) -> int:
        return self.flops_of(counts_of(self.groups, plan))

    def flops_of(self, counts: Mapping[str, int]) -> int:
        """Return the FLOPs at these channels per group."""
        return int(channel_flops(self.graph).cost(counts))

    def removed_params(self, plan: SlicePlan) -> int:
        return self.params - int(channel_params(self.graph, self.params).cost(counts_of(self.groups, plan)))


def surgery_of(model: nn.Module, image: tuple[int, int, int] | None = None, *, residual: bool = False) -> Surgery:
    """Find what can be cut in a dense model; convolutional networks are traced at the size (C, H, W) of their images.

    `residual` also offers the channels of residual streams. Raises UnsupportedModelError with the reasons.
    """
    if not is_convolutional(model):
        return UnitSurgery(model, check_model(model).groups(model))
    if image is None:
        raise ValueError("a convolutional network is traced by the size of its images")
    return channel_surgery(model, _noise(model, image), residual=residual)


def surgery_of_plan(model: nn.Module, plan: SlicePlan, image: tuple[int, int, int] | None = None) -> Surgery:
    """Return what a plan was made for: the dense model and, of a convolutional network, the groups of the plan."""
    if image is None or not is_convolutional(model):
        return surgery_of(model)
    graph = trace_channels(model, _noise(model, image), residual=True)
    others = {g.name for g in graph.groups} - {g.name for g in plan.groups}
    return ChannelSurgery(model, without(graph, others, graph.refused))


def _noise(model: nn.Module, image: tuple[int, int, int]) -> Tensor:
    noise = torch.randn(TRIED_IMAGES, *image, generator=torch.Generator().manual_seed(0))
    return noise.to(next(model.parameters()).device)


def channel_surgery(model: nn.Module, images: Tensor, *, residual: bool = False) -> ChannelSurgery:
    """Trace a convolutional network on images (B, C, H, W), and try every group's cut on them."""
    return ChannelSurgery(model, prove(model, trace_channels(model, images, residual=residual), images))
