"""The virtual model of a convolutional network, and layers read and written with the batch norm behind them."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .archs.conv import ChannelGraph, Layer
from .masking import OutputWeights, Updates
from .units import Reader, SlicePlan

LEAST_SLOPE = 1e-3  # of a batch norm's largest: a smaller one is not divided by


def mask_channels(model: nn.Module, graph: ChannelGraph, plan: SlicePlan, updates: Updates | None = None) -> nn.Module:
    """Return a copy of the dense model in which cut channels are multiplied by 0 where they are read.

    The masks stand at the readers' inputs, behind batch norm, activation and pooling: at the convolution's own
    output the batch norm's shift would leak. `updates` maps a layer's path to its refitted projection.
    """
    virtual = copy.deepcopy(model)
    masks, keeps = plan.masks(), graph.keeps(plan)
    for g in graph.groups:
        for reader in g.readers:
            module: Any = virtual.get_submodule(reader.path)
            after = len(getattr(module, "kernel_size", ()))  # axes behind the channels
            mask = torch.as_tensor(masks[g.name], dtype=module.weight.dtype, device=module.weight.device)
            mask = mask.repeat_interleave(reader.spread).reshape(-1, *[1] * after)
            module.register_buffer("unit_mask", mask, persistent=False)
            module.register_forward_pre_hook(_multiply)
    for path, new in (updates or {}).items():
        layer = graph.layer(path)
        old = read_projection(virtual, layer)
        rows = keeps.get(layer.writes, range(layer.outputs))
        columns = Reader(path, layer.spread, layer.taps).columns(keeps.get(layer.reads, range(layer.inputs)))
        weight, bias = old.weight.clone(), old.bias.clone()
        at = torch.tensor(rows, dtype=torch.long)
        if columns:
            weight[at[:, None], torch.tensor(columns)] = new.weight.to(weight)
        bias[at] = new.bias.to(bias)
        write_projection(virtual, layer, OutputWeights(weight, bias))
    return virtual


def scatter_channels(model: nn.Module, graph: ChannelGraph, plan: SlicePlan, state: Mapping[str, Tensor]) -> nn.Module:
    """Return a copy of the dense model that holds a sliced model's tensors, each where it was cut from.

    Cut channels keep the dense weights; masked by a plan whose scales are 1 (`SlicePlan.folded`), it is the sliced
    model's function. Tensors that a sliced model lacks, because they made or read nothing, stay too.
    """
    whole = copy.deepcopy(model)
    dense = whole.state_dict()
    rows = {path: plan[g.name].kept for g in graph.groups for path in (*g.producers, *g.through)}
    columns = {r.path: (r, plan[g.name].kept) for g in graph.groups for r in g.readers}
    for name, cut in state.items():
        path, target = name.rpartition(".")[0], dense[name]
        if cut.shape == target.shape:
            target.copy_(cut)
            continue
        at = torch.tensor(rows.get(path, range(len(target))), dtype=torch.long, device=target.device)
        if target.dim() > 1 and path in columns:
            reader, kept = columns[path]
            along = torch.tensor(reader.columns(kept), dtype=torch.long, device=target.device)
            target.flatten(1)[at[:, None], along] = cut.to(target).flatten(1)
        else:
            target[at] = cut.to(target)
    return whole


@torch.no_grad()
def read_projection(model: nn.Module, layer: Layer) -> OutputWeights:
    """Return what a convolution or Linear with the batch norm behind it computes: weight (d, columns), bias (d,).

    In float64; the batch norm is read in evaluation mode: y = a (W h + b - mean) + shift, a = gamma / sigma.
    """
    module: Any = model.get_submodule(layer.path)
    rows = module.bias if hasattr(module, "spatial") else module.weight  # a Constant has no weight
    outputs = module.features if hasattr(module, "spatial") else len(rows)
    weight = module.weight.double().flatten(1) if hasattr(module, "weight") else torch.zeros(outputs, 0).double()
    bias = weight.new_zeros(outputs) if module.bias is None else module.bias.double()
    if not layer.norm:
        return OutputWeights(weight, bias)
    slope, shift = _affine(model.get_submodule(layer.norm))
    return OutputWeights(slope[:, None].to(weight) * weight, slope.to(bias) * bias + shift.to(bias))


@torch.no_grad()
def write_projection(model: nn.Module, layer: Layer, new: OutputWeights) -> None:
    """Make a layer, with the batch norm behind it, compute the given weight (d, columns) and bias (d,).

    The batch norm keeps its statistics; where its slope is (nearly) zero, it gets a slope that can be divided by. One
    without a weight keeps its slope, and one without a bias shifts by its mean. A layer without bias and batch norm
    keeps its bias of zero.
    """
    module: Any = model.get_submodule(layer.path)
    weight, bias = new.weight.double(), new.bias.double()
    if layer.norm:
        norm: Any = model.get_submodule(layer.norm)
        slope, _ = _affine(norm)
        if norm.weight is not None:
            least = LEAST_SLOPE * float(slope.abs().max()) or 1.0
            slope = torch.where(slope.abs() < least, torch.where(slope < 0, -least, least), slope)
            norm.weight.copy_(slope * (norm.running_var.double() + norm.eps).sqrt())
        weight = weight / slope[:, None]
        own = torch.zeros_like(bias) if module.bias is None else module.bias.double()
        if norm.bias is None:
            norm.running_mean.copy_(own - bias / slope)
        else:
            norm.bias.copy_(bias - slope * (own - norm.running_mean.double()))
    elif module.bias is not None:
        module.bias.copy_(bias)
    if hasattr(module, "weight"):
        module.weight.copy_(weight.reshape(module.weight.shape))


def _affine(norm: Any) -> tuple[Tensor, Tensor]:
    """Return a batch norm's slope and shift (d,) in evaluation mode, in float64: y = slope x + shift."""
    sigma = (norm.running_var.double() + norm.eps).sqrt()
    slope = 1 / sigma if norm.weight is None else norm.weight.double() / sigma
    shift = -slope * norm.running_mean.double()
    return slope, shift if norm.bias is None else shift + norm.bias.double()


def _multiply(module: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (args[0] * module.unit_mask, *args[1:])
