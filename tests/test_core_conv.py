"""Channels as units: masked == sliced, exact costs, refusals, save and reload."""

from __future__ import annotations

import pytest
import torch
from conv_tiny import FAMILIES, tiny_cnn, tiny_images
from models_tiny import random_masks
from torch import nn

from deploy_prune.archs.conv import ChannelGraph, trace_channels
from deploy_prune.channel_costs import channel_flops, channel_params, counts_of
from deploy_prune.channel_masking import mask_channels
from deploy_prune.channel_slicing import prove, slice_channels
from deploy_prune.masking import OutputWeights
from deploy_prune.runtime_bench.flops import count_torch
from deploy_prune.units import MaskSet, SlicePlan


def traced(family: str, seed: int = 0, residual: bool = True) -> tuple[nn.Module, ChannelGraph]:
    model = tiny_cnn(family, seed)
    return model, trace_channels(model, tiny_images(family), residual=residual)


def ragged(graph: ChannelGraph, seed: int, scales: bool = True) -> SlicePlan:
    masks = random_masks(graph.groups, seed, scales=scales)
    for g in graph.groups:
        if g.coupled and not masks[g.name].any():
            masks[g.name][0] = 1.0
    return SlicePlan.from_masks(graph.groups, masks)


def flops_of(model: nn.Module, family: str) -> int:
    return count_torch(model, {next(iter(_arguments(model))): tiny_images(family, 1)})


def _arguments(model: nn.Module) -> list[str]:
    return ["input"] if isinstance(model, nn.Sequential) else ["x"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("seed", range(6))
def test_sliced_equals_masked(family: str, seed: int) -> None:
    model, graph = traced(family, seed)
    plan = ragged(graph, seed)
    x = tiny_images(family, seed=seed)
    with torch.inference_mode():
        dense, virtual = model(x), mask_channels(model, graph, plan)(x)
        sliced_model = slice_channels(model, graph, plan)
        sliced = sliced_model(x)
    assert type(sliced_model) is type(model)
    assert (sliced - virtual).abs().max() <= 1e-5 * max(1.0, float(virtual.abs().max()))
    assert (dense - virtual).abs().max() > 1e-4, "the masks changed nothing"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("seed", range(6))
def test_costs_are_those_of_the_sliced_model(family: str, seed: int) -> None:
    model, graph = traced(family, seed)
    plan = ragged(graph, seed)
    sliced = slice_channels(model, graph, plan)
    params = sum(p.numel() for p in model.parameters())
    flops, sizes = channel_flops(graph), channel_params(graph, params)
    assert (flops.dense, sizes.dense) == (flops_of(model, family), params)
    counts = counts_of(graph.groups, plan)
    assert flops.cost(counts) == flops_of(sliced, family)
    assert sizes.cost(counts) == sum(p.numel() for p in sliced.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_refitted_sliced_equals_masked(family: str) -> None:
    model, graph = traced(family)
    plan = ragged(graph, 1, scales=False)
    keeps, generator = graph.keeps(plan), torch.Generator().manual_seed(0)
    updates = {}
    for layer in graph.layers:
        if layer.reads and keeps.get(layer.writes) != () and (layer.norm or layer.bias):
            rows = len(keeps.get(layer.writes, range(layer.outputs)))
            columns = len(keeps[layer.reads]) * layer.width
            updates[layer.path] = OutputWeights(
                torch.randn(rows, columns, generator=generator) / 6, torch.randn(rows, generator=generator)
            )
    x = tiny_images(family)
    with torch.inference_mode():
        virtual = mask_channels(model, graph, plan, updates)(x)
        sliced = slice_channels(model, graph, plan, updates)(x)
    assert (virtual - sliced).abs().max() <= 1e-5 * max(1.0, float(virtual.abs().max()))


@pytest.mark.parametrize("family", FAMILIES)
def test_whole_plan_changes_nothing(family: str) -> None:
    model, graph = traced(family)
    whole = slice_channels(model, graph, SlicePlan.from_masks(graph.groups, MaskSet.ones(graph.groups)))
    x = tiny_images(family)
    with torch.inference_mode():
        assert torch.equal(whole(x), model(x))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_group_of_these_is_proved(family: str) -> None:
    model, graph = traced(family)
    assert prove(model, graph, tiny_images(family)) is graph
