"""What a killed run had finished, kept stage by stage in a hidden folder and read back bit for bit."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import platform
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from . import parallel
from .archs import config_of
from .config import Recipe
from .costs import Budget
from .disk import code_hash, real_path, sha256_file
from .errors import DeployPruneError, InputError, LostProcessError
from .heads import Head
from .stages import Options
from .tasks.base import Row

FORMAT = 1  # raised when the same stage is laid out in another way
FREE_SHARE = 4  # a result is kept where it takes at most this part of the free disk: the bundle needs room too
HALF = "bundle"  # what a killed run had exported: each file has a key of its own, whatever the run's
SHARED = {  # beside the recipe what a team's processes must have, as messages call it; processors, threads may differ
    "code": "another deploy-prune",
    "versions": "another Python, torch, transformers or the like",
    "model": "another model",
    "rows": "other calibration rows",
    "budget": "another budget",  # its latency table, which a recipe names by its path
}
OWN = (
    "model",
    "data",
    "lut",
    "out",
    "device",
)  # of a recipe: what each machine may name otherwise
Kept = tuple[dict[str, Tensor], dict[str, Any]]  # tensors by name, and plain values
T = TypeVar("T")


def resume_folder(destination: Path) -> Path:
    """Return where the results of runs that were killed lie: hidden, beside the bundle."""
    whole = real_path(destination)
    return whole.with_name(f".{whole.name}.resume")


class Resume:
    """Keep the results of one run's stages while it runs; another run of the same key reads them.

    `key` stands for everything that the results depend on. The context's end removes all that lies in `root` when the
    run ended well, and what this run kept when it ended with an error that its user has to mend first. Whatever else
    ends it (a kill, Ctrl-C, a crash) leaves everything. Without a folder nothing is kept.
    """

    def __init__(
        self,
        root: Path | None = None,
        key: Mapping[str, Any] | None = None,
        note: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.root, self.note = root, note
        self.key = _hash(json.dumps({"format": FORMAT, **(key or {})}, sort_keys=True))
        self.folder = None if root is None else root / self.key[:32]

    def __enter__(self) -> Resume:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.root is None or self.folder is None:
            return
        if error is None:
            shutil.rmtree(self.root, ignore_errors=True)
        elif isinstance(error, DeployPruneError) and not isinstance(error, LostProcessError):
            for path in (self.folder, self.root / HALF):
                shutil.rmtree(path, ignore_errors=True)
            if self.root.is_dir() and not any(self.root.iterdir()):
                self.root.rmdir()

    def stage(
        self,
        name: str,
        of: Any,
        record: dict[str, Any],
        compute: Callable[[], T],
        pack: Callable[[T], Kept],
        unpack: Callable[[Kept], T],
    ) -> T:
        """Return what a killed run had computed for a stage, or compute and keep it; the record says which.

        `of` (plain values) tells the stage from others of that name in the same run. Of a team the first process keeps
        and reads, and hands on what it read.
        """
        stage = json.dumps([name, of])
        found = None if self.folder is None else self._read(stage)
        if (found := parallel.agree(found)) is not None:
            record["resumed"] = True
            self.note(f"Resumed: {name}")
            return unpack(found)
        result = compute()
        if self.folder is None:
            return result
        try:
            self._write(stage, name, *pack(result))
        except (OSError, SafetensorError) as error:  # what is kept is a help, and never the reason for a failure
            self.note(f"The result of '{name}' is not kept for a later run: {error}")
        return result

    def _write(self, stage: str, name: str, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Write a stage's result, whole or not at all, under a name that holds its hash."""
        assert self.folder is not None
        flat = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        size, free = sum(t.nbytes for t in flat.values()), shutil.disk_usage(self.folder).free
        if FREE_SHARE * size > free:
            self.note(f"The result of '{name}' ({size / 1e9:.2f} GB) is not kept: {free / 1e9:.2f} GB are free.")
            return
        temporary = self.folder / "half.tmp"
        try:
            save_file(flat, temporary, metadata={"key": self.key, "stage": stage, "values": json.dumps(values)})
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, self.folder / f"{_hash(stage)[:32]}-{sha256_file(temporary)}.safetensors")
        finally:
            temporary.unlink(missing_ok=True)

    def _read(self, stage: str) -> Kept | None:
        """Return a stage's result from a file of the right hash, key and stage, or None."""
        assert self.folder is not None
        for path in sorted(self.folder.glob(f"{_hash(stage)[:32]}-*.safetensors")):
            try:
                if sha256_file(path) != path.stem.partition("-")[2]:
                    continue
                with safe_open(path, framework="pt") as file:
                    said = file.metadata()
                    if said["key"] == self.key and said["stage"] == stage:
                        names = file.keys()
                        return {name: file.get_tensor(name) for name in names}, json.loads(said["values"])
            except (OSError, SafetensorError, ValueError, KeyError, TypeError):
                continue
        return None


