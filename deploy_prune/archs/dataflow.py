"""Follow channels through an exported graph: who makes them, what they pass, who reads them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.fx import Node

from ..units import Reader

LINEAR = (nn.Linear, nn.Conv2d)
OUTPUT = "its channels are the model's output"


@dataclass(frozen=True)
class Layout:
    """Say where a tensor holds a stream's channels: along `axis`, `spread` consecutive features each."""

    stream: int
    axis: int
    spread: int = 1


@dataclass
class Stream:
    """Gather what touches the same channels; `fixed` says why they cannot be cut ("" = they can)."""

    size: int
    producers: list[str] = field(default_factory=list)
    through: list[str] = field(default_factory=list)
    readers: list[Reader] = field(default_factory=list)
    coupled: bool = False
    fixed: str = ""


@dataclass
class Site:
    """Describe one run of a convolution or Linear: the streams it reads and writes (None = not tracked).

    `norm` is the batch norm that alone reads its output, and nothing else's. `source`, `node`, `output` and `partner`
    name nodes: its input, itself, its output behind the batch norm, and what is added to that. `shared` says that its
    weight is used again.
    """

    path: str
    node: str
    source: str
    output: str
    inputs: int  # channels that each output reads: 1 of a depthwise convolution
    outputs: int
    positions: int  # at which it is evaluated, per sample
    spread: int = 1
    taps: int = 1
    grouped: bool = False
    bias: bool = False
    norm: str = ""
    partner: str = ""
    shared: bool = False
    reads: int | None = None
    writes: int | None = None

    @property
    def width(self) -> int:
        """Return the columns of the flattened weight per input channel."""
        return self.spread * self.taps


