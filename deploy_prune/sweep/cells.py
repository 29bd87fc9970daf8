"""The cells of a sweep, the jobs that compute them, and what a worker is told. No torch."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

from ..config import ALLOW_CODE, ALLOW_PICKLE
from .settings import SweepSettings


@dataclass(frozen=True)
class Cell:
    """Name one model to be pruned in one way; `number` is its place in the table, `entry` that of its model."""

    number: int
    entry: int
    seed: int
    keep: float
    criterion: str
    compensate: str


@dataclass(frozen=True)
class Job:
    """Hold the cells of one model, task and seed: they share the calibration, so one worker computes them."""

    entry: int
    seed: int
    cells: tuple[Cell, ...]


def expand(settings: SweepSettings) -> list[Cell]:
    """Return every cell in the order of the table."""
    axes = (range(len(settings.entries)), settings.seeds, settings.keeps, settings.criteria, settings.compensate)
    return [Cell(number, *values) for number, values in enumerate(product(*axes))]


def jobs_of(cells: Sequence[Cell]) -> list[Job]:
    """Return the cells of each model, task and seed together."""
    found: dict[tuple[int, int], list[Cell]] = {}
    for cell in cells:
        found.setdefault((cell.entry, cell.seed), []).append(cell)
    return [Job(entry, seed, tuple(own)) for (entry, seed), own in found.items()]


def job_spec(
    job: Job, settings: SweepSettings, known: Collection[str], models: Collection[str], code: str
) -> dict[str, Any]:
    """Return all that a worker needs for a job, as plain values.

    `known` are the keys of cells and `models` the names of files that the driver has; `code` the hash of its sources.
    """
    return {
        "settings": settings.model_dump(mode="json"),
        "entry": settings.entries[job.entry].located().model_dump(mode="json"),
        "seed": job.seed,
        "cells": [asdict(cell) for cell in job.cells],
        "known": sorted(known),
        "models": sorted(models),
        "code": code,
        "environment": {name: os.environ.get(name) for name in (ALLOW_CODE, ALLOW_PICKLE)},
    }


def files_name(key: str, settings: SweepSettings) -> str:
    """Return what models/ calls a model's files, which are made for the runtimes that measure them."""
    return digest([key, sorted(settings.bench_runtimes)])


def digest(value: Any) -> str:
    """Return the SHA-256 of plain values."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
