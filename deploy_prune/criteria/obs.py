"""Optimal brain surgeon on whole units: what cutting one costs when the output projection is refitted."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from ..moments import MomentSums
from ..parallel import Shares
from ..teacher import Teacher
from ..units import UnitGroup
from .base import Evidence, Scores
from .channels import score_channels

RIDGE = 1e-3  # of the mean diagonal of the inputs' second moment, as in the refit
BLOCKS = 96  # into which a wide group's elimination is cut


@torch.no_grad()
def obs(evidence: Evidence) -> Scores:
    """Return the expected rise of the loss when a unit is cut after all less important ones (units,).

    Units of a group are eliminated one after another (those of a wide group in blocks); after each step the
    columns that stay take over what the cut ones did, by least squares over all unpadded tokens. Errors of
    the output are measured by the second moment of the loss's gradient there, so that the scores of all groups share
    one unit: nats.

    Source: Hassibi and Stork 1993 (optimal brain surgeon); Kurtic et al. 2023, ZipLM, equation 4 (units);
    Martens and Grosse 2015 (the gradient's second moment as the output metric).
    """
    stats = evidence.calibrated
    if evidence.graph is not None:
        felt = stats.gradient_moments
        return score_channels(
            evidence, evidence.graph, lambda x, second, weight: felt[x.path] / stats.tokens, eliminate
        )
    return _scores(evidence, lambda g, second, weight: (stats.gradient_moments[g.name] / stats.tokens).to(second))


@torch.no_grad()
def reconstruction(evidence: Evidence) -> Scores:
    """Return the rise of a sub-layer's relative squared error when a unit is cut after all less important ones.

    As `obs`, but errors of the output count the same in every direction, as a share of the output's own second moment.

    Source: Kurtic et al. 2023, ZipLM, equation 4; Meng et al. 2024, OSSCAR, equation 2 (the same objective).
    """

    def metric(of: object, second: Tensor, weight: Tensor) -> Tensor:
        w = weight.double()
        energy = (w @ second * w).sum()
        return torch.eye(len(w), dtype=torch.float64, device=w.device) / torch.where(energy > 0, energy, 1.0)

    if evidence.graph is not None:
        return score_channels(evidence, evidence.graph, metric, eliminate)
    return _scores(evidence, metric)


def _scores(evidence: Evidence, metric: Callable[[UnitGroup, Tensor, Tensor], Tensor]) -> Scores:
    stats, teacher = evidence.calibrated, evidence.taught
    shares = Shares()  # of layers: their moments come one after another, their eliminations run beside each other
    for depth, groups in enumerate(teacher.layers):
        moments = input_moments(teacher, depth)

        def eliminated(groups: Sequence[UnitGroup] = groups, moments: dict[str, Tensor] = moments) -> np.ndarray:
            found = []
            for g in groups:
                second = moments.pop(g.name)
                second = second / stats.tokens.to(second.device)
                weight = evidence.model.get_parameter(f"{g.consumer}.weight").to(second.device)
                order, rises = eliminate(second, weight, metric(g, second, weight), g.width)
                scores = np.zeros(g.size)
                scores[order.cpu().numpy()] = np.maximum.accumulate(rises.cpu().numpy())
                found.append(scores)
            return np.concatenate(found)

        shares.add(sum(g.size for g in groups), eliminated)
        evidence.progress((depth + 1) / len(teacher.layers))
    scores: Scores = {}
    for groups, found in zip(teacher.layers, shares.results(), strict=True):
        ends = np.cumsum([g.size for g in groups])[:-1]
        scores |= {g.name: part for g, part in zip(groups, np.split(found, ends), strict=True)}
    return scores


def input_moments(teacher: Teacher, depth: int) -> dict[str, Tensor]:
    """Return sum over unpadded tokens of h h^T (n, n) at a layer's output projections."""
    runner = teacher.runner
    moments = {g.name: MomentSums(g.size * g.width, 0, runner.device) for g in teacher.layers[depth]}

    def look(number: int, inputs: dict[str, Tensor], outputs: dict[str, Tensor]) -> None:
        batch = runner.feeds[number]
        for name, sums in moments.items():
            sums.add(inputs[name], inputs[name][..., :0], batch.mask.to(runner.device), batch.number)

    teacher.visit(depth, look)
    return {name: sums.total().hh for name, sums in moments.items()}


def eliminate(moments: Tensor, weight: Tensor, metric: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Return the units in the order of their elimination (units,) and the rise of tr(E[e e^T] metric) at each.

    `moments` (n, n) is E[h h^T] of the projection's inputs, `weight` (d, n) the projection, `metric` (d, d)
    weighs its output errors e. With P = moments^-1, cutting the columns C costs
    tr(V_C P_CC^-1 V_C^T), V = metric^(1/2) W; then V -= V_C P_CC^-1 P_C and P -= P_:C P_CC^-1 P_C.
    """
    n = moments.shape[0]
    eye = torch.eye(n, dtype=torch.float64, device=moments.device)
    scale = moments.diagonal().mean()
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    p = torch.linalg.inv(moments + RIDGE * scale * eye)
    values, vectors = torch.linalg.eigh(metric.double())
    v = (vectors * values.clamp(min=0).sqrt()).T @ weight.double()
    left = torch.arange(n // width, device=moments.device)  # the units that the rows of p stand for
    gone = torch.zeros(len(left), dtype=torch.bool, device=moments.device)
    block = max(1, len(left) // BLOCKS)
    order, rises, alive = [], [], len(left)
    while alive:
        if 2 * alive <= len(left):  # eliminated columns are all zero: drop them now and then
            kept = torch.argsort(gone.int(), stable=True)[:alive]
            k = _columns(kept, width)
            left, gone, v, p = left[kept], gone[kept], v[:, k], p[k][:, k]
        costs = _unit_costs(p, v, gone, width)
        cut = torch.argsort(costs, stable=True)[: min(block, alive)]
        c = _columns(cut, width)
        rows = p[c]
        solved = torch.linalg.solve(rows[:, c], torch.cat([v[:, c].T, rows], dim=1))
        taken, taught = solved[:, : len(v)], solved[:, len(v) :]
        share = costs[cut] / costs[cut].sum().clamp(min=torch.finfo(torch.float64).tiny)
        rises.append((v[:, c].T * taken).sum() * share)
        order.append(left[cut])
        v = v.addmm(v[:, c], taught, alpha=-1)
        p.addmm_(rows.T, taught, alpha=-1)
        gone = gone.index_fill(0, cut, True)
        alive -= len(cut)
    return torch.cat(order), torch.cat(rises)


def _unit_costs(p: Tensor, v: Tensor, gone: Tensor, width: int) -> Tensor:
    """Return tr(V_u P_uu^-1 V_u^T) of every unit (units,), infinite for those that are gone."""
    if width == 1:
        costs = v.square().sum(0) / torch.where(gone, 1.0, p.diagonal())
    else:
        units = len(p) // width
        blocks = p.reshape(units, width, units, width).diagonal(dim1=0, dim2=2).movedim(-1, 0)  # (units, width, width)
        eye = torch.eye(width, dtype=p.dtype, device=p.device)
        blocks = torch.where(gone[:, None, None], eye, blocks)
        columns = v.T.reshape(units, width, -1)
        costs = (columns * torch.linalg.solve(blocks, columns)).sum((1, 2))
    return costs.masked_fill(gone, torch.inf)


def _columns(units: Tensor, width: int) -> Tensor:
    return (units[:, None] * width + torch.arange(width, device=units.device)).flatten()
