"""Cut channels out for real: smaller convolutions, batch norms and Linears inside the model's own class."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .archs import of_transformers
from .archs.conv import ChannelGraph
from .channel_masking import mask_channels, write_projection
from .errors import InputError, UnsupportedModelError
from .masking import Updates
from .modeling_sliced import resize
from .units import ChannelGroup, MaskSet, SlicePlan

PROBE_TOLERANCE = 1e-4


def channel_spec(graph: ChannelGraph, plan: SlicePlan) -> dict[str, Any]:
    """Return what is needed to rebuild the sliced model from its class: the sizes of every module that was cut."""
    inputs: dict[str, int] = {}
    outputs: dict[str, int] = {}
    for g in graph.groups:
        count = plan[g.name].count
        if count == g.size:
            continue
        outputs |= dict.fromkeys((*g.producers, *g.through), count)
        inputs |= {reader.path: count * reader.spread for reader in g.readers}
    return {"plan_hash": plan.hash, "channels": {"inputs": inputs, "outputs": outputs}}


def slice_channels(model: nn.Module, graph: ChannelGraph, plan: SlicePlan, updates: Updates | None = None) -> nn.Module:
    """Return a smaller copy of the dense model, of the same class, equal to the masked one.

    Kept channels' scales are multiplied into the weights that read them; `updates` maps a layer's path to its
    refitted projection. Raises InputError where nothing is left of a layer whose class has a forward of its own.
    """
    _check_empty(model, graph, plan)
    sliced = copy.deepcopy(model)
    spec = channel_spec(graph, plan)
    resize(sliced, spec)
    sliced.load_state_dict(_sliced_state(model, graph, plan), strict=True)
    for path, new in (updates or {}).items():
        write_projection(sliced, graph.layer(path), new)
    if of_transformers(sliced):
        sliced.config.deploy_prune = spec  # type: ignore[union-attr]
    else:
        sliced.deploy_prune = spec  # type: ignore[assignment]
    return sliced.eval()


def _check_empty(model: nn.Module, graph: ChannelGraph, plan: SlicePlan) -> None:
    """A stand-in for an empty layer has to know the shape of its output, which an own forward may change."""
    for g in graph.groups:
        paths = () if plan[g.name].count else (*g.producers, *g.through, *(r.path for r in g.readers))
        for path in paths:
            module = model.get_submodule(path)
            plain = type(module).forward in (nn.Conv2d.forward, nn.Linear.forward)
            if not plain and isinstance(module, nn.Conv2d | nn.Linear):
                raise InputError(
                    f"No channel of {g.name} is kept, but {path} is a {type(module).__name__}, which cannot go.",
                    hint="Keep at least one: --min-neurons 1.",
                )


def _sliced_state(model: nn.Module, graph: ChannelGraph, plan: SlicePlan) -> dict[str, Tensor]:
    """Return the sliced model's state dict, cut from the dense one."""
    state = dict(model.state_dict())
    made = {path for g in graph.groups if not plan[g.name].count for path in (*g.producers, *g.through)}
    for g in graph.groups:
        part = plan[g.name]
        kept = torch.tensor(part.kept, dtype=torch.long)
        for path in (*g.producers, *g.through):
            for name in [n for n in state if n.rpartition(".")[0] == path]:
                if path in made:
                    del state[name]
                elif state[name].dim():  # num_batches_tracked stays
                    state[name] = state[name][kept.to(state[name].device)]
        scales = torch.tensor(part.scales, dtype=torch.float64)
        for reader in g.readers:
            name = f"{reader.path}.weight"
            if name not in state:
                continue  # it makes nothing either
            weight = state.pop(name)
            if not part.count:
                continue
            flat = weight.flatten(1)
            columns = torch.tensor(reader.columns(part.kept), dtype=torch.long, device=flat.device)
            new = flat[:, columns].double() * scales.to(flat.device).repeat_interleave(reader.width)
            state[name] = new.to(flat.dtype).reshape(len(weight), -1, *weight.shape[2:])
    return state


def prove(model: nn.Module, graph: ChannelGraph, images: Tensor) -> ChannelGraph:
    """Return the graph without the groups whose cut does not give what their masks give, tried on images (B, C, H, W).

    One channel of each group is cut and the model run: code that has a number of channels written into it shows here.
    Raises UnsupportedModelError when no group is left.
    """
    if _failure(model, graph, graph.groups, images) is None:
        return graph
    wrong = {g.name: why for g in graph.groups if (why := _failure(model, graph, (g,), images)) is not None}
    left = tuple(g for g in graph.groups if g.name not in wrong)
    refused = graph.refused | {name: f"cutting one of them does not work: {why}" for name, why in wrong.items()}
    if not left or not wrong:
        reasons = "; ".join(f"{name}: {why}" for name, why in refused.items())
        raise UnsupportedModelError(f"No channels of this {type(model).__name__} can be cut. {reasons}.")
    return without(graph, set(wrong), refused)


def without(graph: ChannelGraph, names: set[str], refused: dict[str, str]) -> ChannelGraph:
    """Return the graph with some groups given up."""

    def kept(name: str) -> str:
        return "" if name in names else name

    return replace(
        graph,
        groups=tuple(g for g in graph.groups if g.name not in names),
        layers=tuple(replace(x, reads=kept(x.reads), writes=kept(x.writes)) for x in graph.layers),
        norms={path: kept(name) for path, name in graph.norms.items()},
        refused=refused,
    )


@torch.no_grad()
def _failure(model: nn.Module, graph: ChannelGraph, groups: tuple[ChannelGroup, ...], images: Tensor) -> str | None:
    masks = MaskSet.ones(graph.groups)
    for g in groups:
        masks[g.name][-1] = 0 if g.size > 1 else 1
    plan = SlicePlan.from_masks(graph.groups, masks)
    try:
        found = logits(slice_channels(model, graph, plan)(images))
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        return (str(error).strip().splitlines() or [type(error).__name__])[0]
    expected = logits(mask_channels(model, graph, plan)(images))
    if found.shape != expected.shape:
        return f"the output's shape becomes {tuple(found.shape)}"
    worst = float((found - expected).abs().max())
    return (
        None
        if worst <= PROBE_TOLERANCE * max(1.0, float(expected.abs().max()))
        else f"the output is off by {worst:.1e}"
    )


def logits(outputs: Any) -> Tensor:
    """Return a classifier's logits, whether it gives them alone or in transformers' output."""
    return outputs if isinstance(outputs, Tensor) else outputs.logits
