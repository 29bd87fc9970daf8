"""How to prune and what comes of it: the options, the plan, and the record of every stage."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import nn

from .depth import Depth
from .errors import InputError, SystemStateError
from .lengths import Lengths
from .masking import OutputWeights
from .search import Minimum
from .surgery import Surgery
from .units import SlicePlan, Units

REFIT_NEURON_SHARE = 1 / 16  # of a layer's neurons or channels, kept at least when the refit follows
REFITS = ("refit", "refit-parallel", "refit-cut")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Options:
    """Choose how to prune; the defaults are the recommended ones.

    Left open, `criterion`, `rearrange` and `min_neurons` follow the compensation. With the refit: "obs", no
    rearrangement, at least a sixteenth of each layer's neurons. Otherwise the paper's own: "fisher", "sample"
    and 1. Measured in docs/results.md: Fisher and rearrangement pick units for a model that is not refitted.
    `depth` says how many whole layers and sub-layers go before the search; `left_out` names groups that go in any case.
    """

    criterion: str = "auto"
    rearrange: Literal["auto", "sample", "batch", "none"] = "auto"
    compensate: str = "refit"
    label_free: bool = False
    min_heads: int = 1
    min_neurons: int | None = None
    align: int = 1
    search: Literal["exact", "paper"] = "exact"
    scope: Literal["global", "local"] = "global"
    steps: int = 1
    seed: int = 0
    forward_dtype: str = "fp32"
    cache_gb: float = 16.0
    depth: Depth = field(default_factory=Depth)
    left_out: tuple[str, ...] = ()

    def resolved(self, groups: Sequence[Units]) -> Options:
        """Return the options with nothing left open."""
        refit = self.compensate in REFITS
        widest = max((g.size for g in groups if g.kind == "neuron"), default=1)
        least = max(1, round(REFIT_NEURON_SHARE * widest)) if refit else 1
        return replace(
            self,
            criterion=("obs" if refit else "fisher") if self.criterion == "auto" else self.criterion,
            rearrange=("none" if refit else "sample") if self.rearrange == "auto" else self.rearrange,
            min_neurons=least if self.min_neurons is None else self.min_neurons,
        )

    @property
    def cache_bytes(self) -> int:
        return int(1e9 * self.cache_gb)

    @property
    def minimum(self) -> Minimum:
        neurons = 1 if self.min_neurons is None else self.min_neurons
        channels = REFIT_NEURON_SHARE if self.compensate in REFITS else 0.0
        return Minimum(self.min_heads, neurons, self.align, frozenset(self.left_out), channels)


@dataclass
class PrunedPlan:
    """Hold what pruning decided: the plan, the refitted output projections, and the record of each stage."""

    plan: SlicePlan
    surgery: Surgery
    lengths: Lengths  # that the budget holds at
    limits: list[dict[str, Any]] = field(default_factory=list)
    updates: dict[str, OutputWeights] = field(default_factory=dict)
    stages: list[dict[str, Any]] = field(default_factory=list)
    sliced: nn.Module | None = None

    @property
    def seq_len(self) -> int:
        """Return the length that stands for all: the budget's, or the data's mean, in tokens."""
        return self.lengths.seq_len

    @property
    def groups(self) -> tuple[Any, ...]:
        """Return what could be cut: `UnitGroup`s or `ChannelGroup`s."""
        return self.surgery.groups

    def slice(self) -> nn.Module:
        """Return the sliced and compensated model."""
        return self.surgery.slice(self.plan, self.updates) if self.sliced is None else self.sliced

    @property
    def hash(self) -> str:
        return self.plan.hash


class Recorder:
    """Time the stages of a run and note the device's peak memory."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.records: list[dict[str, Any]] = []

    @contextmanager
    def stage(self, name: str) -> Iterator[dict[str, Any]]:
        cuda = self.device.type == "cuda"
        if cuda:
            torch.cuda.reset_peak_memory_stats(self.device)
        record: dict[str, Any] = {"name": name, "seconds": 0.0}
        started = time.perf_counter()
        try:
            yield record
        except torch.cuda.OutOfMemoryError as error:
            raise SystemStateError(
                f"Out of device memory in the stage '{name}'.", hint="Use fewer --samples, or --device cpu."
            ) from error
        except (MemoryError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and "can't allocate memory" not in str(error):  # torch's, on the CPU
                raise
            raise SystemStateError(
                f"Out of memory in the stage '{name}'.", hint="Use fewer --samples, or a machine with more memory."
            ) from error
        if cuda:
            torch.cuda.synchronize(self.device)
            record["device_peak_bytes"] = int(torch.cuda.max_memory_allocated(self.device))
        record["seconds"] = round(time.perf_counter() - started, 3)
        self.records.append(record)

    def repeat(self, record: dict[str, Any]) -> None:
        """Record a stage whose result is used again."""
        self.records.append({**record, "reused": True})

    def skip(self, name: str, reason: str) -> None:
        """Record that a stage did not run, and why."""
        self.records.append({"name": name, "seconds": 0.0, "skipped": reason})


def resolve_device(name: str) -> torch.device:
    """Return the torch device for auto, cpu, cuda or cuda:N.

    Raises InputError for another word, SystemStateError for a device that is not there.
    """
    if name in ("auto", "cuda") and torch.cuda.is_available():  # of a team each process has a GPU of its own
        name = f"cuda:{os.environ['LOCAL_RANK']}" if "LOCAL_RANK" in os.environ else "cuda"
    elif name == "auto":
        name = "cpu"
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError
    except RuntimeError as error:
        raise InputError(f"Unknown device '{name}'.", hint="Use auto, cpu, cuda or cuda:N.") from error
    count = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        raise SystemStateError(
            f"No device {name}: torch {torch.__version__} sees {count} CUDA device(s).",
            hint="Use --device cpu, or install a CUDA build of torch and a driver.",
        )
    return device
