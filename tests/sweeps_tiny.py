"""A ragged plan of the tiny models, and the teacher that a sweep follows."""

from __future__ import annotations

from typing import Any

from deploy_prune.archs import arch_of
from deploy_prune.batches import Batches
from deploy_prune.heads import Head
from deploy_prune.teacher import Teacher
from deploy_prune.units import MaskSet, SlicePlan, UnitGroup


def ragged_plan(model: Any) -> tuple[tuple[UnitGroup, ...], SlicePlan]:
    groups = arch_of(model).groups(model)
    masks = MaskSet.ones(groups)
    for number, g in enumerate(groups):
        masks[g.name][(number % 2) + 1 :: 2] = 0
    masks["L01.heads"][:] = 0
    masks["L02.neurons"][:] = 0
    masks["L00.heads"][:] = [0, 1, 0, 0]  # one remaining unit
    return groups, SlicePlan.from_masks(groups, masks)


def teacher(model: Any, groups: tuple[UnitGroup, ...], rows: Any, pad_id: int = 0, **settings: Any) -> Teacher:
    head = Head("classification")
    return Teacher(model, groups, head, list(Batches(rows, head, pad_id).shared()), **settings)
