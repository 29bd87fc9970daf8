"""Costs of a plan, additive over the unit groups, and budgets on them. FLOPs are 2 x MAC. No torch here."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

import numpy as np

from .errors import InputError
from .latency_table import ChannelLatency, LatencyTable, LatencyTables
from .lengths import Lengths
from .units import SlicePlan, UnitGroup

if TYPE_CHECKING:
    from .tasks.base import Row

BYTES_PER_PARAM = 4  # models compute in fp32
EXACT = 2**53  # the search counts in float64, which holds every whole number below this


def unit_flops(group: UnitGroup, seq_len: int) -> int:
    """Return the encoder FLOPs of one unit on one sequence of `seq_len` tokens.

    A head: 8 T d dh (query, key, value, output) + 4 T^2 dh (scores and context); a neuron: 4 T d.
    """
    projections = len(group.producers) + 1
    flops = 2 * seq_len * projections * group.hidden * group.width
    if group.kind == "head":
        flops += 4 * seq_len * seq_len * group.width
    return flops


def unit_flops_over(group: UnitGroup, lengths: Lengths) -> int:
    """Return the encoder FLOPs of one unit on all rows of a distribution.

    Attention grows with the square of the length, so that this is more than that of as many rows of the mean length.
    """
    return sum(rows * unit_flops(group, tokens) for tokens, rows in lengths.rows)


def encoder_flops(groups: Sequence[UnitGroup], lengths: int | Lengths, plan: SlicePlan | None = None) -> int:
    """Return the encoder's FLOPs (2 x MAC) for one sequence, or for all rows of a distribution, under a plan if any."""
    counts, over = counts_of(groups, plan), lengths_of(lengths)
    return sum(counts[g.name] * unit_flops_over(g, over) for g in groups)


def lengths_of(lengths: int | Lengths) -> Lengths:
    """Return a single length as a distribution."""
    return lengths if isinstance(lengths, Lengths) else Lengths.one(lengths)


def removed_params(groups: Sequence[UnitGroup], plan: SlicePlan) -> int:
    """Return how many parameters the plan takes away."""
    return sum((g.size - plan[g.name].count) * g.params for g in groups)


def counts_of(groups: Sequence[UnitGroup], plan: SlicePlan | None) -> Mapping[str, int]:
    """Return the kept units of each group (all of them without a plan)."""
    return {g.name: plan[g.name].count if plan else g.size for g in groups}


@dataclass(frozen=True)
class CostTable:
    """Say what keeping n units costs, for every n of every group, and what the rest of the model costs.

    `kind` is flops, params, bytes or latency; `groups` maps a group's name to its costs (size + 1,), in
    FLOPs, parameters, bytes or milliseconds; `base` is what cannot be cut.
    """

    kind: str
    groups: Mapping[str, np.ndarray]
    base: float = 0.0

    def cost(self, counts: Mapping[str, int]) -> float:
        """Return the cost of a plan with these counts."""
        return self.base + sum(float(self.groups[name][n]) for name, n in counts.items())

    @property
    def dense(self) -> float:
        """Return the cost of the dense model."""
        return self.base + sum(float(costs[-1]) for costs in self.groups.values())


