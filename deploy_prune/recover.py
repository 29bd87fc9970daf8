"""Recovery: the pruned model is trained to follow the dense one, and kept where that helps on rows it never saw."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from . import parallel
from .archs import is_convolutional
from .batches import Batch, Batches
from .calibration import hash_rows
from .checkpoint import quiet_transformers
from .config import Augment, Recipe
from .disk import disk_errors, sha256_file, write_atomically
from .distil import EVALUATIONS, Distillation, DistilTrainer, Feed, Weights, shared_states
from .errors import InputError
from .heads import Head
from .progress import Progress
from .resume import check_same, hash_state
from .tasks.base import Row

MOST_ROWS = 16_384  # training rows that are used where no number is given
LEAST_ROWS = 64
HELD_OUT = 0.1  # share of the rows that judge, at most
MOST_HELD_OUT = 1024
TRIAL_STEPS = 5  # timed to see how many steps a number of minutes allows
BUSY = 0.95  # share of the minutes that is planned: checkpoints take time too
STATE, RESULT = "recovery.json", "recovered.safetensors"
LAST = "trainer_state.json"  # of a checkpoint's files the last that is written


@dataclass(frozen=True)
class Recovery:
    """Say how long to distil and how; one of `epochs` and `minutes` is needed, and what ends first counts.

    An epoch is one pass over the rows that are not held out. How many steps fit into `minutes` is measured once at
    the start; the record says how many epochs that were, which gives the same weights again.
    """

    epochs: float | None = None
    minutes: float | None = None
    lr: float = 1e-5
    batch_rows: int = 32
    weights: Weights = field(default_factory=Weights)
    augment: Augment = "none"  # of images alone
    seed: int = 0

    @classmethod
    def of(cls, recipe: Recipe) -> Recovery:
        """Return the settings of a recipe that switches recovery on."""
        return cls(
            epochs=recipe.recover_epochs,
            minutes=recipe.recover_minutes,
            lr=recipe.recover_lr,
            batch_rows=recipe.recover_batch,
            weights=Weights(labels=recipe.recover_label_share),
            augment=recipe.recover_augment,
            seed=recipe.seed,
        )

    def __post_init__(self) -> None:
        given = {"epochs": self.epochs, "minutes": self.minutes, "lr": self.lr, "batch_rows": self.batch_rows}
        for name, value in given.items():
            if value is not None and not value > 0:
                raise InputError(f"Recovery's {name} = {value!r} is not a positive number.")
        if self.epochs is None and self.minutes is None:
            raise InputError("Recovery needs a length.", hint="Give epochs or minutes.")
        if not 0 <= self.weights.labels <= 1:
            raise InputError(f"The labels' share {self.weights.labels!r} is not in [0, 1].")


def recover(
    student: nn.Module,
    teacher: nn.Module,
    head: Head,
    rows: Sequence[Row],
    settings: Recovery,
    *,
    pad_id: int = 0,
    folder: Path | None = None,
    progress: Progress = lambda share: None,
) -> dict[str, Any]:
    """Train a sliced student in place to follow the dense teacher on the same device; return the record.

    A part of the rows is held out. The student ends with the weights that did best on it, or with its own where
    none did better ("kept" is false then). Labels are not read unless `settings.weights.labels` is above 0. With
    a `folder` a run that was killed goes on from its last checkpoint when it is called again with the same models,
    rows and settings; the folder is the caller's to remove. The processes of a team take a part of every batch each.

    Raises InputError for too few rows, missing labels, or in a process of a team that has others than the first one;
    LostProcessError when another process has ended.
    Source: Hinton et al. 2015 (outputs); Romero et al. 2014, FitNets (hidden states).
    """
    if len(rows) < LEAST_ROWS:
        raise InputError(f"{len(rows)} rows are too few to recover on.", hint=f"Give at least {LEAST_ROWS}.")
    if settings.weights.labels and any(row.label is None for row in rows):
        raise InputError("Labels have a share in recovery's loss, but some rows have none.", hint="Leave it out.")
    _follow_first(student)  # another processor's may differ in their last bits, and the scratch folder's key with them
    train, held = hold_out(rows, settings.seed)
    own = {name: tensor.detach().cpu().clone() for name, tensor in student.state_dict().items()}
    with ExitStack() as stack:
        if folder is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="deploy-prune-recover-")))
        stack.enter_context(disk_errors(folder))
        scratch = Scratch(folder, agreed_key(own, teacher, rows, settings))
        if not scratch.writes:  # its trainer writes little, and nothing that anybody reads
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="deploy-prune-recover-")))
        if scratch.finished():
            finished = parallel.agree((load_file(folder / RESULT), {}) if scratch.writes else None)
            student.load_state_dict((finished or ({}, {}))[0], strict=True)
            return {**scratch.known["record"], "reused": True}
        stack.enter_context(quiet_transformers())
        stack.enter_context(_trainable(student))
        device = next(student.parameters()).device
        judges = [batch.to(device) for batch in Batches(held, head, pad_id)]
        own_states = not is_convolutional(student)  # of transformers, whose models give them
        states = None if own_states else shared_states(student, teacher.eval(), head, judges[0].inputs)
        model = Distillation(student, teacher.eval(), head, settings.weights, states)
        feed = Feed(train, head, pad_id, settings.batch_rows, settings.seed, settings.augment)
        if "steps" not in scratch.known:
            scratch.note(**parallel.agree_values(_plan(model, feed, judges, settings)))
        trainer = DistilTrainer(
            model,
            feed,
            scratch.known["steps"],
            judges,
            lr=settings.lr,
            seed=settings.seed,
            folder=folder,
            progress=progress,
        )
        checkpoint = scratch.last_checkpoint(folder)
        before = trainer.judge()
        with parallel.connected():  # the trainer itself exchanges the gradients
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        _follow_first(student)  # which has the best checkpoint on its disk
        after = trainer.judge()
        kept = after < before
        if not kept:
            student.load_state_dict(own, strict=True)
        done = trainer.state.global_step
        record = {
            "kept": kept,
            "loss_before": before,
            "loss_after": after if math.isfinite(after) else None,
            "rows": len(train),
            "held_out": len(held),
            "epochs": done / feed.per_epoch,
            "steps": done,
            "planned_steps": scratch.known["steps"],
            "best_step": trainer.state.best_global_step,
            "resumed": checkpoint is not None,
            **({} if states is None else {"states": states}),
            "precision": {torch.float32: "fp32", torch.bfloat16: "bf16"}[model.dtype],
            **{name: value for name, value in asdict(settings).items() if name not in ("epochs", "minutes")},
        }
        scratch.finish(student, record)
    student.eval()
    return record


class Scratch:
    """Keep a run's state in a folder, so that it can go on; what another run left there is removed.

    Of a team the first process writes and reads it, and the others, on whose machine it may not be, know what it knows.
    """

    def __init__(self, folder: Path, key: str) -> None:
        self.folder, self.writes = folder, parallel.rank() == 0
        self.known: dict[str, Any] = {}
        if self.writes:
            folder.mkdir(parents=True, exist_ok=True)
            with suppress(OSError, ValueError):
                self.known = json.loads((folder / STATE).read_text("utf-8"))
            if self.known.get("key") != key:
                self._clear()
                self.known = {}
                self.note(key=key)
        self.known = parallel.agree_values(self.known)

    def note(self, **values: Any) -> None:
        """Remember values."""
        self.known |= values
        if self.writes:
            write_atomically(self.folder / STATE, json.dumps(self.known) + "\n")

    def finished(self) -> bool:
        """Say whether a run has ended and its result is whole."""
        path = self.folder / RESULT
        whole = self.writes and path.is_file() and sha256_file(path) == self.known.get("sha256")
        return bool(parallel.agree_values({"whole": whole and "record" in self.known})["whole"])

    def last_checkpoint(self, copies: Path) -> Path | None:
        """Return the newest complete checkpoint; half-written ones are removed.

        Where a process does not find the first one's, it gets a copy below `copies`.
        """
        newest = self._newest() if self.writes else None
        told = parallel.agree_values({"name": newest.name, "state": sha256_file(newest / LAST)} if newest else {})
        if not told:
            return None
        path = self.folder / told["name"]
        if parallel.least((path / LAST).is_file() and sha256_file(path / LAST) == told["state"]):
            return path
        return _handed_out(path, path if self.writes else copies / path.name)

    def _newest(self) -> Path | None:
        found = []
        for path in self.folder.glob("checkpoint-*"):
            try:
                found.append((json.loads((path / LAST).read_text("utf-8"))["global_step"], path))
            except (OSError, ValueError, KeyError):
                shutil.rmtree(path)
        return max(found)[1] if found else None

    def finish(self, student: nn.Module, record: Mapping[str, Any]) -> None:
        """Keep the result in the checkpoints' place."""
        if not self.writes:
            return
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in student.state_dict().items()}
        save_file(state, self.folder / RESULT)
        self.note(record=record, sha256=sha256_file(self.folder / RESULT))
        self._clear(keep=(STATE, RESULT))

    def _clear(self, keep: Sequence[str] = ()) -> None:
        if not self.writes:
            return
        for path in self.folder.glob("checkpoint-*"):
            shutil.rmtree(path)
        for name in {STATE, RESULT} - set(keep):
            (self.folder / name).unlink(missing_ok=True)