def run_key(
    model: nn.Module,
    head: Head,
    rows: Sequence[Row],
    budget: Budget,
    options: Options,
    versions: Mapping[str, str],
    **more: Any,
) -> dict[str, Any]:
    """Return all that the results of a run's stages depend on, to the last bit."""
    device = next(model.parameters()).device
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    lut = None if budget.lut is None else budget.lut.model_dump(mode="json")
    return {
        "code": code_hash(),
        "versions": {**versions, "python": platform.python_version()},
        "machine": [platform.system(), platform.machine(), torch.backends.cpu.get_cpu_capability(), str(device), gpu],
        "threads": torch.get_num_threads(),
        "model": [repr(config_of(model)), repr(model), hash_state(model.state_dict()), _hash_classes(model)],
        "head": asdict(head),
        "rows": hash_inputs(rows),
        "budget": {**{name: value for name, value in vars(budget).items() if name != "lut"}, "lut": lut},
        "options": asdict(options),
        **more,
    }


def agreed(key: Mapping[str, Any], recipe: Recipe) -> Mapping[str, Any]:
    """Return a run's key, if all processes of a team have the same recipe, model, rows and code.

    Raises InputError in a process that has others than the first one.
    """
    flags = recipe.model_dump(mode="json", exclude=set(OWN))
    check_same(
        {f"another --{name.replace('_', '-')}": value for name, value in flags.items()}
        | {what: key[name] for name, what in SHARED.items()}
    )
    return key


def check_same(values: Mapping[str, Any]) -> None:
    """Hold plain values, by what a message calls others, against those of the first process of a team.

    Raises InputError in a process that has others, which ends them all.
    """
    mine = {what: json.dumps(value, sort_keys=True) for what, value in values.items()}
    first = parallel.agree_values(mine)
    with parallel.first_ahead():
        for what, value in mine.items():
            if value != first.get(what):
                raise InputError(
                    f"{parallel.place()} has {what} than the first process.",
                    hint="Every machine needs the same packages, model, data and arguments (docs/scale.md).",
                )


def hash_inputs(rows: Sequence[Row]) -> str:
    """Return the SHA-256 of all that a model sees of the rows, and of their labels, in order."""
    digest = hashlib.sha256()
    for row in rows:
        for name in sorted(row.features):
            array = np.ascontiguousarray(row.features[name])
            digest.update(f"{name} {array.dtype.str} {array.shape} ".encode())
            digest.update(array.data)
        digest.update(repr(np.asarray(row.label).tolist()).encode())
    return digest.hexdigest()


def hash_state(state: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of named tensors: names, types, shapes and bytes."""
    digest = hashlib.sha256()
    for name, tensor in state.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _hash_files(paths: Any) -> str:
    return _hash(" ".join(sha256_file(path) for path in sorted(paths)))


def _source_of(kind: type) -> Path | None:
    try:
        return Path(inspect.getsourcefile(kind) or "")
    except (OSError, TypeError):
        return None


def _hash_classes(model: nn.Module) -> str:
    """Return the hash of the files that define the model's classes, which may be the user's own."""
    files = {_source_of(kind) for kind in {type(module) for module in model.modules()}}
    return _hash_files(path for path in files if path is not None and path.is_file())