class Dataflow:
    """Walk a functional ATen graph once, from inputs to outputs."""

    def __init__(self, model: nn.Module, program: Any, rows: int) -> None:
        self.model, self.program, self.rows = model, program, rows  # of the batch that was traced
        signature = program.graph_signature
        self.names: dict[str, str] = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        self.paths = {id(module): path for path, module in model.named_modules()}
        self.streams: list[Stream] = []
        self.parents: list[int] = []
        self.sites: list[Site] = []
        self.norms: dict[str, int | None] = {}
        self.layouts: dict[Node, Layout] = {}
        self.seen: dict[int, str] = {}
        for node in program.graph.nodes:
            self._visit(node)

    def root(self, stream: int) -> int:
        """Return the representative of the streams that were joined with this one."""
        while self.parents[stream] != stream:
            stream = self.parents[stream]
        return stream

    def _visit(self, node: Node) -> None:
        if node.op == "output":
            for source in node.all_input_nodes:
                self._fix(source, OUTPUT)
        elif node.op == "call_function":
            name = operator_name(node)
            if name in _RULES:
                _RULES[name](self, node)
            elif name in _ELEMENTWISE:
                self._elementwise(node, name)
            elif name in _SPATIAL:
                self._spatial(node)
            else:
                self._unknown(node, name)

    def _new(self, size: int, producer: str) -> int:
        self.streams.append(Stream(size, [producer]))
        self.parents.append(len(self.parents))
        return len(self.parents) - 1

    def _layout(self, value: Any) -> Layout | None:
        return self.layouts.get(value) if isinstance(value, Node) else None

    def _stream(self, layout: Layout) -> Stream:
        return self.streams[self.root(layout.stream)]

    def _fix(self, value: Any, reason: str) -> None:
        layout = self._layout(value)
        self._fix_stream(None if layout is None else layout.stream, reason)

    def _fix_stream(self, stream: int | None, reason: str) -> None:
        if stream is not None:
            root = self.streams[self.root(stream)]
            root.fixed = root.fixed or reason

    def _unknown(self, node: Node, name: str) -> None:
        for source in node.all_input_nodes:
            self._fix(source, f"they pass through {name}, which may mix channels")

    def _module(self, value: Any, kinds: tuple[type, ...]) -> str | None:
        """Return the path (the first, of several) of the module that owns a weight, or None for anything else."""
        owner = self.names.get(value.name, "").rpartition(".")[0] if isinstance(value, Node) else ""
        module = self.model.get_submodule(owner) if owner else None
        return self.paths[id(module)] if isinstance(module, kinds) else None

    def _used_before(self, path: str) -> bool:
        """Say whether a module's weight was used before, under whatever name."""
        weight = id(self.model.get_submodule(path).weight)
        used = self.seen.setdefault(weight, path)
        return used != path or any(s.path == path for s in self.sites)

    def _conv(self, node: Node) -> None:
        x, weight = node.args[:2]
        path = self._module(weight, LINEAR)
        if path is None:
            self._unknown(node, "a convolution whose weight is computed")
            return
        module: Any = self.model.get_submodule(path)
        assert isinstance(x, Node)
        if self._used_before(path):
            self._share(path, x)
            return
        layout, linear = self._layout(x), isinstance(module, nn.Linear)
        inputs, outputs = (
            (module.in_features, module.out_features) if linear else (module.in_channels, module.out_channels)
        )
        groups = 1 if linear else module.groups
        taps = 1 if linear else math.prod(module.kernel_size)
        shape = sizes(node)
        axis = len(shape) - 1 if linear else len(shape) - 1 - (len(module.kernel_size))
        spread = layout.spread if layout else 1
        site = Site(
            path, node.name, x.name, node.name, inputs // groups // spread, outputs,
            math.prod(shape) // outputs // self.rows,  # some models fold positions into the batch's axis
            spread, taps, grouped=groups > 1, bias=module.bias is not None,
        )  # fmt: skip
        _look_behind(site, node, self)
        self.sites.append(site)
        if layout is not None and (layout.axis != axis or (spread > 1 and not linear)):
            self._fix(x, f"{path} reads them along another axis")
            layout = None
        if groups > 1:
            if layout is not None and groups == inputs == outputs:
                self._stream(layout).through.append(path)
                site.writes = layout.stream
                self.layouts[node] = layout
                return
            kind = "depthwise with a multiplier" if groups == inputs and layout is not None else "grouped"
            self._fix(x, f"{path} is a {kind} convolution")
        elif layout is not None:
            self._stream(layout).readers.append(Reader(path, spread, taps))
            site.reads = layout.stream
        site.writes = self._new(outputs, path)
        self.layouts[node] = Layout(site.writes, axis)
        if groups > 1:
            self._fix(node, f"{path} is a grouped convolution")

    def _share(self, path: str, x: Node) -> None:
        reason = f"the weight of {path} is used more than once"
        self._fix(x, reason)
        for site in self.sites:
            if site.path == path or self.model.get_submodule(site.path).weight is self.model.get_submodule(path).weight:
                site.shared = True
                for stream in (site.reads, site.writes):
                    self._fix_stream(stream, reason)

    def _batch_norm(self, node: Node) -> None:
        x = node.args[0]
        layout = self._layout(x)
        kinds = (nn.modules.batchnorm._BatchNorm,)
        path = self._module(node.args[3], kinds) or self._module(node.args[1], kinds)
        if path in self.norms:  # a second use: it is no part of either convolution
            self._fix_stream(self.norms[path], f"the batch norm {path} is used more than once")
            for site in self.sites:
                if site.norm == path:
                    site.norm, site.output, site.partner = "", site.node, ""
        if path is None or path in self.norms or (layout and (layout.spread > 1 or layout.axis != 1)):
            self._unknown(node, "a batch norm that is shared, or reads a flattened map")
            return
        self.norms[path] = layout.stream if layout else None
        if layout is not None:
            self._stream(layout).through.append(path)
            self.layouts[node] = layout

    def _item(self, node: Node) -> None:
        layout = self._layout(node.args[0])
        if layout is not None and node.args[1] == 0:
            self.layouts[node] = layout

    def _elementwise(self, node: Node, name: str) -> None:
        found = [(n, self.layouts[n]) for n in node.all_input_nodes if n in self.layouts]
        rank = len(sizes(node))
        wide = [(n, x) for n, x in found if sizes(n)[x.axis] > 1 or len(found) == 1]
        if not wide:
            self._unknown(node, name)
            return
        first, layout = wide[0]
        out = Layout(layout.stream, layout.axis + rank - len(sizes(first)), layout.spread)
        for other in node.all_input_nodes:
            known, shape = self.layouts.get(other), sizes(other)
            at = out.axis - rank + len(shape)  # the channels' axis in this operand
            if other is first or not shape or at < 0 or (shape[at] == 1 and sizes(node)[out.axis] > 1):
                if known is not None and other is not first:
                    self._fix(other, f"they are spread over other channels by {name}")
                continue
            if known is None or known.axis != at or known.spread != out.spread:
                reason = f"{name} combines them with values that are not cut alike"
                self._fix(other, reason)
                self._fix(first, reason)
                continue
            self._join(out.stream, known.stream, coupled=name in _ADDING)
        self.layouts[node] = out

    def _join(self, one: int, other: int, coupled: bool) -> None:
        one, other = self.root(one), self.root(other)
        if one == other:
            return
        a, b = self.streams[one], self.streams[other]
        self.parents[other] = one
        self.streams[one] = Stream(
            a.size,
            a.producers + b.producers,
            a.through + b.through,
            a.readers + b.readers,
            a.coupled or b.coupled or coupled,
            a.fixed or b.fixed,
        )

    def _spatial(self, node: Node) -> None:
        x = node.args[0]
        layout = self._layout(x)
        if layout is None:
            return
        same = len(sizes(node)) == len(sizes(x)) and sizes(node)[: layout.axis + 1] == sizes(x)[: layout.axis + 1]
        if same and layout.axis == 1:
            self.layouts[node] = layout
        else:
            self._unknown(node, operator_name(node))

    def _reduce(self, node: Node) -> None:
        x = node.args[0]
        layout = self._layout(x)
        if layout is None:
            return
        rank = len(sizes(x))
        given: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
        axes: set[int] = {a % rank for a in ([given] if isinstance(given, int) else given or range(rank))}
        if layout.axis in axes:
            self._unknown(node, operator_name(node))
            return
        kept = len(sizes(node)) == rank
        axis = layout.axis if kept else layout.axis - sum(a < layout.axis for a in axes)
        self.layouts[node] = Layout(layout.stream, axis, layout.spread)

    def _reshape(self, node: Node) -> None:
        """Follow channels into a reshaped tensor, where what is flattened with them lies behind them."""
        x = node.args[0]
        layout = self._layout(x)
        if layout is None:
            return
        before, after = sizes(x), sizes(node)
        ahead = math.prod(before[: layout.axis])
        for axis, size in enumerate(after):
            if math.prod(after[:axis]) == ahead and size % before[layout.axis] == 0:
                self.layouts[node] = Layout(layout.stream, axis, layout.spread * size // before[layout.axis])
                return
        self._unknown(node, "a reshaping")

    def _permute(self, node: Node) -> None:
        x = node.args[0]
        layout = self._layout(x)
        if layout is None:
            return
        rank = len(sizes(x))
        order = list(range(rank))
        if operator_name(node) == "permute":
            axes: Any = node.args[1]
            order = [a % rank for a in axes]
        elif operator_name(node) == "transpose":
            a, b = (int(v) % rank for v in node.args[1:3])  # type: ignore[arg-type]
            order[a], order[b] = order[b], order[a]
        else:
            order = order[::-1]
        self.layouts[node] = Layout(layout.stream, order.index(layout.axis), layout.spread)

    def _part(self, node: Node) -> None:
        """Follow channels into a slice or a padded tensor that leaves their axis alone."""
        x = node.args[0]
        layout = self._layout(x)
        if layout is None:
            return
        if len(sizes(x)) == len(sizes(node)) and sizes(x)[layout.axis] == sizes(node)[layout.axis]:
            self.layouts[node] = layout
        else:
            self._unknown(node, operator_name(node))

    def _concatenate(self, node: Node) -> None:
        for source in node.all_input_nodes:
            self._fix(source, "they are concatenated or split")


def operator_name(node: Node) -> str:
    """Return an operator's bare name: relu for aten.relu_.default, getitem for Python's."""
    schema = getattr(node.target, "_schema", None)
    name = str(schema.name).rpartition("::")[2] if schema else getattr(node.target, "__name__", str(node.target))
    return name[:-1] if name.endswith("_") and not name.endswith("__") else name


def sizes(value: Any) -> tuple[int, ...]:
    """Return a node's shape, free axes at the size they were traced with; () for what is no tensor."""
    found = value.meta.get("val")
    found = found[0] if isinstance(found, tuple | list) else found
    if not isinstance(found, torch.Tensor):
        return ()
    return tuple(int(s) if isinstance(s, int) else int(s.node.hint) for s in found.shape)


def _look_behind(site: Site, node: Node, flow: Dataflow) -> None:
    """Find the batch norm and the addition that alone read a site's output."""

    def only_user(n: Node) -> Node | None:
        return next(iter(n.users)) if len(n.users) == 1 else None

    user, end = only_user(node), node
    if user is not None and operator_name(user) in _NORMS and user.args[0] is node:
        path = flow._module(user.args[3], (nn.modules.batchnorm._BatchNorm,))
        if path is not None:
            site.norm = path
            end = user
            item = only_user(user)
            if item is not None and operator_name(item) == "getitem":
                end = item
    user = only_user(end)
    if user is not None and operator_name(user) == "add" and not user.kwargs:
        others = [n for n in user.all_input_nodes if n is not end]
        if len(others) == 1 and sizes(others[0]) == sizes(end):
            site.partner = others[0].name
    site.output = end.name


_NORMS = ("batch_norm", "_native_batch_norm_legit_no_training")
_ADDING = ("add", "sub")
_ELEMENTWISE = {
    *("relu", "relu6", "leaky_relu", "elu", "selu", "celu", "silu", "gelu", "mish", "softplus", "hardtanh"),
    *("hardswish", "hardsigmoid", "sigmoid", "tanh", "clamp", "clamp_min", "abs", "neg", "exp", "sqrt", "square"),
    *("clone", "contiguous", "alias", "detach", "dropout", "feature_dropout", "to", "_to_copy", "lift_fresh_copy"),
    *("add", "sub", "mul", "div", "maximum", "minimum"),
}  # fmt: skip
_SPATIAL = {
    *("max_pool2d", "max_pool2d_with_indices", "avg_pool2d", "adaptive_avg_pool2d", "_adaptive_avg_pool2d"),
    *("adaptive_max_pool2d", "upsample_nearest2d"),
    *("upsample_bilinear2d",),
}
_RULES: Mapping[str, Callable[[Dataflow, Node], None]] = {
    **dict.fromkeys(("conv2d", "convolution", "linear"), Dataflow._conv),
    **dict.fromkeys(_NORMS, Dataflow._batch_norm),
    **dict.fromkeys(("mean", "sum", "amax"), Dataflow._reduce),
    **dict.fromkeys(("view", "reshape", "_unsafe_view", "flatten", "squeeze", "unsqueeze"), Dataflow._reshape),
    **dict.fromkeys(("permute", "transpose", "t"), Dataflow._permute),
    **dict.fromkeys(("slice", "pad", "constant_pad_nd"), Dataflow._part),
    **dict.fromkeys(("cat", "split", "split_with_sizes", "chunk"), Dataflow._concatenate),
    "getitem": Dataflow._item,
    **dict.fromkeys(("sym_size", "_assert_tensor_metadata", "_assert_scalar"), lambda flow, node: None),
}
