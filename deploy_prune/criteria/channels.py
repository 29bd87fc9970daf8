"""Scores of channels that need a run of the network: what cutting one costs when its readers are refitted."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ..archs.conv import ChannelGraph, Layer
from ..channel_masking import read_projection
from ..graph_runner import GraphRunner
from ..moments import MomentSums
from ..parallel import Shares, ordered
from ..patches import patches, some_positions

if TYPE_CHECKING:
    from .base import Evidence, Scores

Metric = Callable[[Layer, Tensor, Tensor], Tensor]
Eliminate = Callable[[Tensor, Tensor, Tensor, int], tuple[Tensor, Tensor]]


@torch.no_grad()
def score_channels(evidence: Evidence, graph: ChannelGraph, metric: Metric, eliminate: Eliminate) -> Scores:
    """Return the scores of every group: sums over its readers of what eliminating its channels there costs.

    Each reader is a projection of the patches that it reads, a channel being the columns of its kernel. Channels that
    several layers read are eliminated in each on its own, in that layer's order.
    """
    runner = evidence.runs_graph()
    shares, todo = Shares(), [x for x in graph.layers if x.reads]
    for number, layer in enumerate(todo):
        runner.advance(layer.node)
        second = patch_moments(runner, evidence.model, layer)

        def eliminated(layer: Layer = layer, second: Tensor = second) -> np.ndarray:
            weight = read_projection(evidence.model, layer).weight
            order, rises = eliminate(second, weight, metric(layer, second, weight), layer.width)
            scores = np.zeros(layer.inputs)
            scores[order.cpu().numpy()] = np.maximum.accumulate(rises.cpu().numpy())
            return scores

        shares.add(layer.inputs, eliminated)
        evidence.progress((number + 1) / len(todo))
    scores: Scores = {g.name: np.zeros(g.size) for g in evidence.groups}
    for layer, found in zip(todo, shares.results(), strict=True):
        scores[layer.reads] += found
    return scores


def patch_moments(runner: GraphRunner, model: torch.nn.Module, layer: Layer) -> Tensor:
    """Return the mean over positions of h h^T (columns, columns) of what a layer reads."""
    module = model.get_submodule(layer.path)
    sums = MomentSums(layer.inputs * layer.width, 0, runner.device)
    for at, number in ordered(runner.numbers):
        (x,) = runner.values(at, [layer.source])
        h = patches(module, x, len(runner.feeds[at]), some_positions(layer.positions, number))
        sums.add(h, h[..., :0], h.new_ones(h.shape[:2]), number)
    total = sums.total()
    return total.hh / total.count
