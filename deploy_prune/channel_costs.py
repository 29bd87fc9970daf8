"""Costs of channels, in which a convolution counts the product of its inputs and outputs. No torch here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .costs import BYTES_PER_PARAM, Budget, Limit, ProductTable
from .errors import InputError
from .latency_table import ChannelLatency
from .units import ChannelGroup, SlicePlan

if TYPE_CHECKING:
    from .archs.conv import ChannelGraph


class _Sum:
    """Add up terms coefficient x (channels of some groups), fixed channels as numbers."""

    def __init__(self, sizes: Mapping[str, int]) -> None:
        self.sizes, self.base = sizes, 0.0
        self.single: dict[str, float] = {}
        self.double: dict[tuple[str, str], float] = {}

    def add(self, coefficient: float, *factors: tuple[str, int]) -> None:
        """Add coefficient x every factor, each a group's count or, where the group is "", the number given."""
        named = sorted(g for g, _ in factors if g)
        for g, n in factors:
            coefficient *= 1 if g else n
        if not named:
            self.base += coefficient
        elif len(named) == 1:
            self.single[named[0]] = self.single.get(named[0], 0.0) + coefficient
        else:
            pair = named[0], named[1]
            self.double[pair] = self.double.get(pair, 0.0) + coefficient

    def table(self, kind: str) -> ProductTable:
        return ProductTable(kind, self.sizes, self.base, self.single, self.double)


def channel_flops(graph: ChannelGraph) -> ProductTable:
    """Return the FLOPs (2 x MAC) of one image, all products of the model counted."""
    total = _Sum({g.name: g.size for g in graph.groups})
    total.base = graph.other_flops
    for x in graph.layers:
        total.add(2.0 * x.positions * x.width, (x.reads, x.inputs), (x.writes, x.outputs))
    return total.table("flops")


def channel_params(graph: ChannelGraph, model_params: int) -> ProductTable:
    """Return the parameters of the whole model; `model_params` counts the dense model's."""
    total = _Sum({g.name: g.size for g in graph.groups})
    for x in graph.layers:
        total.add(float(x.width), (x.reads, x.inputs), (x.writes, x.outputs))
        if x.bias:
            total.add(1.0, (x.writes, x.outputs))
    for group in graph.norms.values():
        if group:
            total.add(2.0, (group, 0))
    table = total.table("params")
    return ProductTable("params", table.sizes, table.base + model_params - table.dense, table.single, table.double)


def channel_latency(graph: ChannelGraph, measured: ChannelLatency, batch: int = 1) -> ProductTable:
    """Return the measured latency in ms; groups that were measured, but are not cut here, count whole.

    Raises InputError when the table is of another network, size of image or batch (1: of whichever was measured).
    """
    measured.check(graph.groups, graph.image, batch)
    total = _Sum({g.name: g.size for g in graph.groups})
    total.base = measured.base_ms

    def factor(name: str) -> tuple[str, int]:
        return (name, 0) if name in total.sizes else ("", measured.sizes[name])

    for name, ms in measured.single.items():
        total.add(ms, factor(name))
    for first, second, ms in measured.double:
        total.add(ms, factor(first), factor(second))
    return total.table("latency")


@dataclass(frozen=True)
class Work:
    """Hold what the layers of one class (alike in positions, taps and being depthwise) do: FLOPs, and elements
    that they read and write."""

    name: str
    flops: ProductTable
    elements: ProductTable


def work_classes(graph: ChannelGraph) -> tuple[list[Work], dict[str, str]]:
    """Return the classes of a network's layers, and the class of each group's first producer."""
    sizes = {g.name: g.size for g in graph.groups}
    sums: dict[str, tuple[_Sum, _Sum]] = {}
    classes = {x.path: f"{x.positions} positions, {x.taps} taps{', grouped' * x.grouped}" for x in graph.layers}
    for x in graph.layers:
        flops, elements = sums.setdefault(classes[x.path], (_Sum(sizes), _Sum(sizes)))
        flops.add(2.0 * x.positions * x.width, (x.reads, x.inputs), (x.writes, x.outputs))
        elements.add(float(x.positions * x.spread), (x.reads, x.inputs))
        elements.add(float(x.positions), (x.writes, x.outputs))
    found = [Work(name, a.table("flops"), b.table("elements")) for name, (a, b) in sums.items()]
    return found, {g.name: classes[g.producers[0]] for g in graph.groups}


def counts_of(groups: Sequence[ChannelGroup], plan: SlicePlan | None) -> dict[str, int]:
    """Return the kept channels of each group (all of them without a plan)."""
    return {g.name: plan[g.name].count if plan else g.size for g in groups}


def channel_limits(budget: Budget, graph: ChannelGraph, model_params: int, batch: int = 1) -> list[Limit]:
    """Return one limit per bound cost of the whole model, latency being that of a batch.

    Raises InputError for a latency budget without its table, or with one that was measured on something else.
    """
    only = budget.keep_params is None and budget.max_bytes is None and budget.keep_latency is None
    keep_flops = 0.5 if budget.keep_flops is None and only else budget.keep_flops
    params, found = channel_params(graph, model_params), []
    if keep_flops is not None:
        found.append(Limit.share(channel_flops(graph), keep_flops))
    if budget.keep_params is not None:
        found.append(Limit.share(params, budget.keep_params))
    if budget.max_bytes is not None:
        table = params.scaled("bytes", BYTES_PER_PARAM)
        found.append(Limit(table, budget.max_bytes, min(budget.max_bytes / table.dense, 1.0)))
    if budget.keep_latency is not None:
        if not isinstance(budget.lut, ChannelLatency):
            raise InputError("A latency budget needs this model's table.", hint="Make one: deploy-prune probe.")
        found.append(Limit.share(channel_latency(graph, budget.lut, batch), budget.keep_latency))
    return found
