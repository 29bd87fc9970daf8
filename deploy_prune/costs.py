"""Exact costs of a plan, additive over the unit groups. FLOPs are 2 x MAC. No torch here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .units import SlicePlan, UnitGroup


def unit_flops(group: UnitGroup, seq_len: int) -> int:
    """Return the encoder FLOPs of one unit on one sequence of `seq_len` tokens.

    A head: 8 T d dh (query, key, value, output) + 4 T^2 dh (scores and context); a neuron: 4 T d.
    """
    projections = len(group.producers) + 1
    flops = 2 * seq_len * projections * group.hidden * group.width
    if group.kind == "head":
        flops += 4 * seq_len * seq_len * group.width
    return flops


def encoder_flops(groups: Sequence[UnitGroup], seq_len: int, plan: SlicePlan | None = None) -> int:
    """Return the encoder's FLOPs (2 x MAC) for one sequence, dense or under a plan."""
    counts = counts_of(groups, plan)
    return sum(counts[g.name] * unit_flops(g, seq_len) for g in groups)


def removed_params(groups: Sequence[UnitGroup], plan: SlicePlan) -> int:
    """Return how many parameters the plan takes away."""
    return sum((g.size - plan[g.name].count) * g.params for g in groups)


def counts_of(groups: Sequence[UnitGroup], plan: SlicePlan | None) -> Mapping[str, int]:
    """Return the kept units of each group (all of them without a plan)."""
    return {g.name: plan[g.name].count if plan else g.size for g in groups}


@dataclass(frozen=True)
class Budget:
    """Bind the encoder's FLOPs at `seq_len` tokens to the share `keep` of the dense encoder's."""

    keep: float
    seq_len: int
    kind: str = "flops"

    def limit(self, groups: Sequence[UnitGroup]) -> int:
        """Return the largest cost allowed, in FLOPs."""
        dense = encoder_flops(groups, self.seq_len)
        return dense if self.keep >= 1.0 else int(self.keep * dense)