@dataclass(frozen=True)
class ProductTable:
    """Say what keeping n channels of every group costs: base + sum a_g n_g + sum b_gh n_g n_h.

    `kind` is flops (of one image), params or bytes. The whole model is counted, with what cannot be cut.
    """

    kind: str
    sizes: Mapping[str, int]
    base: float = 0.0
    single: dict[str, float] = field(default_factory=dict)
    double: dict[tuple[str, str], float] = field(default_factory=dict)

    def cost(self, counts: Mapping[str, int]) -> float:
        """Return the cost of a plan with these counts."""
        return (
            self.base
            + sum(a * counts[g] for g, a in self.single.items())
            + sum(b * counts[g] * counts[h] for (g, h), b in self.double.items())
        )

    @property
    def dense(self) -> float:
        """Return the cost of the dense model."""
        return self.cost(self.sizes)

    @property
    def additive(self) -> bool:
        """Say whether no two groups meet in one layer."""
        return not self.double

    def around(self, counts: Mapping[str, int]) -> CostTable:
        """Return the additive table that is exact where only one group departs from these counts."""
        groups = {g: self._alone(g, counts) * np.arange(n + 1.0) for g, n in self.sizes.items()}
        squares = {g: b for (g, h), b in self.double.items() if g == h}
        for g, b in squares.items():
            groups[g] = groups[g] + b * np.arange(self.sizes[g] + 1.0) ** 2
        return CostTable(self.kind, groups, self.cost(counts) - sum(float(c[counts[g]]) for g, c in groups.items()))

    def _alone(self, group: str, counts: Mapping[str, int]) -> float:
        """Return what a channel of a group costs at the others' counts, without its product with its own group."""
        found = self.single.get(group, 0.0)
        for (g, h), b in self.double.items():
            if g != h and group in (g, h):
                found += b * counts[h if g == group else g]
        return found

    def scaled(self, kind: str, factor: float) -> ProductTable:
        """Return the table in another unit."""
        single = {g: factor * a for g, a in self.single.items()}
        double = {pair: factor * b for pair, b in self.double.items()}
        return ProductTable(kind, self.sizes, factor * self.base, single, double)


@dataclass(frozen=True)
class Limit:
    """Bind one cost to at most `most`, in the table's unit; `keep` is that share of the dense cost."""

    table: CostTable | ProductTable
    most: float
    keep: float

    @classmethod
    def share(cls, table: CostTable | ProductTable, keep: float) -> Limit:
        """Allow a share of the dense cost, rounded down to whole FLOPs, parameters or bytes."""
        most = keep * table.dense
        whole = table.kind != "latency"
        return cls(table, table.dense if keep >= 1.0 else math.floor(most) if whole else most, min(keep, 1.0))

    @property
    def room(self) -> float:
        """Return what the units may cost; a hair less than allowed where costs are not whole numbers."""
        room = self.most - self.table.base
        return room - 1e-12 * abs(self.most) if self.table.kind == "latency" else room


def flops_table(groups: Sequence[UnitGroup], lengths: int | Lengths) -> CostTable:
    """Return the encoder's FLOPs for one sequence of so many tokens, or the sum over all rows of a distribution.

    Raises InputError for more FLOPs than are counted exactly.
    """
    over = lengths_of(lengths)
    if (dense := encoder_flops(groups, over)) >= EXACT:
        raise InputError(f"{over.total} rows take {dense:.3g} FLOPs, too many to count each.", hint="Use fewer rows.")
    return CostTable("flops", {g.name: unit_flops_over(g, over) * np.arange(g.size + 1) for g in groups})


def params_table(groups: Sequence[UnitGroup]) -> CostTable:
    """Return the parameters of the encoder's units."""
    return CostTable("params", {g.name: g.params * np.arange(g.size + 1) for g in groups})


def bytes_table(groups: Sequence[UnitGroup], model_params: int) -> CostTable:
    """Return the bytes of the whole model's fp32 weights; `model_params` counts the dense model's parameters."""
    units = {g.name: BYTES_PER_PARAM * g.params * np.arange(g.size + 1) for g in groups}
    base = BYTES_PER_PARAM * model_params - sum(float(u[-1]) for u in units.values())
    return CostTable("bytes", units, base)


def latency_table(
    groups: Sequence[UnitGroup], measured: LatencyTable | LatencyTables, lengths: Lengths | None = None
) -> CostTable:
    """Return the whole model's latency in ms from a measured table; over a distribution the mean of its runs.

    A table of one shape stands for every single length. Raises InputError when the table was measured on a model of
    other shapes, on other batches, or on lengths that do not enclose those of the distribution.
    """
    measured.check(groups)
    several = LatencyTables.of([measured]) if isinstance(measured, LatencyTable) else measured
    if lengths is not None and (lengths.data or several is measured):
        share = several.shares(lengths)
    elif isinstance(measured, LatencyTable):
        if lengths is not None:
            several.batch_of(lengths)
        share = [(measured, 1.0)]
    else:
        raise InputError("The latency table holds several lengths.", hint="Say which one is meant.")
    costs = {g.name: np.sum([w * t.costs(g) for t, w in share], axis=0) for g in groups}
    return CostTable("latency", costs, sum(w * t.base_ms for t, w in share))


