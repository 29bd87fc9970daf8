"""Train one model to follow another, by its outputs and its hidden states, with the Trainer of transformers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import ExportableState

from . import parallel
from .batches import Batch, Batches
from .config import Augment
from .heads import Head
from .progress import Progress
from .tasks.base import Row

EVALUATIONS = 10  # of the held-out rows in a run; each is a checkpoint
RISES = 2  # evaluations in a row at which the held-out loss rises, late in a run: it ends
SHIFT = 8  # images are moved by up to this part of their edge
POOL_BATCHES = 50  # batches that are made of like lengths together
WORKERS = 4  # processes that prepare batches for a GPU


@dataclass(frozen=True)
class Weights:
    """Weigh the parts of the loss: softened outputs, hidden states, true labels."""

    temperature: float = 2.0
    hidden: float = 1.0
    labels: float = 0.0  # share of the labels' loss in that of the outputs


class Distillation(nn.Module):
    """Hold the student with its loss towards a frozen teacher. Dropout stays off: it would blur what is followed.

    `states` are the paths of modules whose outputs are the hidden states, for models that do not give their own.
    """

    def __init__(
        self, student: nn.Module, teacher: nn.Module, head: Head, weights: Weights, states: Sequence[str] | None = None
    ) -> None:
        super().__init__()
        self.student, self.head, self.weights, self.states = student, head, weights, states
        self._teacher = [teacher]  # in a list it is no submodule: never trained, moved or saved
        self.device = next(student.parameters()).device
        bf16 = self.device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        self.dtype = torch.bfloat16 if bf16 else torch.float32

    def train(self, mode: bool = True) -> Distillation:
        return super().train(False)

    def forward(
        self, inputs: dict[str, Tensor], mask: Tensor, labels: Tensor | None = None, share: float = 1.0
    ) -> dict[str, Tensor]:
        """Return the mean loss of a batch, on whose inputs (B, T) both models run, times what it counts."""
        return {"loss": share * self._loss(inputs, mask, labels)}

    def _loss(self, inputs: dict[str, Tensor], mask: Tensor, labels: Tensor | None) -> Tensor:
        with self.autocast():
            with torch.no_grad():
                targets, wanted = self._run(self._teacher[0], inputs)
            outputs, found = self._run(self.student, inputs)
        loss = self.outputs_loss(outputs, targets, mask, labels).mean()
        if not found:
            return loss
        missed = torch.stack([unexplained(h, y, mask) for h, y in zip(found, wanted, strict=True)]).mean()
        return loss + self.weights.hidden * missed

    def _run(self, model: nn.Module, inputs: dict[str, Tensor]) -> tuple[dict[str, Tensor], Sequence[Tensor]]:
        """Return a model's outputs, and its hidden states where they are followed."""
        if not self.weights.hidden:
            return self.head.outputs(model, inputs), ()
        if self.states is None:
            found = model(**inputs, output_hidden_states=True)
            return self.head.read(found, inputs), found.hidden_states
        with _watched(model, self.states) as seen:
            outputs = self.head.outputs(model, inputs)
        return outputs, [seen[path] for path in self.states]

    def outputs_loss(
        self, outputs: Mapping[str, Tensor], targets: Mapping[str, Tensor], mask: Tensor, labels: Tensor | None
    ) -> Tensor:
        """Return each sample's loss (B,) without that of the hidden states: what the held-out rows are judged by."""
        loss = self.head.distance(outputs, targets, mask, self.weights.temperature)
        if self.weights.labels and labels is not None:
            true = self.head.loss({k: v.float() for k, v in outputs.items()}, labels, mask)
            loss = (1 - self.weights.labels) * loss + self.weights.labels * true
        return loss

    @torch.no_grad()
    def targets(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the teacher's outputs."""
        with self.autocast():
            return self.head.outputs(self._teacher[0], inputs)

    @torch.no_grad()
    def judge(self, batches: Sequence[Batch], targets: Sequence[Mapping[str, Tensor]]) -> float:
        """Return the mean loss of the outputs over batches that lie on the device."""
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for batch, wanted in zip(batches, targets, strict=True):
            with self.autocast():
                found = self.head.outputs(self.student, batch.inputs)
            total += self.outputs_loss(found, wanted, batch.mask, batch.labels).double().sum()
        return float(total) / sum(len(b.index) for b in batches)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32)


