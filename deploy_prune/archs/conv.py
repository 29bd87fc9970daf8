"""Convolutional networks: which channels can be cut together, found by tracing the model once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ..errors import UnsupportedModelError
from ..units import ChannelGroup, SlicePlan
from .dataflow import OUTPUT, Dataflow, Stream

TRACED_ROWS = 2  # of the batch that is traced; its axis stays free


@dataclass(frozen=True)
class Layer:
    """Describe a convolution or Linear; `reads` and `writes` name channel groups ("" = channels that all stay).

    `norm` is the batch norm that alone reads its output, and nothing else's. `source`, `node`, `output` and `partner`
    name nodes of the traced graph: its input, itself, its output behind the batch norm, and what is added to that.
    `shared` says that its weight is used again, so that it must stay as it is.
    """

    path: str
    inputs: int  # channels that each output reads: 1 of a depthwise convolution
    outputs: int
    positions: int  # at which it is evaluated, per sample
    spread: int  # input features per channel
    taps: int
    grouped: bool
    bias: bool
    norm: str
    reads: str
    writes: str
    source: str
    node: str
    output: str
    partner: str
    shared: bool = False

    @property
    def width(self) -> int:
        """Return the columns of the flattened weight per input channel."""
        return self.spread * self.taps


@dataclass(frozen=True)
class ChannelGraph:
    """Hold a traced model: its layers in the order they run, its groups, and why other channels must stay.

    `image` is the size (C, H, W) that it was traced at, `norms` maps each batch norm with weights to the group it lies
    in (""), `refused` the first producer of channels that cannot be cut to the reason. `other_flops` are those of one
    image outside the layers, whose channels all stay: attention, filters that are no parameters, second runs of one.
    """

    program: Any
    image: tuple[int, ...]
    layers: tuple[Layer, ...]
    groups: tuple[ChannelGroup, ...]
    norms: dict[str, str]
    refused: dict[str, str]
    other_flops: int = 0

    def layer(self, path: str) -> Layer:
        """Return a layer by its module's path."""
        return next(x for x in self.layers if x.path == path)

    def keeps(self, plan: SlicePlan) -> dict[str, tuple[int, ...]]:
        """Return the kept channels of every group, and of "" none."""
        return {g.name: plan[g.name].kept for g in self.groups}

    def staying(self) -> list[str]:
        """Say why channels stay whole: one example of every kind of reason, and how many more there are."""
        alike: dict[str, list[str]] = {}
        for name, why in self.refused.items():
            kind = " ".join(word for word in why.split() if "." not in word)  # without paths and numbers
            alike.setdefault(kind, []).append(f"{name}: {why}")
        ordered = sorted(alike.values(), key=len, reverse=True)
        return [x[0] + (f" (and {len(x) - 1} more)" if len(x) > 1 else "") for x in ordered if OUTPUT not in x[0]]


def export_program(model: nn.Module, images: Tensor) -> Any:
    """Return the model's functional ATen graph for inputs like `images` (B, C, H, W), the batch's size left free.

    Raises UnsupportedModelError, with torch's reason, when the model cannot be traced.
    """
    example = (images[:1].expand(TRACED_ROWS, *images.shape[1:]).contiguous(),)
    try:
        program = torch.export.export(model, example, dynamic_shapes=({0: torch.export.Dim.DYNAMIC},), strict=False)
        return program.run_decompositions({})
    except Exception as error:  # torch.export raises errors of many kinds
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise UnsupportedModelError(
            f"{type(model).__name__} cannot be traced by torch.export: {lines[0]}",
            hint="Its forward must take one batch of images, and must not branch on their values.",
        ) from error


