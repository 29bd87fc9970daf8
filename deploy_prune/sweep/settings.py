"""What a sweep varies, as its recipe says it. No torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from ..config import DEMO_MODELS, MIN_SAMPLES


def _field(default: Any, description: str, **limits: Any) -> Any:
    return Field(default=default, description=description, **limits)


class Entry(BaseModel):
    """Name one model on one task; what is left out is found as `deploy-prune run` finds it."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    model: str = Field(description="Hub id or folder of a fine-tuned checkpoint, 'demo' or 'digits-vit'.")
    name: str | None = _field(None, "What the tables call it (default: the last part of the id or folder).")
    task: str | None = _field(None, "Task name.")
    data: str | None = _field(None, "File or folder with the task's data; by default from the hub.")
    text_column: str | None = _field(None, "Text column, or two separated by a comma.")
    label_column: str | None = _field(None, "Label column.")
    max_length: int | None = _field(None, "Truncate rows to this many tokens.", ge=8)
    label_free: bool | None = _field(None, "Draw labels from the model (default: where data has none).")
    samples: int | None = _field(None, "Training rows to calibrate on (default: the sweep's).", ge=MIN_SAMPLES)
    seq_len: int | None = _field(None, "Budget's length in tokens (default: mean of the samples).", ge=1)
    lut: str | None = _field(None, "Latency table of this model, for budgets of latency.")

    @property
    def label(self) -> str:
        """Return what the tables call the model."""
        return self.name or Path(self.model).name or self.model

    def located(self) -> Entry:
        """Return the entry with whole paths in place of those that begin in the working directory."""
        update = {"name": self.label}
        for name in ("model", "data", "lut"):
            path = getattr(self, name)
            if path is not None and path not in DEMO_MODELS and Path(path).exists():
                update[name] = str(Path(path).resolve())
        return self.model_copy(update=update)


class SweepSettings(BaseModel):
    """Say which cells a sweep has, and how each is computed and measured; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    entries: tuple[Entry, ...] = Field(min_length=1, description="Models on tasks, each a table [[entries]].")
    keeps: tuple[float, ...] = _field((0.5,), "Shares to keep, in (0, 1].")
    budget: Literal["flops", "params", "latency"] = _field(
        "flops", "What they are shares of; latency needs a lut in each entry."
    )
    seeds: tuple[int, ...] = _field((0,), "Seeds of the calibration samples.")
    criteria: tuple[str, ...] = _field(("auto",), "Criteria.")
    compensate: tuple[str, ...] = _field(("refit",), "Compensations, each with every criterion.")
    search: Literal["exact", "paper"] = _field("exact", "exact, or the paper's greedy search.")
    scope: Literal["global", "local"] = _field("global", "Units compete in the whole model, or in each layer.")
    align: int = _field(1, "Keep widths that are multiples of this.", ge=1)
    min_heads: int = _field(1, "Heads that every layer keeps at least.", ge=0)
    min_neurons: int | None = _field(None, "Neurons that every layer keeps at least (default: as in run).", ge=0)
    samples: int | None = _field(None, "Training rows to calibrate on (default: as in run).", ge=MIN_SAMPLES)
    forward_dtype: Literal["fp32", "bf16", "fp16"] = _field("fp32", "Precision of calibration's forward.")
    cache_gb: float = _field(16.0, "GB of hidden states that each worker may keep.", gt=0)

    device: Literal["cpu", "cuda"] = _field("cpu", "cuda: every job has a GPU of its own.")
    threads: int = _field(1, "Threads of each job; results may depend on it to rounding.", ge=1)
    max_retries: int = _field(2, "How often a cell is tried again when its worker dies.", ge=0)

    bench_runtimes: tuple[str, ...] = _field((), "Runtimes to measure each cell's model in, beside the dense one.")
    bench_batch: int = _field(1, "Batch size there.", ge=1)
    bench_seq: int | None = _field(None, "Length there (default: the budget's).", ge=1)
    bench_threads: int | None = _field(None, "Threads there (default: the physical cores).", ge=1)
    bench_seconds: float = _field(2.0, "Seconds of turns for each of the two models.", gt=0)
    bench_on: tuple[str, ...] = _field((), "Labels of nodes (Ray resources) to measure on (default: this machine).")

    @field_validator("keeps", "seeds", "criteria", "compensate", "bench_runtimes", "bench_on")
    @classmethod
    def _each_once(cls, value: tuple[Any, ...]) -> tuple[Any, ...]:
        if twice := [v for v in value if value.count(v) > 1]:
            raise ValueError(f"{twice[0]!r} is named twice")
        return value

    @field_validator("keeps", "seeds", "criteria", "compensate")
    @classmethod
    def _something(cls, value: tuple[Any, ...]) -> tuple[Any, ...]:
        if not value:
            raise ValueError("an empty list leaves no cell")
        return value

    @field_validator("keeps")
    @classmethod
    def _shares(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if wrong := [keep for keep in value if not 0 < keep <= 1]:
            raise ValueError(f"{wrong[0]:g} is not a share in (0, 1]")
        return value

    @field_validator("seeds")
    @classmethod
    def _natural(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if wrong := [seed for seed in value if seed < 0]:
            raise ValueError(f"{wrong[0]} is less than 0")
        return value

    @model_validator(mode="after")
    def _fits_together(self) -> SweepSettings:
        names = [(e.label, e.task) for e in self.entries]
        if twice := [label for label, task in names if names.count((label, task)) > 1]:
            raise ValueError(f"two entries are called '{twice[0]}' on one task; give each a name")
        for entry in self.entries:
            if self.budget == "latency" and entry.lut is None:
                raise ValueError(f"{entry.label} needs a latency table (lut); deploy-prune probe makes one")
            if self.budget != "latency" and entry.lut is not None:
                raise ValueError(f"{entry.label} has a latency table (lut), but the budget is of {self.budget}")
        if self.bench_on and not self.bench_runtimes:
            raise ValueError("bench_on says where to measure, but bench_runtimes names no runtime")
        return self

    @property
    def places(self) -> tuple[str | None, ...]:
        """Return where models are measured: labels of nodes, or None for this machine."""
        return self.bench_on or (None,)
