"""The experiments by name: what each measures, and how its table and figure look."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from . import quality, speed
from .lab import Lab

QUALITY = ("value", "agreement", "kl", "rmse")


@dataclass(frozen=True)
class Experiment:
    """Name what is measured, the columns that tell cells apart, and those whose means are shown.

    `figure` names x, y and the column with a line for each value.
    """

    title: str
    run: Callable[[Lab], Iterator[dict[str, Any]]]
    by: tuple[str, ...]
    columns: tuple[str, ...]
    figure: tuple[str, str, str] | None = None
    convolutional: bool | None = False  # of channels, not of heads and neurons; None: of either


# What tells of a convolutional network what an experiment of heads and neurons tells.
FOR_CHANNELS = {
    "recover": "deploy-prune prune MODEL --recover-epochs 3 recovers, and its manifest has the quality",
    "latency": "deploy-prune probe, then prune --keep-latency --lut, then bench",
    "rival": "deploy-prune bench, on a bundle of each model",
}
_SPEED = ("ratio_to_dense", "ratio_low", "ratio_high")
_STAGES = ("calibrate", "score", "search", "rearrange", "compensate", "total")

EXPERIMENTS = {
    "tradeoff": Experiment(
        "Quality over FLOPs kept",
        quality.tradeoff,
        ("keep", "method"),
        (*QUALITY, "seconds"),
        ("keep", "value", "method"),
    ),
    "ablation": Experiment(
        "What each stage adds", quality.ablation, ("keep", "method"), (*QUALITY, "seconds"), ("keep", "kl", "method")
    ),
    "parity": Experiment(
        "Virtual and sliced", quality.parity, ("keep", "method"), ("virtual", "sliced", "difference", "max_abs")
    ),
    "flops": Experiment(
        "FLOPs taken away",
        quality.flops,
        ("keep", "length"),
        ("encoder_reduction", "one_minus_keep", "dense_encoder_gflops", "report_formula_gflops"),
        ("length", "encoder_reduction", "keep"),
    ),
    "structure": Experiment(
        "What to cut, at equal FLOPs",
        speed.structure,
        ("keep", "method"),
        (*QUALITY, "kept_flops", *_SPEED, "infeasible_below"),
        ("ratio_to_dense", "value", "method"),
    ),
    "depth": Experiment(
        "Layers and sub-layers left out, at equal FLOPs",
        speed.depth,
        ("keep", "method"),
        (*QUALITY, "kept_flops", "kept_params", *_SPEED, "infeasible_below"),
        ("ratio_to_dense", "value", "method"),
    ),
    "latency": Experiment(
        "Quality over latency",
        speed.latency,
        ("keep", "method"),
        (*QUALITY, "median_ms", *_SPEED),
        ("ratio_to_dense", "value", "method"),
    ),
    "prediction": Experiment(
        "Latency by the table and measured",
        speed.prediction,
        ("keep",),
        ("predicted", *_SPEED, "relative_error"),
        convolutional=None,
    ),
    "criteria": Experiment("Criteria", quality.choosing, ("keep", "method", "compensate"), QUALITY),
    "samples": Experiment(
        "Calibration samples",
        quality.samples,
        ("keep", "samples", "method"),
        (*QUALITY, "seconds"),
        ("samples", "kl", "method"),
    ),
    "unstructured": Experiment("Unstructured magnitude, run dense", speed.unstructured, ("keep",), (*QUALITY, *_SPEED)),
    "seconds": Experiment("What pruning takes, in seconds", speed.seconds, ("keep", "method"), _STAGES),
    "rival": Experiment(
        "Beside another model of the same latency",
        speed.rival,
        ("method",),
        (*QUALITY, "kept_flops", "median_ms", *_SPEED),
    ),
    "successors": Experiment(
        "What came after the paper", quality.successors, ("keep", "method"), (*QUALITY, "seconds")
    ),
    "vit": Experiment(
        "A vision transformer: FLOPs, stages, samples",
        quality.vision,
        ("part", "keep", "samples", "method"),
        (*QUALITY, "seconds"),
    ),
    "cnn": Experiment(
        "A convolutional network: FLOPs, stages",
        quality.channels,
        ("keep", "method"),
        (*QUALITY, "kept_params", "seconds"),
        ("keep", "value", "method"),
        convolutional=True,
    ),
    "recover": Experiment(
        "Recovery by distillation",
        quality.recovery,
        ("keep", "method", "lr", "augment"),
        (*QUALITY, "held_out_before", "held_out_after", "kept_flops", "kept_params"),
    ),
    "steps": Experiment("One shot and iterative", quality.steps, ("keep", "steps"), (*QUALITY, "seconds")),
}
