"""Read masks that somebody else found: safetensors, npz, or the paper repository's .pt files."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file

from .config import pickle_allowed
from .errors import InputError
from .npz import read_npz
from .units import MaskSet, UnitGroup

KINDS = {"head_mask": "head", "neuron_mask": "neuron"}


def read_masks(paths: Sequence[Path], groups: Sequence[UnitGroup]) -> MaskSet:
    """Return one mask (units,) per group from files keyed by group name or by head_mask / neuron_mask (L, units).

    A folder stands for its head_mask.pt and neuron_mask.pt. A kind of unit that no file names stays whole.
    Raises InputError for files that cannot be read and for values that do not fit the model.
    """
    masks = MaskSet.ones(groups)
    for path in _files(paths):
        for key, value in _read(path).items():
            if key in KINDS:
                layers = [g for g in groups if g.kind == KINDS[key]]
                if len(value) != len(layers):
                    raise InputError(f"{path}: {key} has {len(value)} layers, the model {len(layers)}.")
                for g, row in zip(layers, value, strict=True):
                    masks[g.name] = np.asarray(row, dtype=np.float64)
            elif key in masks:
                masks[key] = np.asarray(value, dtype=np.float64)
            else:
                raise InputError(
                    f"{path}: unknown mask '{key}'.",
                    hint=f"Use head_mask and neuron_mask, or group names: {', '.join(sorted(masks))}.",
                )
    return masks


def _files(paths: Sequence[Path]) -> list[Path]:
    files = []
    for path in paths:
        found = [path / f"{name}.pt" for name in KINDS if (path / f"{name}.pt").is_file()] if path.is_dir() else [path]
        if not found or not all(f.is_file() for f in found):
            raise InputError(
                f"No masks at {path}.", hint="Give a .safetensors, .npz or .pt file, or a folder with head_mask.pt."
            )
        files += found
    return files


def _read(path: Path) -> dict[str, Any]:
    try:
        if path.suffix == ".safetensors":
            return dict(load_file(path))
        if path.suffix == ".npz":
            return dict(read_npz(path))
        if path.suffix in (".pt", ".bin"):
            if not pickle_allowed():
                raise InputError(
                    f"{path} is one of torch's own files, which are pickles.",
                    hint="deploy-prune --allow-pickle reads it by torch's restricted unpickler; .npz needs none.",
                )
            value = torch.load(path, map_location="cpu", weights_only=True)
            if isinstance(value, dict):
                return {str(k): _rows(v) for k, v in value.items()}
            return {path.stem: _rows(value)}
    except (SafetensorError, ValueError, OSError, RuntimeError, zipfile.BadZipFile, pickle.UnpicklingError) as error:
        raise InputError(f"Could not read masks from {path}: {str(error).splitlines()[0]}") from error
    raise InputError(f"{path} is neither .safetensors, .npz nor .pt.")


def _rows(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.double().numpy()
    return [np.asarray(v, dtype=np.float64) for v in value]