@torch.no_grad()
def shared_states(student: nn.Module, teacher: nn.Module, head: Head, inputs: dict[str, Tensor]) -> list[str]:
    """Return the paths of the modules made of others whose outputs have one shape in both models.

    Of a convolutional network those are its blocks, as long as the residual streams that they write are whole. What
    several modules hand on counts once.
    """
    paths = [path for path, module in teacher.named_modules() if path and next(module.children(), None) is not None]
    with _watched(teacher, paths) as wanted:
        head.outputs(teacher, inputs)
    with _watched(student, paths) as found:
        head.outputs(student, inputs)
    shared = {id(y): path for path, y in wanted.items() if path in found and found[path].shape == y.shape}
    return list(shared.values())


@contextmanager
def _watched(model: nn.Module, paths: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Record the tensors that modules give, in the order they give them."""
    seen: dict[str, Tensor] = {}

    def look(path: str) -> Any:
        return lambda module, args, output: seen.update({path: output} if isinstance(output, Tensor) else {})

    handles = [model.get_submodule(path).register_forward_hook(look(path)) for path in paths]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def unexplained(found: Tensor, wanted: Tensor, mask: Tensor) -> Tensor:
    """Return the share of the wanted hidden states' variance (B, T, d) over tokens that the found ones miss, ().

    Padding, by the mask (B, T), does not count; states of another layout (B, ...) count whole.
    """
    found, wanted = found.float(), wanted.float()
    if wanted.ndim == 3 and wanted.shape[:2] == mask.shape:
        weight = mask.unsqueeze(-1).to(wanted.dtype)
    else:
        found, wanted = found.flatten(1).unsqueeze(-1), wanted.flatten(1).unsqueeze(-1)
        weight = torch.ones_like(wanted)
    count = weight.sum((0, 1), keepdim=True)
    spread = (wanted - (wanted * weight).sum((0, 1), keepdim=True) / count).square() * weight
    return ((found - wanted).square() * weight).sum() / spread.sum().clamp(min=torch.finfo(torch.float32).tiny)


class Feed:
    """Deal rows out into the batches of a whole run: like lengths together, in an order that the seed fixes."""

    def __init__(
        self, rows: Sequence[Row], head: Head, pad_id: int, batch_rows: int, seed: int, augment: Augment = "none"
    ) -> None:
        self.rows, self.batch_rows, self.seed, self.augment = rows, batch_rows, seed, augment
        self.batches = Batches(rows, head, pad_id, batch_rows)
        self.per_epoch = len(self.batches)

    def steps(self, count: int) -> list[list[int]]:
        """Return the row indices of each of the first `count` steps."""
        steps: list[list[int]] = []
        for epoch in range(-(-count // self.per_epoch)):
            rng = np.random.default_rng([self.seed, epoch])
            order, pool = rng.permutation(len(self.rows)), POOL_BATCHES * self.batch_rows
            dealt: list[list[int]] = []
            for start in range(0, len(order), pool):
                part = sorted(order[start : start + pool].tolist(), key=lambda i: -self.rows[i].length)
                dealt += [part[i : i + self.batch_rows] for i in range(0, len(part), self.batch_rows)]
            steps += [dealt[i] for i in rng.permutation(len(dealt))]
        return steps[:count]

    def collate(self, steps: list[list[int]]) -> dict[str, Any]:
        """Return the only step's batch, or this process's part of it, as the arguments of `Distillation`.

        The processes' gradients are averaged: a part counts by its rows, and one without rows runs a row for nothing.
        """
        whole, processes = steps[0], parallel.size()
        mine = slice(parallel.rank(), None, processes)
        part = whole[mine]
        batch = self.batches.collate(part or whole[:1])
        if self.augment != "none" and "pixel_values" in batch.inputs:
            draws = np.random.default_rng([self.seed, *whole]).random((len(whole), 3))
            pixels = batch.inputs["pixel_values"]
            batch.inputs["pixel_values"] = moved(pixels, draws[mine] if part else draws[:1], self.augment == "flip")
        labels = {} if batch.labels is None else {"labels": batch.labels}
        return {
            "inputs": batch.inputs,
            "mask": batch.mask,
            "share": len(part) * processes / len(whole),
            **labels,
        }


def moved(pixels: Tensor, draws: np.ndarray, flip: bool) -> Tensor:
    """Return images (B, C, H, W) moved by up to an eighth, and half of them mirrored if asked; draws (B, 3): [0, 1)."""
    height, width = pixels.shape[-2:]
    high, wide = height // SHIFT, width // SHIFT
    padded = nn.functional.pad(pixels, (wide, wide, high, high), mode="replicate")
    images = []
    for image, (down, right, side) in zip(padded, draws.tolist(), strict=True):
        top, left = int(down * (2 * high + 1)), int(right * (2 * wide + 1))
        cut = image[:, top : top + height, left : left + width]
        images.append(cut.flip(-1) if flip and side < 0.5 else cut)
    return torch.stack(images)


class DistilTrainer(Trainer):
    """Train a Distillation on given steps, judge it on held-out batches, and end with its best weights.

    The schedule is AdamW at `lr`, warmed up over a tenth of the steps, then falling by the cosine. Checkpoints lie in
    `folder`, written by the first process of a team; each has the gradients of its part of every step, averaged.
    """

    def __init__(
        self,
        model: Distillation,
        feed: Feed,
        steps: int,
        held: Sequence[Batch],
        *,
        lr: float,
        seed: int,
        folder: Path,
        progress: Progress,
    ) -> None:
        self.feed, self.held, self.plan = feed, held, feed.steps(steps)
        self.targets = [model.targets(batch.inputs) for batch in held]
        cuda, every = model.device.type == "cuda", max(1, steps // EVALUATIONS)
        arguments = TrainingArguments(
            output_dir=str(folder),
            max_steps=steps,
            learning_rate=lr,
            lr_scheduler_type="cosine",
            warmup_steps=steps // 10,
            weight_decay=0.0,
            optim="adamw_torch_fused" if cuda else "adamw_torch",
            seed=seed,
            use_cpu=not cuda,
            ddp_backend=("nccl" if cuda else "gloo") if parallel.size() > 1 else None,
            ddp_find_unused_parameters=True,  # a pooler that no loss reads
            eval_strategy="steps",
            eval_steps=every,
            save_strategy="steps",
            save_steps=every,
            save_total_limit=2,  # the best and the last
            load_best_model_at_end=True,
            metric_for_best_model="loss",
            greater_is_better=False,
            restore_callback_states_from_checkpoint=True,
            logging_strategy="no",
            logging_nan_inf_filter=False,  # it would wait for the device at every step
            remove_unused_columns=False,
            disable_tqdm=True,
            report_to="none",
        )
        arguments._n_gpu = min(1, arguments.n_gpu)  # one device: DataParallel would copy the models at every step
        callbacks = [EarlyStop(), Report(progress)]
        super().__init__(model, arguments, train_dataset=self.plan, eval_dataset=held, callbacks=callbacks)
        self.pop_callback(transformers.PrinterCallback)

    def get_train_dataloader(self) -> DataLoader[Any]:
        workers = WORKERS if self.args.device.type == "cuda" else 0
        return DataLoader(
            self.plan,  # type: ignore[arg-type]
            batch_size=1,
            collate_fn=self.feed.collate,
            num_workers=workers,
            pin_memory=workers > 0,
        )

    def judge(self) -> float:
        """Return the student's loss on the held-out rows, of a team the first process's: all stop at the same step."""
        loss = self.model.judge(self.held, self.targets)  # type: ignore[union-attr,operator]
        return parallel.agree_values({"loss": loss})["loss"]

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        metrics = {"eval_loss": self.judge()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


class EarlyStop(TrainerCallback, ExportableState):
    """End a run whose held-out loss is no number, or rises again and again while the learning rate falls.

    In the first half of the schedule it may rise: the steps are large there, and the cosine brings it down again.
    """

    def __init__(self) -> None:
        self.last: float | None = None
        self.rises = 0

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        loss, late = kwargs["metrics"]["eval_loss"], 2 * state.global_step > state.max_steps
        rose = self.last is not None and loss > self.last
        self.last, self.rises = loss, self.rises + 1 if late and rose else 0
        if self.rises >= RISES or not math.isfinite(loss):
            control.should_training_stop = True

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        return {"args": {}, "attributes": {"last": self.last, "rises": self.rises}}


class Report(TrainerCallback):
    """Report the finished share of the trainer's steps."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.progress(state.global_step / state.max_steps)
