"""The table of tasks, and which of them a model can do."""

from __future__ import annotations

from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from ..errors import InputError
from .base import HeadKind, Modality, TaskData
from .labels import is_generic, model_labels
from .spec import LoadRequest, TaskSpec

_HEAD_NAMES: dict[HeadKind, str] = {
    "classification": "a ForSequenceClassification head with two or more labels",
    "regression": "a ForSequenceClassification head with one label",
    "token": "a ForTokenClassification head",
    "qa": "a ForQuestionAnswering head",
    "embedding": "a bare encoder without a head",
}
# DeiT's second name is that of a model with a distillation token, which answers with the mean of two heads.
_IMAGE_HEADS = ("ForImageClassification", "ForImageClassificationWithTeacher")
_THINGS: dict[Modality, str] = {"text": "texts", "image": "images"}


@cache
def specs() -> dict[str, TaskSpec]:
    """Return all tasks by name: ours, then those of installed packages. Raises InputError for a clash."""
    from . import generic, glue, qa, tagging, vision

    table = {s.name: s for s in (*glue.SPECS, *qa.SPECS, *tagging.SPECS, *generic.SPECS, *vision.SPECS)}
    for entry in entry_points(group="deploy_prune.tasks"):
        try:
            spec = entry.load()
            fault = "" if isinstance(spec, TaskSpec) else "is not a TaskSpec"
        except (ImportError, AttributeError) as error:
            fault = f"cannot be loaded: {error}"
        if not fault and spec.name in table:
            fault = f"repeats the name of another task, '{spec.name}'"
        if fault:
            raise InputError(
                f"The entry point '{entry.name}' ({entry.value}) of the group deploy_prune.tasks {fault}.",
                hint="Mend or uninstall the package that offers it.",
            )
        table[spec.name] = spec
    return table


def task_names() -> list[str]:
    """Return the names of all tasks."""
    return list(specs())


def find_spec(task: str) -> TaskSpec:
    """Return the task of this name. Raises InputError naming those there are."""
    if task not in specs():
        raise InputError(f"There is no task '{task}'.", hint=f"Choose one of: {', '.join(task_names())}.")
    return specs()[task]


def task_head(task: str) -> HeadKind:
    """Return the head that a task needs. Raises InputError for an unknown task."""
    return find_spec(task).head


def model_modality(config: Any, architecture: str | None = None) -> Modality:
    """Return what a model reads, from its class name, or its channels where it has no words."""
    name = architecture or next(iter(getattr(config, "architectures", None) or []), "")
    pixels = getattr(config, "num_channels", None) is not None and getattr(config, "vocab_size", None) is None
    return "image" if "ForImageClassification" in name or pixels else "text"


def model_head(config: Any, architecture: str | None = None) -> HeadKind:
    """Return the head of a model from its class name, `architecture` or config.architectures[0].

    Raises InputError for a head that no task can use.
    """
    name = architecture or next(iter(getattr(config, "architectures", None) or []), "")
    if not name:
        raise InputError(
            "The model's config.json names no architecture, so its head is not known.",
            hint='Add "architectures": ["BertForSequenceClassification"] or the like to config.json.',
        )
    image = model_modality(config, architecture) == "image"
    if image and not name.endswith(_IMAGE_HEADS):
        raise InputError(
            f"{name} reads images, but its head is none that a task here can use.",
            hint="Known heads for images: ForImageClassification.",
        )
    if name.endswith("ForQuestionAnswering"):
        return "qa"
    if name.endswith("ForTokenClassification"):
        return "token"
    if name.endswith(("Model", "ForMaskedLM", "ForPreTraining")):
        return "embedding"
    if not name.endswith(("ForSequenceClassification", *_IMAGE_HEADS)):
        raise InputError(
            f"{name} has a head that no task here can use.",
            hint="Known heads: ForSequenceClassification, ForQuestionAnswering, ForTokenClassification, "
            "ForImageClassification, or a bare encoder.",
        )
    problem = getattr(config, "problem_type", None)
    if problem == "multi_label_classification":
        raise InputError(
            f"{name} gives several labels to each {'image' if image else 'text'} (problem_type "
            "multi_label_classification), which is not supported.",
            hint="Use a model that gives one.",
        )
    count = int(config.num_labels)
    if image and (problem == "regression" or count == 1):
        raise InputError(
            f"{name} predicts a number of each image (num_labels {count}); only classification is supported.",
            hint="Use a model with two or more classes.",
        )
    if problem == "regression" and count > 1:
        raise InputError(
            f"{name} predicts {count} numbers per text; only regression of one number is supported.",
            hint="Use a model with num_labels 1.",
        )
    return "regression" if count == 1 else "classification"


