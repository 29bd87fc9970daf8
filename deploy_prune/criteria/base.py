"""What a criterion is given and what it gives back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..archs.conv import ChannelGraph
from ..calibration import CalibrationStats
from ..errors import InputError
from ..graph_runner import GraphRunner
from ..progress import Progress
from ..teacher import Teacher
from ..units import ChannelGroup

Scores = dict[str, np.ndarray]  # group name -> importance of each unit (units,), larger = keep


@dataclass(frozen=True)
class Evidence:
    """Hold the dense model and, unless the criterion needs no data, what calibration saw of it."""

    model: nn.Module
    groups: Sequence[Any]  # UnitGroup, or ChannelGroup with a graph
    seed: int = 0
    stats: CalibrationStats | None = None
    make_teacher: Callable[[], Teacher] | None = None
    graph: ChannelGraph | None = None  # of a convolutional network, whose groups are channels
    make_runner: Callable[[], GraphRunner] | None = None
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

    def runs_graph(self) -> GraphRunner:
        """Return what runs a convolutional network node by node."""
        if self.make_runner is None:
            raise InputError("This criterion needs calibration data.", hint="Use one that is data-free.")
        return self.make_runner()

    def weight(self, path: str) -> Tensor:
        """Return the flattened weight (out, columns) of one of the model's layers, in float64 on the CPU."""
        return self.model.get_parameter(f"{path}.weight").detach().double().cpu().flatten(1)

    def producing(self, group: Any) -> Tensor:
        """Return the weights that make each unit (units, weights)."""
        rows = torch.cat([self.weight(p) for p in group.producers], dim=1)
        return rows.reshape(group.size, -1)

    def reading(self, group: Any) -> Tensor:
        """Return the weights that read each unit (units, weights)."""
        if isinstance(group, ChannelGroup):
            weights = [self.weight(r.path) for r in group.readers]
        else:
            weights = [self.weight(group.consumer)]
        return torch.cat([w.reshape(len(w), group.size, -1).movedim(1, 0).flatten(1) for w in weights], dim=1)


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
