"""What a compensation solver returns, and when it is declined."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..moments import Moments
from ..units import UnitGroup


@dataclass
class Solution:
    """Hold a proposed projection: weight (d, n), bias (d,), and the squared error before and after.

    `scales` (units,) is set by mask tuning, whose weight is the old one with scaled columns; `ridge` by the
    refit. `info` is Cholesky's (0 = positive definite). All are tensors, so that solving never waits for the device.
    """

    weight: Tensor
    bias: Tensor
    before: Tensor
    after: Tensor
    scales: Tensor | None = None
    info: Tensor | None = None
    ridge: Tensor | None = None

    def decline_reason(self, bound: float = 10.0) -> str | None:
        """Say why the proposal must not be used, or None when it may."""
        if self.info is not None and int(self.info) != 0:
            return "the normal equations are not positive definite"
        if not bool(torch.isfinite(self.weight).all() & torch.isfinite(self.bias).all()):
            return "the solution is not finite"
        if self.scales is not None and float(self.scales.abs().max()) > bound:
            return f"a mask value left [-{bound:g}, {bound:g}]"
        if float(self.after) > float(self.before) * (1 + 1e-9):
            return "the error would grow"
        return None


class Solver(Protocol):
    """Propose a better output projection for one group from its moments."""

    @property
    def cls_only_last(self) -> bool:
        """Say whether a classifier's last FFN is fitted on its first token alone."""
        ...

    @property
    def salient_share(self) -> float:
        """Say which part of a row's weight goes to its tokens by saliency, 0 to 1."""
        ...

    @property
    def holds_out(self) -> bool:
        """Say whether an eighth of the batches is held out, to choose a setting on."""
        ...

    @property
    def parallel(self) -> bool:
        """Say whether projections are fitted on the teacher's inputs, not the student's."""
        ...

    def teacher_keep(self, keep: float) -> float:
        """Return the share of FLOPs that the teacher keeps, for a student that keeps `keep`."""
        ...

    def solve(
        self, group: UnitGroup, weight: Tensor, bias: Tensor, moments: Moments, held: Moments | None = None
    ) -> Solution:
        """Return the proposal for weight (d, n) and bias (d,); `held` are the held-out tokens' moments."""
        ...
