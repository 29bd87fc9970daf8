"""Measured latency over what is kept, as `probe` writes it and the search reads it. No torch here."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from .documents import one_line, read_json
from .errors import InputError
from .lengths import Lengths
from .units import UnitGroup, UnitKind, Units


class KindTable(BaseModel):
    """Hold one kind of sub-layer's latency at a grid of counts; `low_ms` and `high_ms` are its interval."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    size: int
    width: int
    counts: list[int]
    ms: list[float]
    low_ms: list[float]
    high_ms: list[float]

    @model_validator(mode="after")
    def _fits(self) -> KindTable:
        if self.counts != sorted(set(self.counts)) or self.counts[:1] != [0] or self.counts[-1] != self.size:
            raise ValueError(f"counts must rise from 0 to {self.size}")
        if not len(self.counts) == len(self.ms) == len(self.low_ms) == len(self.high_ms):
            raise ValueError("counts and milliseconds differ in length")
        if any(b < a for a, b in zip(self.ms, self.ms[1:], strict=False)) or self.ms[0] < 0:
            raise ValueError("the milliseconds must not fall with the count")
        return self


class LatencyTable(BaseModel):
    """Hold what one layer's attention and FFN take at every count, and what the rest of the model takes, in ms."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    schema_version: Literal["1.0"] = "1.0"
    runtime: str
    batch: int
    seq: int
    threads: int | None = None
    hidden: int
    layers: int
    base_ms: float = Field(ge=0)
    dense_ms: float
    kinds: dict[UnitKind, KindTable]
    machine: dict[str, Any] = Field(default_factory=dict)

    def check(self, groups: Sequence[UnitGroup]) -> None:
        """Raise InputError when the groups are not of the shapes that were measured."""
        for g in groups:
            table = self.kinds.get(g.kind)
            measured = None if table is None else (table.size, table.width, self.hidden)
            if measured != (g.size, g.width, g.hidden):
                raise InputError(
                    f"The latency table was measured on another architecture: {g.name} has {g.size} {g.kind}s of width"
                    f" {g.width} on {g.hidden} features, the table has {measured or 'none of that kind'}.",
                    hint="Probe this very model: deploy-prune probe MODEL.",
                )
        layers = 1 + max(g.layer for g in groups)
        if layers != self.layers:
            raise InputError(
                f"The latency table was measured on {self.layers} layers, the model has {layers}.",
                hint="Probe this very model: deploy-prune probe MODEL.",
            )

    def costs(self, group: UnitGroup) -> np.ndarray:
        """Return the milliseconds of a group at every count (size + 1,), linear between measured counts."""
        table = self.kinds[group.kind]
        return np.interp(np.arange(group.size + 1), table.counts, table.ms)


class LatencyTables(BaseModel):
    """Hold one model's tables at several lengths, and perhaps batches; lengths between are interpolated."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    kind: Literal["lengths"] = "lengths"
    schema_version: Literal["1.0"] = "1.0"
    tables: list[LatencyTable] = Field(min_length=1)

    @model_validator(mode="after")
    def _alike(self) -> LatencyTables:
        first = self.tables[0]
        for table in self.tables:
            if any(getattr(table, name) != getattr(first, name) for name in ("runtime", "threads", "hidden", "layers")):
                raise ValueError("the tables are of different models, runtimes or numbers of threads")
            if {k: (t.size, t.width) for k, t in table.kinds.items()} != {
                k: (t.size, t.width) for k, t in first.kinds.items()
            }:
                raise ValueError("the tables are of different models")
        places = [(table.batch, table.seq) for table in self.tables]
        if places != sorted(set(places)):
            raise ValueError("the tables must rise by batch, then length, each named once")
        return self

    @classmethod
    def of(cls, tables: Sequence[LatencyTable]) -> LatencyTables:
        """Put tables of one model together."""
        return cls(tables=sorted(tables, key=lambda t: (t.batch, t.seq)))

    @property
    def runtime(self) -> str:
        return self.tables[0].runtime

    @property
    def threads(self) -> int | None:
        return self.tables[0].threads

    def check(self, groups: Sequence[UnitGroup]) -> None:
        """Raise InputError when the groups are not of the shapes that were measured."""
        self.tables[0].check(groups)

    def shares(self, lengths: Lengths) -> list[tuple[LatencyTable, float]]:
        """Return tables and weights (sum 1) that add up to the mean run's latency over a distribution.

        A length between two probed ones is interpolated linearly: latency is convex in the length, attention being
        quadratic, so that this errs on the slow side. Batches are not interpolated. Raises InputError for a batch that
        was not probed, or a length outside of those that were.
        """
        at = {t.seq: t for t in self.tables if t.batch == self.batch_of(lengths)}
        probed = sorted(at)
        first, last = lengths.rows[0][0], lengths.rows[-1][0]
        if first < probed[0] or last > probed[-1]:
            asked = f"lengths from {first} to {last}" if first < last else f"length {first}"
            known = f"from {probed[0]} to {probed[-1]} tokens" if len(probed) > 1 else f"at {probed[0]} tokens alone"
            raise InputError(
                f"The budget is for {asked}, the latency table was probed {known}.",
                hint=f"Probe lengths that enclose them: deploy-prune probe MODEL --seq {_enclosing(first, last)}",
            )
        weight = dict.fromkeys(probed, 0.0)
        for tokens, rows in lengths.rows:
            below = max(n for n in probed if n <= tokens)
            above = min(n for n in probed if n >= tokens)
            part = (tokens - below) / (above - below) if above > below else 0.0
            weight[below] += (1 - part) * rows / lengths.total
            weight[above] += part * rows / lengths.total
        return [(at[n], w) for n, w in weight.items() if w > 0]

    def batch_of(self, lengths: Lengths) -> int:
        """Return the probed batch that a budget is for. Raises InputError when it was not probed."""
        probed = sorted({t.batch for t in self.tables})
        if not lengths.data and lengths.batch == 1 and len(probed) == 1:
            return probed[0]  # a single length asks for no batch of its own
        if lengths.batch not in probed:
            raise InputError(
                f"The budget is for batches of {lengths.batch}, the latency table was probed at {_listed(probed)}.",
                hint="Name one of them with --lengths-batch, or probe with another --batch.",
            )
        return lengths.batch


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))


