"""Compensations of convolutions that run no sweep: the Gram fold, and batch norm statistics taken anew."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..archs.conv import ChannelGraph
from ..channel_masking import mask_channels, read_projection
from ..graph_runner import GraphRunner
from ..masking import OutputWeights, Updates
from ..moments import gram
from ..parallel import SectionSum, ordered, sections
from ..patches import is_convolution, some_positions
from ..units import ChannelGroup, Reader, SlicePlan

RIDGE = 1e-3  # of the mean diagonal of the channels' second moment


@torch.no_grad()
def fold_channels(model: nn.Module, graph: ChannelGraph, plan: SlicePlan, runner: GraphRunner) -> Updates:
    """Let kept channels stand for cut ones as far as they tell them: W'[o, k] = sum_h W[o, h] B[h, k].

    B = G_HP (G_PP + ridge d I)^-1 predicts all channels H from the kept ones P, G being their second moment where they
    are read, in the dense model. The same B serves every element of a kernel; bias and batch norm stay.

    Source: docs/sources.md, the Gram fold over channels.
    """
    updates = {}
    groups = {g.name: g for g in graph.groups}
    for layer in graph.layers:
        group = groups.get(layer.reads)
        if group is None or plan[group.name].count in (0, group.size):
            continue
        runner.advance(layer.node)
        kept = torch.tensor(plan[group.name].kept, device=runner.device)
        second = channel_moments(runner, model.get_submodule(layer.path), layer.source, group)
        inner = second[kept][:, kept]
        size = float(inner.diagonal().mean()) or 1.0  # all kept channels dead
        inner = inner + RIDGE * size * torch.eye(len(kept), dtype=inner.dtype, device=inner.device)
        fold = torch.linalg.solve(inner, second[kept]).T  # (H, P)
        old = read_projection(model, layer)
        weight = old.weight.reshape(len(old.weight), group.size, layer.width)
        folded = torch.einsum("ohw,hp->opw", weight, fold.to(weight)).flatten(1)
        rows = torch.tensor(graph.keeps(plan).get(layer.writes, tuple(range(layer.outputs))))
        updates[layer.path] = OutputWeights(folded[rows].float(), old.bias[rows].float())
    return updates


def channel_moments(runner: GraphRunner, reader: nn.Module, source: str, group: ChannelGroup) -> Tensor:
    """Return sum over images and positions of c c^T (C, C) of a group's channels, at the node that a layer reads."""
    sums = SectionSum((group.size, group.size), runner.device)
    for at, number in ordered(runner.numbers):
        (x,) = runner.values(at, [source])
        flat = x.flatten(2) if is_convolution(reader) else x.reshape(-1, group.size, x.shape[-1] // group.size)
        flat = flat[..., some_positions(flat.shape[2], number)]
        sums.add(number % sections(), gram(flat.transpose(1, 2).flatten(0, 1)))
    return sums.total()


@torch.no_grad()
def renorm(
    model: nn.Module, graph: ChannelGraph, plan: SlicePlan, updates: Updates, feeds: Sequence[Tensor]
) -> Updates:
    """Return the updates with the batch norms' statistics taken anew on the pruned model, in one pass over the images.

    Means and variances are averaged over the batches, each batch being normalised by its own. Layers whose batch norm
    stands right behind them are renewed, unless their weight is used again.
    """
    virtual: Any = mask_channels(model, graph, plan, updates)
    renewed = [x for x in graph.layers if x.norm and not x.shared]
    norms = [virtual.get_submodule(x.norm) for x in renewed]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain average
        norm.train()
    device = next(virtual.parameters()).device
    for images in feeds:
        virtual(images.to(device))
    virtual.eval()
    keeps, fresh = graph.keeps(plan), dict(updates)
    for layer in renewed:
        rows = torch.tensor(keeps.get(layer.writes, tuple(range(layer.outputs))), dtype=torch.long)
        if len(rows):
            new = read_projection(virtual, layer)
            read = Reader(layer.path, layer.spread, layer.taps).columns(keeps.get(layer.reads, range(layer.inputs)))
            fresh[layer.path] = OutputWeights(new.weight[rows][:, read].float(), new.bias[rows].float())
    return fresh
