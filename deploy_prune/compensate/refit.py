"""Least-squares refit of an output projection's weight and bias on the kept inputs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..units import UnitGroup
from .moments import Moments
from .solution import Solution


@dataclass(frozen=True)
class Refit:
    """Solve min over W, b of sum_t w_t |W h_t + b - y_t|^2 + ridge · dbar · |W - W0|^2 by one Cholesky.

    h_t are the pruned model's kept inputs, y_t what the dense projection plus the difference of the
    residual streams would give, dbar the mean diagonal of sum_t w_t h_t h_t^T, W0 the dense columns. Half of
    a row's weight w_t is spread evenly over its tokens, half in proportion to the squared gradient there.
    """

    ridge: float = 1e-3
    salient_share: float = 0.5
    cls_only_last: bool = False

    def teacher_keep(self, keep: float) -> float:
        """Return the share that the teacher keeps: the dense model teaches."""
        return 1.0

    def solve(self, group: UnitGroup, weight: Tensor, bias: Tensor, moments: Moments) -> Solution:
        """Return the new weight (d, n) and bias (d,) of one group's output projection."""
        count = moments.count.clamp(min=1)
        mean_h, mean_y = moments.h / count, moments.y / count
        before = moments.residual(weight, bias)
        if weight.shape[1] == 0:  # nothing kept: the best constant
            return Solution(weight, mean_y.to(bias.dtype), before, moments.residual(weight, mean_y))
        w0 = weight.double()
        gram = moments.hh - count * torch.outer(mean_h, mean_h)
        cross = moments.yh - count * torch.outer(mean_y, mean_h)
        penalty = self.ridge * moments.hh.diagonal().mean()
        penalty = torch.where(penalty > 0, penalty, torch.ones_like(penalty))  # all inputs zero: keep W0
        system = gram + penalty * torch.eye(gram.shape[0], dtype=gram.dtype, device=gram.device)
        factor, info = torch.linalg.cholesky_ex(system)
        new = torch.cholesky_solve((cross + penalty * w0).T, factor).T
        new_bias = mean_y - new @ mean_h
        after = moments.residual(new, new_bias)
        return Solution(new.to(weight.dtype), new_bias.to(bias.dtype), before, after, info=info)
