"""Fine-tune a stock transformers model: what the demo and the experiments share.

The loop is the Trainer of transformers; this file only shapes its batches and its seed.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import Trainer, TrainerCallback, TrainingArguments

from .batches import Batches
from .checkpoint import quiet_transformers
from .heads import Head
from .images import ImageProcessor
from .predict import predict
from .progress import Progress
from .tasks.base import HeadKind, Row, RowOutput

AUTO_CLASSES = {
    "classification": "AutoModelForSequenceClassification",
    "regression": "AutoModelForSequenceClassification",
    "token": "AutoModelForTokenClassification",
    "qa": "AutoModelForQuestionAnswering",
}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Hold the settings of one fine-tuning run: AdamW, linear decay after a warm-up."""

    epochs: int
    batch_size: int
    learning_rate: float
    seed: int = 0
    warmup: float = 0.1  # share of all steps
    weight_decay: float = 0.01


@dataclasses.dataclass
class Learner:
    """Hold a stock model with its tokenizer or image processor, and the kind of its head."""

    model: Any  # a transformers model; their classes are too loosely typed to name
    processor: Any
    head: HeadKind

    @classmethod
    def from_encoder(cls, folder: Path, head: HeadKind, id2label: Mapping[int, str], seed: int) -> Learner:
        """Load a local encoder in float32 and put a new, seeded head on it (`id2label` is not for QA)."""
        extra: dict[str, Any] = {}
        if head != "qa":
            extra = {"id2label": dict(id2label), "label2id": {name: i for i, name in id2label.items()}}
        if head == "regression":
            extra["problem_type"] = "regression"
        transformers.set_seed(seed)
        with quiet_transformers():  # it would warn of the new head, at length
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
            auto = getattr(transformers, AUTO_CLASSES[head])
            model = auto.from_pretrained(folder, local_files_only=True, dtype=torch.float32, **extra)
        tokenizer.model_max_length = min(tokenizer.model_max_length, model.config.max_position_embeddings)
        return cls(model, tokenizer, head)

    @classmethod
    def from_config(cls, config: Any, processor: ImageProcessor, seed: int) -> Learner:
        """Make an image classifier with seeded random weights, in float32."""
        transformers.set_seed(seed)
        model = transformers.AutoModelForImageClassification.from_config(config)
        return cls(model.float(), processor, "classification")

    def train(self, rows: Sequence[Row], recipe: Recipe, progress: Progress = lambda share: None) -> None:
        """Train the model in place on labelled rows; texts in batches of like lengths."""
        steps = -(-len(rows) // recipe.batch_size) * recipe.epochs
        with tempfile.TemporaryDirectory() as scratch:
            arguments = TrainingArguments(
                output_dir=scratch,
                per_device_train_batch_size=recipe.batch_size,
                num_train_epochs=recipe.epochs,
                learning_rate=recipe.learning_rate,
                warmup_steps=int(recipe.warmup * steps),
                weight_decay=recipe.weight_decay,
                seed=recipe.seed,
                use_cpu=not torch.cuda.is_available(),
                dataloader_pin_memory=False,
                remove_unused_columns=False,
                disable_tqdm=True,
                logging_strategy="no",
                save_strategy="no",
                report_to="none",
                **({} if isinstance(self.processor, ImageProcessor) else _by_length()),
            )
            trainer = Trainer(
                model=self.model,
                args=arguments,
                train_dataset=_Examples(rows),
                data_collator=self._collate,
                callbacks=[_Report(progress)],
            )
            trainer.pop_callback(transformers.PrinterCallback)
            trainer.train()
        self.model.eval()

    def predict(self, rows: Sequence[Row], progress: Progress = lambda share: None) -> list[RowOutput]:
        """Return the outputs of each row, without padding, in the order given."""
        self.model.eval()
        return predict(self.model, Head(self.head), rows, pad_id=self._pad_id, progress=progress)

    def save(self, folder: Path) -> None:
        """Save a stock transformers folder: config, safetensors, tokenizer or image processor."""
        with quiet_transformers():
            self.model.save_pretrained(folder)
            self.processor.save_pretrained(folder)

    @property
    def _pad_id(self) -> int:
        return int(getattr(self.processor, "pad_token_id", None) or 0)

    def _collate(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        tokens = 1 if isinstance(self.processor, ImageProcessor) else None  # images are not padded
        rows = [Row({k: v for k, v in item.items() if k != "labels"}, item["labels"], tokens) for item in items]
        batch = Batches(rows, Head(self.head), self._pad_id).collate(list(range(len(rows))))
        if self.head == "qa" and batch.labels is not None:
            return {**batch.inputs, "start_positions": batch.labels[:, 0], "end_positions": batch.labels[:, 1]}
        return {**batch.inputs, "labels": batch.labels}


class _Examples(torch.utils.data.Dataset):
    """Give rows to the Trainer one at a time, so that images are decoded when their batch comes."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self.rows[index].features, "labels": self.rows[index].label}


def text_rows(tokenizer: Any, examples: Iterable[Mapping[str, Any]], max_length: int) -> list[Row]:
    """Tokenise {"text", "label"} examples, cut to `max_length` tokens."""
    examples = list(examples)
    encoded = tokenizer([example["text"] for example in examples], truncation=True, max_length=max_length)
    return [
        Row({name: np.asarray(column[i], dtype=np.int64) for name, column in encoded.items()}, row["label"])
        for i, row in enumerate(examples)
    ]


def _by_length() -> dict[str, Any]:
    """Name the batching by like lengths as the installed transformers does (5, or 4)."""
    names = {field.name for field in dataclasses.fields(TrainingArguments)}
    if "train_sampling_strategy" in names:
        return {"train_sampling_strategy": "group_by_length"}
    return {"group_by_length": True}


class _Report(TrainerCallback):
    """Report the finished share of the trainer's steps."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.progress(state.global_step / state.max_steps)
