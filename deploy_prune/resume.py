"""What a killed run had finished, kept stage by stage in a hidden folder and read back bit for bit."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .bundle import disk_errors
from .calibration import CalibrationStats
from .compensate.layers import GroupLog, SweepResult
from .criteria.base import Scores
from .masking import OutputWeights

Kept = tuple[dict[str, Tensor], dict[str, Any]]
T = TypeVar("T")


class Resume:
    """Keep the results of one run's stages; what a run of other settings left in the folder is removed.

    `key` stands for everything that the results depend on. Without a folder nothing is kept.
    """

    def __init__(self, folder: Path | None = None, key: Mapping[str, Any] | None = None) -> None:
        self.folder: Path | None = None
        if folder is None:
            return
        digest = hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()
        self.folder, self.root = folder / digest[:32], folder
        with disk_errors(folder):
            if folder.is_dir():
                for other in folder.iterdir():
                    if other != self.folder:
                        shutil.rmtree(other, ignore_errors=True)
            self.folder.mkdir(parents=True, exist_ok=True)

    def stage(
        self,
        name: str,
        record: dict[str, Any],
        compute: Callable[[], T],
        pack: Callable[[T], Kept],
        unpack: Callable[[Kept], T],
    ) -> T:
        """Return what a killed run had computed for a stage, or compute and keep it; `record` says which."""
        path = (
            None
            if self.folder is None
            else self.folder / f"{hashlib.sha256(name.encode()).hexdigest()[:32]}.safetensors"
        )
        if path is not None and (found := _read(path)) is not None:
            record["resumed"] = True
            return unpack(found)
        result = compute()
        if path is not None:
            _write(path, *pack(result))
        return result

    def finish(self) -> None:
        """Remove everything that was kept."""
        if self.folder is not None:
            shutil.rmtree(self.root, ignore_errors=True)


def _write(path: Path, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
    """Write a stage's result so that it is there whole or not at all."""
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    with disk_errors(path):
        try:
            flat = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
            save_file(flat, temporary, metadata={"values": json.dumps(values)})
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def _read(path: Path) -> Kept | None:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file}, json.loads(file.metadata()["values"])
    except (OSError, SafetensorError, ValueError, KeyError, TypeError):
        return None


_FIELDS = ("gradients", "saliency", "activation_squares", "gradient_moments")


def pack_stats(stats: CalibrationStats) -> Kept:
    """Return calibration's statistics as tensors by name, and plain values."""
    tensors = {f"{field}/{name}": t for field in _FIELDS for name, t in getattr(stats, field).items()}
    tensors |= {"tokens": stats.tokens, "mean_loss": stats.mean_loss}
    return tensors, {n: getattr(stats, n) for n in ("mean_length", "sample_hash", "label_free")}


def unpack_stats(kept: Kept, device: torch.device) -> CalibrationStats:
    """Return calibration's statistics on a device."""
    tensors = {name: t.to(device) for name, t in kept[0].items()}
    parts: dict[str, Any] = {field: {} for field in _FIELDS}
    for name, tensor in tensors.items():
        field, slash, group = name.partition("/")
        if slash:
            parts[field][group] = tensor
    return CalibrationStats(**parts, tokens=tensors["tokens"], mean_loss=tensors["mean_loss"], **kept[1])


def pack_scores(scores: Scores) -> Kept:
    """Return scores as tensors by group."""
    return {name: torch.from_numpy(array) for name, array in scores.items()}, {}


def unpack_scores(kept: Kept) -> Scores:
    """Return scores by group."""
    return {name: tensor.numpy() for name, tensor in kept[0].items()}


def pack_sweep(swept: SweepResult) -> Kept:
    """Return a sweep's projections and scales as tensors by name, and its log."""
    tensors = {f"{part}/{name}": getattr(u, part) for name, u in swept.updates.items() for part in ("weight", "bias")}
    tensors |= {f"scales/{name}": t for name, t in swept.scales.items()}
    return tensors, {"log": [vars(entry) for entry in swept.log], "state_bytes": swept.state_bytes}


def unpack_sweep(kept: Kept, device: torch.device) -> SweepResult:
    """Return a sweep's result on a device."""
    tensors, values = kept
    by_part: dict[str, dict[str, Tensor]] = {"weight": {}, "bias": {}, "scales": {}}
    for name, tensor in tensors.items():
        part, _, group = name.partition("/")
        by_part[part][group] = tensor.to(device)
    updates = {name: OutputWeights(w, by_part["bias"][name]) for name, w in by_part["weight"].items()}
    log = [GroupLog(**entry) for entry in values["log"]]
    return SweepResult(updates, by_part["scales"], log, values["state_bytes"])