def _enclosing(first: int, last: int) -> str:
    return _listed(sorted({first, (first + last) // 2, last})).replace(" ", "")


class ChannelPoint(BaseModel):
    """Hold one cut network that was measured: its share of the FLOPs, its ms, and what the table says of it."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    flops: float
    ms: float
    fitted_ms: float


class ChannelLatency(BaseModel):
    """Hold a convolutional network's latency in ms as base + sum a n_g + sum b n_g n_h over its groups' channels n.

    `mean_error` and `largest_error` are relative, of points that were held out of a first fit.
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    kind: Literal["channels"] = "channels"
    schema_version: Literal["1.0"] = "1.0"
    runtime: str
    batch: int
    threads: int | None = None
    align: int = 1  # of whose multiples the measured counts were
    image: tuple[int, int, int]
    sizes: dict[str, int]
    base_ms: float = Field(ge=0)
    dense_ms: float
    single: dict[str, float]
    double: list[tuple[str, str, float]]
    points: list[ChannelPoint]
    mean_error: float
    largest_error: float
    machine: dict[str, Any] = Field(default_factory=dict)

    def check(self, groups: Sequence[Units], image: Sequence[int], batch: int = 1) -> None:
        """Raise InputError when the groups, or images (C, H, W), are not those measured, or the batch is another.

        A budget that names no batch, 1, takes a table of any.
        """
        for g in groups:
            if self.sizes.get(g.name) != g.size:
                raise InputError(
                    f"The latency table was measured on another network: {g.name} has {g.size} {g.kind}s, the table"
                    f" {self.sizes.get(g.name, 'none of that name')}.",
                    hint="Probe this very model: deploy-prune probe MODEL.",
                )
        if tuple(image) != self.image:
            raise InputError(
                f"The latency table was measured on images of {_size(self.image)}, the model is given {_size(image)}.",
                hint="Probe this very model: deploy-prune probe MODEL.",
            )
        if batch not in (1, self.batch):
            raise InputError(
                f"The budget is for batches of {batch}, the latency table was probed at {self.batch}.",
                hint=f"Probe it so: deploy-prune probe MODEL --batch {batch}.",
            )


def _size(image: Sequence[int]) -> str:
    return " x ".join(map(str, image))


AnyLatency = LatencyTable | LatencyTables | ChannelLatency


def read_latency_table(path: str | Path) -> AnyLatency:
    """Read what `probe` wrote: one table, or a file of several. Raises InputError for a file that is neither."""
    forms: dict[Any, type[AnyLatency]] = {"channels": ChannelLatency, "lengths": LatencyTables}
    try:
        contents = read_json(path)
        kind = contents.get("kind") if isinstance(contents, dict) else None
        form = forms.get(kind, LatencyTable) if isinstance(kind, str) else LatencyTable
        return form.model_validate(contents)
    except OSError as error:
        raise InputError(f"Could not read the latency table {path}: {error.strerror}.") from error
    except ValueError as error:  # pydantic's is one
        reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else one_line(error)
        raise InputError(
            f"{path} is not a latency table: {reason}.", hint="Make one: deploy-prune probe MODEL --out lut.json"
        ) from error