def trace_channels(model: nn.Module, images: Tensor, *, residual: bool = False) -> ChannelGraph:
    """Find the channel groups of a model in evaluation mode from inputs like `images` (B, C, H, W).

    Channels that are added to each other (residual streams) form one group, offered with `residual` alone.
    Raises UnsupportedModelError when nothing can be cut, with the reason of every stream.
    """
    if model.training:
        raise UnsupportedModelError("The model is in training mode.", hint="Call model.eval() first.")
    program = export_program(model, images)
    flow = Dataflow(model, program, TRACED_ROWS)
    names: dict[int, str] = {}
    groups: list[ChannelGroup] = []
    refused: dict[str, str] = {}
    for root in sorted({flow.root(i) for i in range(len(flow.streams))}):
        stream = flow.streams[root]
        reason = _why_not(stream, residual)
        if reason:
            refused[stream.producers[0]] = reason
        else:
            names[root] = stream.producers[0]
            groups.append(_group(stream, len(groups)))
    if not groups:
        reasons = "; ".join(f"{name}: {why}" for name, why in refused.items()) or "no convolution was found"
        raise UnsupportedModelError(f"No channels of this {type(model).__name__} can be cut. {reasons}.")

    def name_of(stream: int | None) -> str:
        return "" if stream is None else names.get(flow.root(stream), "")

    layers = tuple(
        Layer(**{**vars(site), "reads": name_of(site.reads), "writes": name_of(site.writes)}) for site in flow.sites
    )
    affine = [path for path in flow.norms if model.get_submodule(path).weight is not None]
    norms = {path: name_of(flow.norms[path]) for path in affine}
    other = _other_flops(model, images[:1], layers)
    return ChannelGraph(program, tuple(images.shape[1:]), layers, _in_order(groups, layers), norms, refused, other)


def trace_sliced(graph: ChannelGraph, plan: SlicePlan, sliced: nn.Module, images: Tensor) -> ChannelGraph:
    """Return the graph of a sliced model in the dense one's groups, each of the channels that the plan keeps.

    Groups are not found anew: where one channel is left, a stream looks like a map that is spread over channels.
    A group that nothing makes or reads any more is gone.
    """
    program = export_program(sliced, images)
    sites = {site.path: site for site in Dataflow(sliced, program, TRACED_ROWS).sites}
    groups = []
    for g in graph.groups:
        made = tuple(path for path in g.producers if path in sites)
        read = tuple(reader for reader in g.readers if reader.path in sites)
        if made and read:
            groups.append(replace(g, size=plan[g.name].count, producers=made, readers=read))
    names = {"", *(g.name for g in groups)}
    layers = []
    for x in graph.layers:
        if x.path in sites:
            found = vars(sites[x.path])
            inputs = found["inputs"] * found["spread"] // x.spread
            same = {"spread": x.spread, "inputs": inputs, "grouped": x.grouped, "shared": x.shared}
            of = {"reads": x.reads if x.reads in names else "", "writes": x.writes if x.writes in names else ""}
            layers.append(Layer(**{**found, **same, **of}))
    return replace(graph, program=program, layers=tuple(layers), groups=tuple(groups))


def _other_flops(model: nn.Module, image: Tensor, layers: Sequence[Layer]) -> int:
    known = sum(2 * x.positions * x.width * x.inputs * x.outputs for x in layers)
    return count_products(lambda: model(image)) - known


def count_products(run: Callable[[], Any]) -> int:
    """Return the FLOPs (2 x MAC) of the matrix products and convolutions of what is run.

    Attention runs as plain products meanwhile: the counter sees neither fused kernels nor torch's fast path.
    """
    counter, fast = FlopCounterMode(display=False), torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
            run()
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return int(counter.get_total_flops())


def _why_not(stream: Stream, residual: bool) -> str:
    if stream.fixed:
        return stream.fixed
    if not stream.readers:
        return "no convolution or Linear reads them"
    if stream.coupled and not residual:
        return "they are a residual stream, which is cut on request only (--cut-residual, cut_residual=True)"
    return ""


def _group(stream: Stream, index: int) -> ChannelGroup:
    return ChannelGroup(
        name=stream.producers[0],
        kind="channel",
        layer=index,
        size=stream.size,
        width=1,
        producers=tuple(stream.producers),
        through=tuple(stream.through),
        readers=tuple(stream.readers),
        coupled=stream.coupled,
    )


def _in_order(groups: Sequence[ChannelGroup], layers: Sequence[Layer]) -> tuple[ChannelGroup, ...]:
    """Number the groups by the place of their first producer."""
    place = {layer.path: number for number, layer in enumerate(layers)}
    ordered = sorted(groups, key=lambda g: place[g.producers[0]])
    return tuple(replace(g, layer=number) for number, g in enumerate(ordered))
