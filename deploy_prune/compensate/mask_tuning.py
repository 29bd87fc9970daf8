"""The paper's mask tuning: one scale per kept unit, by damped least squares around 1."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from scipy.sparse.linalg import lsmr
from torch import Tensor

from ..moments import Moments
from ..units import UnitGroup
from .solution import Solution


@dataclass(frozen=True)
class MaskTuning:
    """Solve min over r of |A r - b|^2 + damp^2 |r - 1|^2, the columns of A being the units' outputs.

    A has one row per token and feature and is never formed: A^T A and A^T b follow from the moments of
    the projection's inputs, and LSMR runs on a triangular factor with the same normal equations,
    hence the same iterates as on A. The teacher is a model pruned to sqrt(keep).

    Source: Kwon et al. 2022, section 3.4, equation 13; LSMR of Fong and Saunders through SciPy, given
    5n steps (its default of n stops too early).
    """

    solver: Literal["lsmr", "exact"] = "lsmr"
    damp: float = 1.0
    salient_share: float = 0.0
    cls_only_last: bool = True
    holds_out: bool = False
    parallel: bool = False

    def teacher_keep(self, keep: float) -> float:
        """Return the share that the teacher keeps."""
        return math.sqrt(keep)

    def solve(
        self, group: UnitGroup, weight: Tensor, bias: Tensor, moments: Moments, held: Moments | None = None
    ) -> Solution:
        """Return the projection with scaled columns, and the scales (units,)."""
        before = moments.residual(weight, bias)
        if weight.shape[1] == 0:
            return Solution(weight, bias, before, before)
        w, b = weight.double(), bias.double()
        units = weight.shape[1] // group.width
        # A[:, u] is the contribution of unit u's columns to the projection's output
        normal = (moments.hh * (w.T @ w)).reshape(units, group.width, units, group.width).sum((1, 3))
        target = (w * (moments.yh - torch.outer(b, moments.h))).sum(0).reshape(units, group.width).sum(1)
        step, info = self._step(normal, target - normal.sum(1))
        scales = 1.0 + step
        new = w * scales.repeat_interleave(group.width)
        return Solution(new.to(weight.dtype), bias, before, moments.residual(new, b), scales, info)

    def _step(self, normal: Tensor, rhs: Tensor) -> tuple[Tensor, Tensor]:
        eye = torch.eye(normal.shape[0], dtype=normal.dtype, device=normal.device)
        if self.solver == "exact":
            factor, info = torch.linalg.cholesky_ex(normal + self.damp**2 * eye)
            return torch.cholesky_solve(rhs.unsqueeze(1), factor).squeeze(1), info
        jitter = 1e-12 * normal.diagonal().mean()
        factor, info = torch.linalg.cholesky_ex(normal + jitter * eye)  # normal = L L^T
        if int(info) != 0:
            return torch.zeros_like(rhs), info
        compressed = torch.linalg.solve_triangular(factor, rhs.unsqueeze(1), upper=False).squeeze(1)
        matrix = factor.T.cpu().numpy()
        n = matrix.shape[0]
        solution = lsmr(matrix, compressed.cpu().numpy(), damp=self.damp, atol=1e-10, btol=1e-10, maxiter=5 * n)[0]
        return torch.from_numpy(solution).to(rhs), info