@dataclass(frozen=True)
class Budget:
    """Bind one or several costs of the pruned model.

    `keep_flops` (at `seq_len` tokens) and `keep_params` are shares of the dense encoder's units, `max_bytes`
    bounds the whole model's fp32 weights, and `keep_latency` is the share of the whole model's latency in
    `lut`. Without any, half of the FLOPs stay. `seq_len` defaults to the calibration rows' mean length.
    With `lengths` "data" FLOPs and latency are those of all calibration rows at their own lengths, in batches of
    `lengths_batch` rows that are padded to the longest.
    """

    keep_flops: float | None = None
    seq_len: int | None = None
    keep_params: float | None = None
    max_bytes: int | None = None
    keep_latency: float | None = None
    lut: LatencyTable | LatencyTables | ChannelLatency | None = None
    lengths: Literal["one", "data"] = "one"
    lengths_batch: int | None = None  # of a table of several batches too, at one length

    def __post_init__(self) -> None:
        if self.lengths not in ("one", "data"):
            raise InputError(f"The budget lengths = {self.lengths!r} is neither 'one' nor 'data'.")
        if self.lengths == "data" and self.seq_len is not None:
            raise InputError("A budget at the data's lengths has no seq_len.", hint="Leave it out.")
        if self.lengths_batch is not None and self.lengths_batch < 1:
            raise InputError(f"The budget lengths_batch = {self.lengths_batch!r} is not a number of rows.")
        for name in ("keep_flops", "keep_params", "keep_latency"):
            share = getattr(self, name)
            if share is not None and (isinstance(share, bool) or not 0 < share <= 1):
                raise InputError(f"The budget {name} = {share!r} is not a share in (0, 1].")
        if self.max_bytes is not None and self.max_bytes <= 0:
            raise InputError(f"The budget max_bytes = {self.max_bytes!r} is not a positive number of bytes.")

    def lengths_over(self, rows: Sequence[Row], seed: int = 0) -> Lengths:
        """Return the lengths that the budget holds at: one, or those of calibration rows, met in an order by the seed.

        Raises InputError for images, which have no lengths, and for fewer rows than a batch has.
        """
        if self.lengths == "one":
            one = Lengths.one(self.seq_len or math.ceil(np.mean([r.length for r in rows])))
            return one if self.lengths_batch is None else replace(one, batch=self.lengths_batch)
        if any(r.tokens is not None for r in rows):
            raise InputError("Images are all of one length.", hint="Leave the budget at one length (lengths = one).")
        batch = self.lengths_batch or 1
        if batch > len(rows):
            raise InputError(
                f"{len(rows)} calibration rows fill no batch of {batch}.",
                hint="Use more --samples, or smaller batches.",
            )
        return Lengths.of_rows([r.length for r in rows], batch, seed)

    def limits(self, groups: Sequence[UnitGroup], lengths: int | Lengths, model_params: int) -> list[Limit]:
        """Return one limit per bound cost.

        Raises InputError for a latency budget without its table, or with one that does not hold the lengths.
        """
        only = self.keep_params is None and self.max_bytes is None and self.keep_latency is None
        keep_flops = 0.5 if self.keep_flops is None and only else self.keep_flops
        found = []
        if keep_flops is not None:
            found.append(Limit.share(flops_table(groups, lengths), keep_flops))
        if self.keep_params is not None:
            found.append(Limit.share(params_table(groups), self.keep_params))
        if self.max_bytes is not None:
            table = bytes_table(groups, model_params)
            found.append(Limit(table, self.max_bytes, min(self.max_bytes / table.dense, 1.0)))
        if self.keep_latency is not None:
            if not isinstance(self.lut, LatencyTable | LatencyTables):
                raise InputError("A latency budget needs this model's table.", hint="Make one: deploy-prune probe.")
            found.append(Limit.share(latency_table(groups, self.lut, lengths_of(lengths)), self.keep_latency))
        return found
