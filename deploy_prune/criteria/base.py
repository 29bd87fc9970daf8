"""What a criterion is given and what it gives back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor, nn

from ..calibration import CalibrationStats
from ..errors import InputError
from ..progress import Progress
from ..teacher import Teacher
from ..units import UnitGroup

Scores = dict[str, np.ndarray]  # group name -> importance of each unit (units,), larger = keep


@dataclass(frozen=True)
class Evidence:
    """Hold the dense model and, unless the criterion needs no data, what calibration saw of it."""

    model: nn.Module
    groups: Sequence[UnitGroup]
    seed: int = 0
    stats: CalibrationStats | None = None
    make_teacher: Callable[[], Teacher] | None = None
    progress: Progress = lambda share: None

    @property
    def calibrated(self) -> CalibrationStats:
        if self.stats is None:
            raise InputError("This criterion needs calibration data.", hint="Use one that is data-free.")
        return self.stats

    @property
    def taught(self) -> Teacher:
        """Return what runs the model layer by layer."""
        if self.make_teacher is None:
            raise InputError("This criterion needs calibration data.", hint="Use one that is data-free.")
        return self.make_teacher()

    def weight(self, path: str) -> Tensor:
        """Return the weight (out, in) of one of the model's Linears, in float64 on the CPU."""
        return self.model.get_parameter(f"{path}.weight").detach().double().cpu()


@dataclass(frozen=True)
class Criterion:
    """Score every unit; `data_free` ones never look at calibration data.

    `gradient_moments` asks calibration for the second moments of the gradients at the sub-layers' outputs.
    """

    score: Callable[[Evidence], Mapping[str, np.ndarray]]
    data_free: bool = False
    gradient_moments: bool = False

    def __call__(self, evidence: Evidence) -> Scores:
        """Return the scores of every group. Raises InputError when they do not fit or are not finite."""
        found = self.score(evidence)
        scores = {}
        for g in evidence.groups:
            values = np.asarray(found[g.name], dtype=np.float64)
            if values.shape != (g.size,) or not np.isfinite(values).all():
                raise InputError(f"The criterion's scores of {g.name} are not {g.size} finite numbers.")
            scores[g.name] = values
        return scores


def per_unit(columns: Tensor, group: UnitGroup) -> Tensor:
    """Group values per column (..., units * width) by unit (..., units, width)."""
    return columns.reshape(*columns.shape[:-1], group.size, group.width)
