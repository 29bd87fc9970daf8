"""The GLUE tasks, from their original tsv folders or the hub. Source: gluebenchmark.com."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from .base import HeadKind, TaskData
from .labels import canonical_order, model_labels
from .metrics import Metric, accuracy, f1_of, matthews, pearson, spearman
from .source import fetch, require_file, require_path
from .spec import LoadRequest, TaskSpec
from .table import Table, read_table
from .text import text_task

HUB = "nyu-mll/glue"
ENTAILMENT = ("entailment", "not_entailment")


@dataclass(frozen=True)
class Glue:
    """Describe one task: where its columns stand in the tsv files and on the hub."""

    folder: str  # of the original archive
    texts: tuple[str, ...]
    labels: tuple[str, ...]  # class names in the official order; none for regression
    metrics: dict[str, Metric]  # the primary one first
    label: str = "label"
    hub_texts: tuple[str, ...] = ()  # where the hub names them otherwise
    header: tuple[str, ...] = ()  # of tsv files that have none
    positive_f1: bool = False  # also report the F1 of the last class
    skip_malformed: bool = False
    evals: tuple[tuple[str, str], ...] = (("validation", "dev.tsv"),)


TASKS = {
    "cola": Glue(
        "CoLA",
        ("sentence",),
        ("unacceptable", "acceptable"),
        {"matthews": matthews},
        header=("source", "label", "mark", "sentence"),
    ),
    "sst2": Glue("SST-2", ("sentence",), ("negative", "positive"), {"accuracy": accuracy}),
    "mrpc": Glue(
        "MRPC",
        ("#1 String", "#2 String"),
        ("not_equivalent", "equivalent"),
        {"accuracy": accuracy},
        label="Quality",
        hub_texts=("sentence1", "sentence2"),
        positive_f1=True,
    ),
    "qqp": Glue(
        "QQP",
        ("question1", "question2"),
        ("not_duplicate", "duplicate"),
        {"accuracy": accuracy},
        label="is_duplicate",
        positive_f1=True,
        skip_malformed=True,  # the official file has a few broken lines, which every reader of it skips
    ),
    "mnli": Glue(
        "MNLI",
        ("sentence1", "sentence2"),
        ("entailment", "neutral", "contradiction"),
        {"accuracy": accuracy},
        label="gold_label",
        hub_texts=("premise", "hypothesis"),
        evals=(("validation_matched", "dev_matched.tsv"), ("validation_mismatched", "dev_mismatched.tsv")),
    ),
    "qnli": Glue("QNLI", ("question", "sentence"), ENTAILMENT, {"accuracy": accuracy}),
    "rte": Glue("RTE", ("sentence1", "sentence2"), ENTAILMENT, {"accuracy": accuracy}),
    "stsb": Glue("STS-B", ("sentence1", "sentence2"), (), {"spearman": spearman, "pearson": pearson}, label="score"),
}


def load_glue(glue: Glue, request: LoadRequest) -> TaskData:
    """Load one GLUE task. Raises DataError naming the missing file, column or label."""
    if request.data is None:
        tables, texts, label = _from_hub(glue, request.task), glue.hub_texts or glue.texts, "label"
    else:
        tables, texts, label = _from_folder(glue, request), glue.texts, glue.label
    metrics = dict(glue.metrics)
    if glue.positive_f1:
        order = canonical_order(model_labels(request.config), glue.labels)
        metrics["f1"] = f1_of(order[-1] if order else len(glue.labels) - 1)
    columns = tuple(n.strip() for n in request.text_column.split(",")) if request.text_column else texts
    return text_task(request, tables, columns, _head(glue), metrics, canonical=glue.labels, label=label)


def _from_folder(glue: Glue, request: LoadRequest) -> dict[str, Table]:
    folder = require_path(request.data, request.task)
    if not (folder / "train.tsv").is_file() and (folder / glue.folder).is_dir():
        folder = folder / glue.folder
    files = [("train", "train.tsv"), *glue.evals]
    paths: dict[str, Path] = {n: require_file(folder / f, f"The task '{request.task}'") for n, f in files}
    return {
        name: read_table(path, header=glue.header, skip_malformed=glue.skip_malformed) for name, path in paths.items()
    }


def _from_hub(glue: Glue, task: str) -> dict[str, Table]:
    splits = fetch(HUB, task)
    return {name: Table(f"{HUB} {task} {name}", splits[name].to_dict()) for name in ("train", *dict(glue.evals))}


def _head(glue: Glue) -> HeadKind:
    return "classification" if glue.labels else "regression"


SPECS = [TaskSpec(name, _head(glue), partial(load_glue, glue), glue.labels) for name, glue in TASKS.items()]
