"""Torch-Pruning's importances at a given number of FLOPs, as its users run them without retraining."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deploy_prune.archs.conv import ChannelGraph

BISECTIONS = 9
MOST_CUT = 15 / 16  # of a group, as this package keeps at least a sixteenth


def importances() -> dict[str, Callable[[], Any]]:
    """Map names to Torch-Pruning's importances."""
    import torch_pruning as tp

    return {
        "L1": lambda: tp.importance.GroupMagnitudeImportance(p=1),
        "L2": lambda: tp.importance.GroupMagnitudeImportance(p=2),
        "BN scale": tp.importance.BNScaleImportance,
        "LAMP": tp.importance.LAMPImportance,
        "FPGM": tp.importance.FPGMImportance,
        "Taylor": tp.importance.GroupTaylorImportance,
        "Hessian": tp.importance.GroupHessianImportance,
    }


def rivals(
    model: nn.Module,
    graph: ChannelGraph,
    images: Tensor,
    labels: Tensor,
    most_flops: float,
    count: Callable[[nn.Module], int],
) -> Iterator[tuple[str, nn.Module]]:
    """Yield a name and a model cut to at most `most_flops` for every importance, ranking and choice of groups.

    "inner" cuts the groups that `graph` has, "all" every group that Torch-Pruning finds, residual streams too. Taylor
    and Hessian see the given images (B, C, H, W) and labels; Hessian the squared gradients of their first 256, one by
    one (`accumulate_grad` of 1.6.1, called for each image, would keep those of the last one alone).
    """
    inner = {p for g in graph.groups for p in g.producers}
    head = graph.layers[-1].path
    for name, make in importances().items():
        grads = _gradients(copy.deepcopy(model), make(), images, labels)
        for groups in ("inner", "all"):
            kept = [x.path for x in graph.layers if x.path == head or (groups == "inner" and x.path not in inner)]
            for ranking in ("global", "local"):
                cut = _cut_to(model, make, grads, images[:2], kept, ranking == "global", most_flops, count)
                if cut is not None:
                    yield f"Torch-Pruning {name}, {groups}, {ranking}", cut


def _gradients(model: nn.Module, importance: Any, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Return the gradients that an importance reads, which do not depend on how much is cut."""
    import torch_pruning as tp

    if isinstance(importance, tp.importance.GroupHessianImportance):
        squares: dict[str, Tensor] = {}
        for x, y in zip(images[:256].split(1), labels[:256].split(1), strict=True):
            model.zero_grad()
            F.cross_entropy(model(x), y).backward()
            for path, p in model.named_parameters():
                if p.grad is not None:
                    squares[path] = squares.get(path, torch.zeros_like(p)) + p.grad.square()
        return {path: square.sqrt() for path, square in squares.items()}
    if isinstance(importance, tp.importance.GroupTaylorImportance):
        for x, y in zip(images.split(128), labels.split(128), strict=True):
            F.cross_entropy(model(x), y, reduction="sum").backward()
        return {path: p.grad for path, p in model.named_parameters() if p.grad is not None}
    return {}


def _cut_to(
    model: nn.Module,
    make: Callable[[], Any],
    grads: Mapping[str, Tensor],
    example: Tensor,
    kept: Sequence[str],
    overall: bool,
    most_flops: float,
    count: Callable[[nn.Module], int],
) -> nn.Module | None:
    """Bisect the ratio; return the largest model that fits, or None when none does."""
    low, high, found = 0.0, MOST_CUT, None
    for _ in range(BISECTIONS):
        ratio = (low + high) / 2
        cut = _cut(copy.deepcopy(model), make(), grads, example, kept, overall, ratio)
        if count(cut) <= most_flops:
            high, found = ratio, cut
        else:
            low = ratio
    return found


def _cut(
    model: Any,
    importance: Any,
    grads: Mapping[str, Tensor],
    example: Tensor,
    kept: Sequence[str],
    overall: bool,
    ratio: float,
) -> nn.Module:
    import torch_pruning as tp

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pruner = tp.pruner.BasePruner(
            model,
            example,
            importance=importance,
            global_pruning=overall,
            pruning_ratio=ratio,
            max_pruning_ratio=MOST_CUT,
            ignored_layers=[model.get_submodule(path) for path in kept],
        )
        for path, p in model.named_parameters():
            p.grad = grads[path].clone() if path in grads else None
        if isinstance(importance, tp.importance.GroupHessianImportance):
            importance.zero_grad()
            importance.accumulate_grad(model)
        pruner.step()
    return model.eval()


@torch.no_grad()
def renewed(model: nn.Module, images: Tensor) -> nn.Module:
    """Return a copy whose batch norms' statistics are taken anew on the images."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None
            module.train()
    for x in images.split(32):
        model(x)
    return model.eval()
