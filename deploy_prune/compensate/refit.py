"""Least-squares refit of an output projection's weight and bias on the kept inputs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..moments import Moments
from ..units import UnitGroup
from .solution import Solution

RIDGES = (1e-3, 1e-2, 1e-1)
DEFAULT_RIDGE = 1e-3  # where no tokens are held out


@dataclass(frozen=True)
class Refit:
    """Solve min over W, b of sum_t w_t |W h_t + b - y_t|^2 + ridge · dbar · |W - W0|^2 by Cholesky.

    h_t are the pruned model's kept inputs, y_t what the dense projection plus the difference of the
    residual streams would give, dbar the mean diagonal of sum_t w_t h_t h_t^T, W0 the dense columns. Half of
    a row's weight w_t is spread evenly over its tokens, half in proportion to the squared gradient there.
    A parallel refit takes h_t and y_t from the dense model alone, at the kept units: the layers are then
    independent of each other, and no error of a lower layer is mended in a higher one.
    Without a given `ridge`, each group takes the one of RIDGES that is best on the held-out tokens.
    """

    ridge: float | None = None
    salient_share: float = 0.5
    cls_only_last: bool = False
    parallel: bool = False

    @property
    def holds_out(self) -> bool:
        """Say that some tokens are to be held out, to choose the ridge on."""
        return self.ridge is None

    def teacher_keep(self, keep: float) -> float:
        """Return the share that the teacher keeps: the dense model teaches."""
        return 1.0

    def solve(
        self, group: UnitGroup, weight: Tensor, bias: Tensor, moments: Moments, held: Moments | None = None
    ) -> Solution:
        """Return the new weight (d, n) and bias (d,) of one group's output projection."""
        total = moments if held is None else moments + held
        before = total.residual(weight, bias)
        if weight.shape[1] == 0:  # nothing kept: the best constant
            mean_y = total.y / total.count.clamp(min=1)
            return Solution(weight, mean_y.to(bias.dtype), before, total.residual(weight, mean_y))
        ridge = bias.new_tensor(DEFAULT_RIDGE if self.ridge is None else self.ridge, dtype=torch.float64)
        if self.ridge is None and held is not None:
            ridges = bias.new_tensor(RIDGES, dtype=torch.float64)
            errors = torch.stack([held.residual(*_ridge_fit(weight, moments, r)[:2]) for r in ridges])
            best = torch.where(errors.isfinite(), errors, torch.inf).argmin()
            ridge = torch.where(held.count > 0, ridges.index_select(0, best.reshape(1)).squeeze(0), ridge)
        new, new_bias, info = _ridge_fit(weight, total, ridge)
        after = total.residual(new, new_bias)
        return Solution(new.to(weight.dtype), new_bias.to(bias.dtype), before, after, info=info, ridge=ridge)


def _ridge_fit(weight: Tensor, moments: Moments, ridge: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the ridge solution's weight (d, n) and bias (d,) in float64, and Cholesky's info."""
    w0 = weight.double()
    count = moments.count.clamp(min=torch.finfo(torch.float64).tiny)
    mean_h, mean_y = moments.h / count, moments.y / count
    gram = moments.hh - count * torch.outer(mean_h, mean_h)
    cross = moments.yh - count * torch.outer(mean_y, mean_h)
    penalty = ridge * moments.hh.diagonal().mean()
    penalty = torch.where(penalty > 0, penalty, torch.ones_like(penalty))  # all inputs zero: keep W0
    system = gram + penalty * torch.eye(gram.shape[0], dtype=gram.dtype, device=gram.device)
    factor, info = torch.linalg.cholesky_ex(system)
    new = torch.cholesky_solve((cross + penalty * w0).T, factor).T
    return new, mean_y - new @ mean_h, info