def _handed_out(source: Path, copy: Path) -> Path:
    """Give every process the files of a folder that the first one has; return where they lie in this one."""
    writes = parallel.rank() == 0
    files = sorted(p.name for p in source.iterdir() if p.is_file()) if writes else []
    if not writes:
        copy.mkdir(parents=True, exist_ok=True)
    for name in parallel.agree_values({"files": files})["files"]:
        content = torch.from_numpy(np.fromfile(source / name, dtype=np.uint8)) if writes else None
        sent = parallel.agree(None if content is None else ({"file": content}, {}))
        if sent is not None and not writes:
            sent[0]["file"].numpy().tofile(copy / name)
    return copy


def _follow_first(student: nn.Module) -> None:
    """Give every process of a team the first one's weights."""
    if parallel.size() > 1 and (kept := parallel.agree((student.state_dict(), {}))) is not None:
        student.load_state_dict(kept[0], strict=True)


def hold_out(rows: Sequence[Row], seed: int) -> tuple[list[Row], list[Row]]:
    """Return the rows to train on, and a tenth of them (at most 1,024), drawn by the seed, that judge."""
    order = np.random.default_rng(seed).permutation(len(rows)).tolist()
    held = min(MOST_HELD_OUT, round(HELD_OUT * len(rows)))
    return [rows[i] for i in order[held:]], [rows[i] for i in order[:held]]


