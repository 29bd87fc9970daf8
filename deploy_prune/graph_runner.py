"""Run a traced model node by node over many batches, keeping what is still needed at one place of the graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.fx.node import map_arg

Values = dict[Node, Any]

DEFAULT_CACHE_BYTES = 16_000_000_000


class GraphRunner:
    """Hold every batch's live values before node number `at`; beyond `most_bytes` they are computed anew.

    The nodes read the live model's parameters, so that weights changed in place are seen from there on. `numbers` are
    those of the batches among all processes' (default: 0, 1, ...).
    """

    def __init__(
        self,
        model: nn.Module,
        program: Any,
        feeds: Sequence[Tensor],
        most_bytes: int = DEFAULT_CACHE_BYTES,
        numbers: Sequence[int] | None = None,
    ) -> None:
        self.feeds, self.most_bytes = feeds, most_bytes
        self.numbers = range(len(feeds)) if numbers is None else numbers
        self.device = next(model.parameters()).device
        self.nodes: list[Node] = list(program.graph.nodes)
        self.place = {node.name: number for number, node in enumerate(self.nodes)}
        self.last_use = {node: max((self.place[u.name] for u in node.users), default=-1) for node in self.nodes}
        self.fixed, self.inputs = _bind(model, program)
        self.at = 0
        self.states: list[Values | None] = [None] * len(feeds)
        self.kept_bytes = 0

    @torch.no_grad()
    def values(self, number: int, names: Sequence[str]) -> list[Tensor]:
        """Return the values of some nodes for a batch, computed from where the runner stands."""
        stop = 1 + max(self.place[name] for name in names)
        found = self._run(number, stop, {self.nodes[self.place[name]] for name in names})
        return [found[self.nodes[self.place[name]]] for name in names]

    @torch.no_grad()
    def advance(self, name: str) -> None:
        """Go on to the place before a node, with all batches."""
        stop = self.place[name]
        if stop <= self.at:
            return
        fresh: list[Values | None] = []
        total = 0
        for number in range(len(self.feeds)):
            if self.states[number] is None and self.at:
                fresh.append(None)  # there was no room for it
                continue
            values = self._run(number, stop, set())
            size = sum(v.numel() * v.element_size() for v in values.values() if isinstance(v, Tensor))
            fits = total + size <= self.most_bytes
            total += size if fits else 0
            fresh.append(values if fits else None)
            self.states[number] = None
        self.states, self.at, self.kept_bytes = fresh, stop, max(self.kept_bytes, total)

    def _run(self, number: int, stop: int, wanted: set[Node]) -> Values:
        """Return what is still needed behind the nodes up to `stop`, and what is wanted."""
        state = self.states[number]
        values = dict(state) if state is not None else dict.fromkeys(self.inputs, self.feeds[number].to(self.device))
        start = self.at if state is not None else 0
        for place in range(start, stop):
            node = self.nodes[place]
            if node.op != "call_function":
                continue

            def load(n: Node) -> Any:
                return values[n] if n in values else self.fixed[n]

            args, kwargs = map_arg(node.args, load), map_arg(node.kwargs, load)
            values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
            for used in (*node.all_input_nodes, node):
                if self.last_use[used] <= place and used not in wanted:
                    values.pop(used, None)
        return values


def _bind(model: nn.Module, program: Any) -> tuple[Values, list[Node]]:
    """Return the tensors that the graph's placeholders stand for, and the nodes of its real inputs."""
    signature = program.graph_signature
    owned = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    constants = getattr(signature, "inputs_to_lifted_tensor_constants", {})
    tensors: dict[str, Tensor] = {  # one under two names may go by either
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    fixed: Values = {}
    inputs = []
    for node in program.graph.nodes:
        if node.op != "placeholder":
            continue
        if node.name in owned:
            fixed[node] = tensors[owned[node.name]]
        elif node.name in constants:
            fixed[node] = program.constants[constants[node.name]]
        else:
            inputs.append(node)
    return fixed, inputs
