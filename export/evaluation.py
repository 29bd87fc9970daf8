"""The rows that static int8 is calibrated on, and the quality of a lower precision on the evaluation rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from ..runtimes import Runner
from ..runtimes.fixed import fixed_feeds
from ..tasks.base import Row, RowOutput, TaskData
from .registry import Feeds, Shape, Source

if TYPE_CHECKING:
    from ..bundle import Bundle
    from ..heads import Head


@dataclass
class Evaluation:
    """Hold a task's data, the calibration rows that the pruning used, and how to batch them.

    `dense` gives the dense model's outputs of the evaluation rows, which retrieval is scored against.
    """

    data: TaskData
    rows: Sequence[Row]  # the calibration set
    head: Head
    pad_id: int
    _reference: dict[int, list[RowOutput]] = field(default_factory=dict)

    def calibration(self, rows: int, shape: Shape | None = None) -> Sequence[Feeds]:
        """Return up to `rows` calibration rows in padded batches, cut and padded to a fixed shape if one is given."""
        from ..batches import Batches

        chosen = list(self.rows[:rows])
        if shape and chosen and chosen[0].tokens is None:
            chosen = [Row({n: a[: shape[1]] for n, a in r.features.items()}) for r in chosen]
        batches = Batches([Row(r.features, tokens=r.tokens) for r in chosen], self.head, self.pad_id)
        feeds = [{name: t.numpy() for name, t in batch.inputs.items()} for batch in batches]
        return [f for batch in feeds for f in fixed_feeds(batch, shape, self.pad_id)] if shape else feeds

    @cached_property
    def evaluated(self) -> list[Row]:
        return self.data.evaluation.rows()

    def quality(self, runner: Runner, source: Source) -> dict[str, Any]:
        """Return the task's metric of an open runner, and how close it is to its own model in fp32."""
        from ..fidelity import fidelity
        from ..predict import predict, predict_by

        split = self.data.evaluation
        if id(source.model) not in self._reference:
            self._reference[id(source.model)] = predict(source.model, self.head, self.evaluated, pad_id=self.pad_id)
        reference = self._reference[id(source.model)]
        outputs = predict_by(
            lambda inputs: runner.infer({n: inputs[n].numpy() for n in runner.input_names}),
            self.head,
            self.evaluated,
            pad_id=self.pad_id,
        )
        said: dict[str, Any] = {"metric": None, "value": None, "n": len(split), "split": split.name}
        if split.labelled:
            scores = split.score(outputs)
            name = self.data.metric if self.data.metric in scores else next(iter(scores))
            said |= {"metric": name, "value": scores[name], "fp32": split.score(reference)[name]}
        return said | {"to_fp32": fidelity(self.head.kind, reference, outputs)}


def evaluation_of(bundle: Bundle) -> Evaluation | None:
    """Load the data that a bundle was made with; None when it was made without. Raises DataError if they are gone."""
    from transformers import AutoConfig

    from ..calibration import sample_indices
    from ..checkpoint import head_of, load_processor, preparing, quiet_transformers
    from ..tasks import load_task

    recipe, task = bundle.manifest.recipe, bundle.manifest.task
    if not recipe or not task.get("evaluation"):
        return None
    folder = bundle.path("sliced")
    with quiet_transformers():
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        processor = load_processor(str(folder), config)
    try:
        data = load_task(
            task["name"],
            **preparing(processor),
            config=config,
            data=recipe["data"],
            max_length=recipe.get("max_length"),
            text_column=recipe.get("text_column"),
            label_column=recipe.get("label_column"),
        )
    except InputError as error:
        raise InputError(
            f"The data that this bundle was made with cannot be read: {error.message}",
            hint="Put them back, or export --no-data: fp32, fp16 and dynamic int8 need none.",
        ) from error
    rows = data.train.encode(sample_indices(len(data.train), recipe["samples"], recipe["seed"]))
    return Evaluation(data, rows, head_of(bundle), int(bundle.manifest.model["pad_id"]))