def _plan(model: Distillation, feed: Feed, judges: Sequence[Batch], settings: Recovery) -> dict[str, int]:
    """Return how many steps the settings allow."""
    allowed = []
    if settings.epochs is not None:
        allowed.append(round(settings.epochs * feed.per_epoch))
    if settings.minutes is not None:
        step = _seconds_per_step(model, feed)
        judged = (EVALUATIONS + 3) * len(judges) / 3  # forward alone, of the student; in steps
        allowed.append(int(60 * settings.minutes * BUSY / step - judged))
    return {"steps": max(min(allowed), EVALUATIONS if settings.epochs is None else 1)}


def _seconds_per_step(model: Distillation, feed: Feed) -> float:
    """Time forward and backward passes, after two that warm up."""
    started = 0.0
    for number, step in enumerate(feed.steps(2 + TRIAL_STEPS)):
        if number == 2:
            _wait(model.device)
            started = time.perf_counter()
        model(**_to(feed.collate([step]), model.device))["loss"].backward()
    _wait(model.device)
    model.zero_grad(set_to_none=True)
    return (time.perf_counter() - started) / TRIAL_STEPS


def _to(value: Any, device: torch.device) -> Any:
    if isinstance(value, dict):
        return {k: _to(v, device) for k, v in value.items()}
    return value.to(device) if isinstance(value, Tensor) else value


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def _trainable(model: nn.Module) -> Iterator[None]:
    """Let every parameter learn, also those of stand-ins for empty sub-layers."""
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    model.requires_grad_(True)
    try:
        yield
    finally:
        model.zero_grad(set_to_none=True)
        for name, p in model.named_parameters():
            p.requires_grad_(flags[name])


def agreed_key(own: Mapping[str, Tensor], teacher: nn.Module, rows: Sequence[Row], settings: Recovery) -> str:
    """Return a hash of all that a run depends on.

    Raises InputError in a process of a team that has other rows, settings or models than the first one.
    """
    labels = [np.asarray(row.label).tolist() for row in rows] if settings.weights.labels else None
    parts = {
        "other settings of recovery": asdict(settings),
        "other rows to recover on": [hash_rows(rows), hashlib.sha256(repr(labels).encode()).hexdigest()],
        "another model to recover": [hash_state(own), hash_state(teacher.state_dict())],
    }
    check_same(parts)
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
