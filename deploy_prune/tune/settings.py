"""What `tune` is asked for. No torch here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, field_validator, model_validator

from ..config import Recipe


def _field(default: Any, description: str, **limits: Any) -> Any:
    return Field(default=default, description=description, **limits)


class TuneSettings(BaseModel):
    """Say which latency and quality are wanted, where, and what may be chosen; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    task: str | None = _field(None, "Task name (default: inferred).")
    data: str | None = _field(None, "File or folder with the task's data; its evaluation rows must be labelled.")
    max_length: int | None = _field(None, "Truncate rows to this many tokens.", ge=1)
    text_column: str | None = _field(None, "Column of the text.")
    label_column: str | None = _field(None, "Column of the label.")
    label_free: bool | None = _field(None, "Calibrate on labels drawn from the model.")

    target_latency_ms: float | None = _field(
        None, "Median latency that the upper end of the measured interval must keep.", gt=0
    )
    max_quality_loss: float = _field(1.0, "Points of quality (0.01) that may be lost against the dense model.", ge=0)
    runtimes: tuple[str, ...] = _field(("ort-cpu",), "Runtimes to choose from, separated by commas.")
    batch: int = _field(1, "Batch size of the latency.", ge=1)
    seq_len: int | None = _field(None, "Its length in tokens (default: mean of the samples).", ge=1)
    threads: int | None = _field(None, "Its threads (default: the physical cores).", ge=1)
    lut: str | None = _field(None, "Latency table of this model (default: probed first).")

    precisions: tuple[str, ...] = _field(("fp32", "int8"), "Precisions to choose from: fp32, fp16, bf16, int8.")
    dialects: tuple[str, ...] = _field(("opset23", "mha"), "Dialects of ONNX to choose from: opset18, opset23, mha.")
    schemes: tuple[str, ...] = _field(("dynamic", "qdq"), "Schemes of int8 to choose from: dynamic, qdq.")
    aligns: tuple[PositiveInt, ...] = _field((1, 8, 16, 32), "Multiples of which widths may be.")
    min_keep: float = _field(0.1, "Smallest share of FLOPs to try.", gt=0, le=1)
    slack: float = _field(0.25, "What the table says to be farther off the target than this share is not made.", gt=0)

    trials: int = _field(24, "Candidates to make and measure.", ge=1)
    minutes: float | None = _field(None, "Start no further candidate after so many minutes.", gt=0)
    seconds: float = _field(4.0, "Time for each measurement, the dense model beside the candidate, in seconds.", gt=0)
    probe_widths: int = _field(4, "FFN widths of the table, where it is probed first.", ge=1)
    probe_seconds: float = _field(1.0, "Seconds per point of that probe.", gt=0)

    samples: int = _field(2048, "Training rows to calibrate on, once for all candidates.")
    seed: int = _field(0, "Seed of the draw, and of the optimiser.", ge=0)
    device: str = _field("auto", "auto, cpu, cuda or cuda:N; where candidates are pruned.")
    compensate: str = _field("refit", "How what is left is fitted anew.")
    out: str | None = _field(None, "Folder of the winner's bundle; the trials lie beside it, in OUT.tune.")

    @field_validator("runtimes", "precisions", "dialects", "schemes", "aligns")
    @classmethod
    def _something(cls, value: tuple[Any, ...]) -> tuple[Any, ...]:
        if not value:
            raise ValueError("an empty list leaves nothing to choose from")
        return tuple(dict.fromkeys(value))

    @model_validator(mode="after")
    def _a_target(self) -> TuneSettings:
        if self.target_latency_ms is None:
            raise ValueError("name the latency to reach: --target-latency-ms 5")
        return self

    @property
    def target_ms(self) -> float:
        """Return the latency to reach."""
        assert self.target_latency_ms is not None
        return self.target_latency_ms

    def recipe(self, model: str, **more: Any) -> Recipe:
        """Return the recipe of a run on the same model, task and rows."""
        same = {name: getattr(self, name) for name in self.model_fields_set & set(Recipe.model_fields) - {"lut"}}
        kept = {name: value for name, value in same.items() if name not in _OF_EXPORT}
        return Recipe(**{"model": model, **kept, **more})

    def destination(self, model: str, task: str) -> Path:
        """Return the winner's folder: `out`, or bundles/<model>-<task>-tuned."""
        return Path(self.out) if self.out else Path("bundles") / f"{Path(model).name or 'model'}-{task}-tuned"


# Shared with a recipe by name, but chosen by the search.
_OF_EXPORT = frozenset({"runtimes", "precisions", "dialects", "schemes", "max_quality_loss"})
