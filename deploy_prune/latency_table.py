"""Measured latency over what is kept, as `probe` writes it and the search reads it. No torch here."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from .documents import one_line, read_json
from .errors import InputError
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

    def check(self, groups: Sequence[Units]) -> None:
        """Raise InputError when the groups are not among those that were measured."""
        for g in groups:
            if self.sizes.get(g.name) != g.size:
                raise InputError(
                    f"The latency table was measured on another network: {g.name} has {g.size} {g.kind}s, the table"
                    f" {self.sizes.get(g.name, 'none of that name')}.",
                    hint="Probe this very model: deploy-prune probe MODEL.",
                )


def read_latency_table(path: str | Path) -> LatencyTable | ChannelLatency:
    """Read a table written by `probe`. Raises InputError for a file that is not one."""
    try:
        contents = read_json(path)
        channels = isinstance(contents, dict) and contents.get("kind") == "channels"
        return (ChannelLatency if channels else LatencyTable).model_validate(contents)
    except OSError as error:
        raise InputError(f"Could not read the latency table {path}: {error.strerror}.") from error
    except ValueError as error:  # pydantic's is one
        reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else one_line(error)
        raise InputError(
            f"{path} is not a latency table: {reason}.", hint="Make one: deploy-prune probe MODEL --out lut.json"
        ) from error
