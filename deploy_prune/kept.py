"""How the results of a run's stages are laid out where `Resume` keeps them: tensors by name, and plain values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .calibration import CalibrationStats
from .compensate.layers import GroupLog, SweepResult
from .criteria.base import Scores
from .masking import OutputWeights
from .resume import Kept
from .search import Search
from .tasks.base import RowOutput
from .units import MaskSet

_FIELDS = ("gradients", "saliency", "activation_squares", "gradient_moments")


def pack_stats(stats: CalibrationStats) -> Kept:
    """Return calibration's statistics as tensors by name, and plain values."""
    tensors = {f"{field}/{name}": t for field in _FIELDS for name, t in getattr(stats, field).items()}
    tensors |= {"tokens": stats.tokens, "mean_loss": stats.mean_loss}
    return tensors, {n: getattr(stats, n) for n in ("mean_length", "sample_hash", "label_free")}


def unpack_stats(kept: Kept, device: torch.device) -> CalibrationStats:
    """Return calibration's statistics on a device."""
    tensors = {name: t.to(device) for name, t in kept[0].items()}
    parts: dict[str, Any] = {field: {} for field in _FIELDS}
    for name, tensor in tensors.items():
        field, slash, group = name.partition("/")
        if slash:
            parts[field][group] = tensor
    return CalibrationStats(**parts, tokens=tensors["tokens"], mean_loss=tensors["mean_loss"], **kept[1])


def pack_scores(scores: Scores) -> Kept:
    """Return scores as tensors by group."""
    return {name: torch.from_numpy(array) for name, array in scores.items()}, {}


def unpack_scores(kept: Kept) -> Scores:
    """Return scores by group."""
    return {name: tensor.numpy() for name, tensor in kept[0].items()}


def pack_step(found: tuple[Scores, float]) -> Kept:
    """Return a step's scores as tensors by group, and the mean loss."""
    return pack_scores(found[0])[0], {"mean_loss": found[1]}


def unpack_step(kept: Kept) -> tuple[Scores, float]:
    """Return a step's scores and the mean loss."""
    return unpack_scores(kept), kept[1]["mean_loss"]


def pack_sweep(swept: SweepResult) -> Kept:
    """Return a sweep's projections and scales as tensors by name, and its log."""
    tensors = {f"{part}/{name}": getattr(u, part) for name, u in swept.updates.items() for part in ("weight", "bias")}
    tensors |= {f"scales/{name}": t for name, t in swept.scales.items()}
    return tensors, {"log": [vars(entry) for entry in swept.log], "state_bytes": swept.state_bytes}


def unpack_sweep(kept: Kept, device: torch.device) -> SweepResult:
    """Return a sweep's result on a device."""
    tensors, values = kept
    by_part: dict[str, dict[str, Tensor]] = {"weight": {}, "bias": {}, "scales": {}}
    for name, tensor in tensors.items():
        part, _, group = name.partition("/")
        by_part[part][group] = tensor.to(device)
    updates = {name: OutputWeights(w, by_part["bias"][name]) for name, w in by_part["weight"].items()}
    log = [GroupLog(**entry) for entry in values["log"]]
    return SweepResult(updates, by_part["scales"], log, values["state_bytes"])


def pack_masks(masks: MaskSet) -> dict[str, Tensor]:
    """Return masks as tensors by group."""
    return {name: torch.from_numpy(mask) for name, mask in masks.items()}


def unpack_masks(tensors: Mapping[str, Tensor]) -> MaskSet:
    """Return masks."""
    return MaskSet({name: mask.numpy() for name, mask in tensors.items()})


def pack_rearranged(found: tuple[MaskSet, dict[str, tuple[float, float]]]) -> Kept:
    """Return rearranged masks as tensors by group, and the objectives before and after."""
    return pack_masks(found[0]), {"objectives": found[1]}


def unpack_rearranged(kept: Kept) -> tuple[MaskSet, dict[str, tuple[float, float]]]:
    """Return rearranged masks, and the objectives before and after."""
    return unpack_masks(kept[0]), {name: (o[0], o[1]) for name, o in kept[1]["objectives"].items()}


def pack_search(found: Search) -> Kept:
    """Return the masks that a search chose as tensors by group, and what it says of them."""
    return pack_masks(found.masks), {"solver": found.solver, "gap": found.gap, "costs": found.costs}


def unpack_search(kept: Kept) -> Search:
    """Return a search's result."""
    return Search(unpack_masks(kept[0]), **kept[1])


def pack_outputs(outputs: Sequence[RowOutput]) -> Kept:
    """Return the rows' outputs end to end (elements,) by name, and their shapes (rows, axes)."""
    tensors = {}
    for name in outputs[0]:
        arrays = [row[name] for row in outputs]
        tensors[f"values/{name}"] = torch.from_numpy(np.concatenate([a.reshape(-1) for a in arrays]))
        tensors[f"shapes/{name}"] = torch.tensor([a.shape for a in arrays], dtype=torch.int64)
    return tensors, {}


def unpack_outputs(kept: Kept) -> list[RowOutput]:
    """Return every row's outputs by name."""
    rows: list[RowOutput] = []
    for key, shapes in kept[0].items():
        part, _, name = key.partition("/")
        if part == "shapes":
            ends = shapes.prod(1).cumsum(0)[:-1].tolist()
            arrays = np.split(kept[0][f"values/{name}"].numpy(), ends)
            rows = rows or [{} for _ in arrays]
            for row, array, shape in zip(rows, arrays, shapes.tolist(), strict=True):
                row[name] = array.reshape(shape)
    return rows