def check_task(task: str, config: Any, architecture: str | None = None) -> None:
    """Raise InputError when the model cannot do the task, saying what is wrong and how to mend it."""
    spec = find_spec(task)
    name = architecture or next(iter(getattr(config, "architectures", None) or []), "?")
    head, modality = model_head(config, architecture), model_modality(config, architecture)
    fitting = [s.name for s in specs().values() if (s.head, s.modality) == (head, modality)]
    if spec.modality != modality:
        raise InputError(
            f"The task '{task}' is about {_THINGS[spec.modality]}, but this model, {name}, reads {_THINGS[modality]}.",
            hint=f"Tasks that fit this model: {', '.join(fitting)}.",
        )
    if spec.head != head:
        count = f" with num_labels {config.num_labels}" if head in ("classification", "regression") else ""
        raise InputError(
            f"The task '{task}' needs {_HEAD_NAMES[spec.head]}, but this model is {name}{count}.",
            hint=f"Tasks that fit this model: {', '.join(fitting)}.",
        )
    if spec.labels and int(config.num_labels) != len(spec.labels):
        names = model_labels(config)
        own = "" if is_generic(names) else f" ({', '.join(names[:8])})"
        shown = ", ".join(spec.labels[:12]) + (", ..." if len(spec.labels) > 12 else "")
        raise InputError(
            f"The task '{task}' has {len(spec.labels)} labels ({shown}), but this model has "
            f"num_labels {config.num_labels}{own}.",
            hint=f"Give a model fine-tuned on '{task}', or use your own data with a generic task: "
            f"{', '.join(n for n in fitting if not specs()[n].labels)}.",
        )


def infer_task(config: Any, *, has_text_pair: bool | None = None, architecture: str | None = None) -> str:
    """Name the generic task of a model from its head.

    `has_text_pair` says whether the data are pairs of texts (None: not known). Raises InputError naming
    the choices when more than one task is possible.
    """
    head = model_head(config, architecture)
    name = architecture or config.architectures[0]
    if model_modality(config, architecture) == "image":
        return "image-classification"
    if head == "embedding" and not name.endswith("Model"):
        raise InputError(
            f"{name} has no task of its own; its encoder alone can be pruned.",
            hint="Choose --task embedding (TASK=embedding under make).",
        )
    if head != "classification":
        by_head = {"qa": "question-answering", "token": "token-classification"}
        return by_head.get(head, head)
    if has_text_pair is None:
        fitting = [s.name for s in specs().values() if (s.head, s.modality) == (head, "text")]
        choices = [n for n in fitting if len(specs()[n].labels) in (0, int(config.num_labels))]
        raise InputError(
            "The task is ambiguous: this model classifies one text or a pair of texts, and nothing says which.",
            hint=f"Choose with --task (TASK= under make): {', '.join(choices)}.",
        )
    return "text-pair" if has_text_pair else "text-classification"


def load_task(
    task: str,
    *,
    config: Any,
    tokenizer: Any = None,
    processor: Any = None,
    data: str | Path | None = None,
    max_length: int | None = None,
    text_column: str | None = None,
    label_column: str | None = None,
    architecture: str | None = None,
) -> TaskData:
    """Load the data of a task, from `data` (a file or folder) or, for the known data sets, the hub.

    Text tasks need the model's `tokenizer`, image tasks its `processor`, an images.ImageProcessor. `architecture` is
    the model's class name, where config.architectures does not give it.
    Raises InputError for a model that does not fit the task, DataError for missing or wrong data, and
    SystemStateError when the hub cannot be reached.
    """
    check_task(task, config, architecture)
    request = LoadRequest(
        task=task,
        tokenizer=tokenizer,
        processor=processor,
        config=config,
        data=Path(data) if data is not None else None,
        max_length=max_length,
        text_column=text_column,
        label_column=label_column,
    )
    return find_spec(task).load(request)
