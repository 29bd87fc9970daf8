"""Which task a model can do, and the errors where it cannot."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest
from tasks_tiny import tiny_config, tiny_tokenizer

from deploy_prune import tasks
from deploy_prune.errors import DataError, InputError, SystemStateError
from deploy_prune.tasks import registry


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (tiny_config("QuestionAnswering"), "question-answering"),
        (tiny_config("TokenClassification", 5), "token-classification"),
        (tiny_config(labels=1), "regression"),
        (tiny_config(labels=1, problem_type="regression"), "regression"),
        (tiny_config(""), "embedding"),
        (tiny_config("ImageClassification"), "image-classification"),
        (tiny_config("ImageClassificationWithTeacher"), "image-classification"),
    ],
)
def test_infer_task_from_the_head(config, expected):
    assert tasks.infer_task(config) == expected


@pytest.mark.parametrize(("pair", "expected"), [(True, "text-pair"), (False, "text-classification")])
def test_infer_task_from_the_data(pair, expected):
    assert tasks.infer_task(tiny_config(labels=3), has_text_pair=pair) == expected


def test_infer_task_takes_the_class_name_where_the_config_has_none():
    config = tiny_config(architectures=None)
    assert tasks.infer_task(config, architecture="DistilBertForQuestionAnswering") == "question-answering"


def test_an_ambiguous_task_names_the_choices():
    with pytest.raises(InputError, match="ambiguous") as caught:
        tasks.infer_task(tiny_config(labels=3))
    assert caught.value.exit_code == 2
    assert "text-classification" in caught.value.hint
    assert "text-pair" in caught.value.hint
    assert "mnli" in caught.value.hint
    assert "sst2" not in caught.value.hint  # it has two labels


@pytest.mark.parametrize(
    ("config", "word"),
    [
        (tiny_config(problem_type="multi_label_classification"), "multi_label"),
        (tiny_config(labels=3, problem_type="regression"), "one number"),
        (tiny_config("MultipleChoice"), "head"),
        (tiny_config("MaskedLM"), "embedding"),
        (tiny_config(architectures=None), "architecture"),
        (tiny_config("ImageClassification", problem_type="multi_label_classification"), "each image"),
        (tiny_config("ImageClassification", labels=1), "only classification"),
        (tiny_config("", num_channels=3), "reads images"),
        (tiny_config("MaskedImageModeling", num_channels=3), "ForImageClassification"),
    ],
)
def test_infer_task_refuses(config, word):
    with pytest.raises(InputError) as caught:
        tasks.infer_task(config)
    assert word in str(caught.value)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("task", "config", "words"),
    [
        ("sst2", tiny_config("QuestionAnswering"), ("BertForQuestionAnswering", "squad")),
        ("squad", tiny_config(), ("ForQuestionAnswering", "sst2")),
        ("mnli", tiny_config(labels=2), ("num_labels 2", "entailment, neutral, contradiction")),
        ("sst2", tiny_config(labels=1), ("num_labels 1", "stsb")),
        ("stsb", tiny_config(labels=2), ("one label", "num_labels 2")),
        ("embedding", tiny_config(), ("bare encoder",)),
        ("conll2003", tiny_config("TokenClassification", 5), ("num_labels 5", "token-classification")),
        ("sst3", tiny_config(), ("no task 'sst3'", "sst2")),
        ("sst2", tiny_config("ImageClassification"), ("about texts", "reads images", "cifar10")),
        ("embedding", tiny_config("ImageClassification"), ("about texts", "reads images")),
        ("cifar10", tiny_config(), ("about images", "BertForSequenceClassification", "reads texts", "sst2")),
        ("cifar100", tiny_config("ImageClassification", 10), ("100 labels (apple", "...)", "image-classification")),
    ],
)
def test_check_task_says_what_is_wrong_and_how_to_mend_it(task, config, words):
    with pytest.raises(InputError) as caught:
        tasks.check_task(task, config)
    for word in words:
        assert word in str(caught.value)


def test_every_task_has_a_head_and_fits_some_model():
    heads = {"classification": "SequenceClassification", "token": "TokenClassification", "qa": "QuestionAnswering"}
    for name in tasks.task_names():
        head = tasks.task_head(name)
        if registry.find_spec(name).modality == "image":
            tasks.check_task(name, tiny_config("ImageClassification", len(registry.find_spec(name).labels) or 2))
            continue
        count = 1 if head == "regression" else len(registry.find_spec(name).labels) or 2
        kind = "" if head == "embedding" else heads.get(head, "SequenceClassification")
        tasks.check_task(name, tiny_config(kind, count))
    assert len(tasks.task_names()) == 24


class FakeEntry:
    def __init__(self, spec):
        self.name = self.value = "fake"
        self.load = lambda: spec


@pytest.fixture
def entry_points(monkeypatch):
    def install(spec):
        monkeypatch.setattr(registry, "entry_points", lambda group: [FakeEntry(spec)])
        registry.specs.cache_clear()

    yield install
    registry.specs.cache_clear()


def test_a_third_party_task_is_found(entry_points):
    entry_points(tasks.TaskSpec("mine", "classification", lambda request: request))
    request = tasks.load_task("mine", tokenizer=None, config=tiny_config(), data="x")
    assert request.task == "mine"


@pytest.mark.parametrize("spec", [tasks.TaskSpec("sst2", "classification", print), object()])
def test_a_clashing_third_party_task_is_refused(entry_points, spec):
    entry_points(spec)
    with pytest.raises(InputError, match="entry point 'fake'"):
        tasks.task_names()


@pytest.mark.parametrize(
    ("task", "config"),
    [
        ("sst2", tiny_config()),
        ("squad", tiny_config("QuestionAnswering")),
        ("conll2003", tiny_config("TokenClassification", 9)),
    ],
)
def test_an_unreachable_hub_says_to_pass_data(monkeypatch, task, config):
    def offline(*args, **kwargs):
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=offline))
    with pytest.raises(SystemStateError, match="Couldn't reach") as caught:
        tasks.load_task(task, tokenizer=tiny_tokenizer(), config=config)
    assert "--data" in caught.value.hint


def test_a_generic_task_without_data_asks_for_it():
    with pytest.raises(DataError, match="--data"):
        tasks.load_task("text-classification", tokenizer=tiny_tokenizer(), config=tiny_config())


def test_hub_splits_are_read_like_local_ones(monkeypatch):
    rows = {"premise": ["a", "b"], "hypothesis": ["c", "d"], "label": [0, 2], "idx": [0, 1]}
    names = ("train", "validation_matched", "validation_mismatched")
    splits = {name: SimpleNamespace(to_dict=lambda: rows) for name in names}
    hub = SimpleNamespace(load_dataset=lambda *args, **kwargs: splits)
    monkeypatch.setitem(sys.modules, "datasets", hub)
    config = tiny_config(labels=["CONTRADICTION", "NEUTRAL", "ENTAILMENT"])
    data = tasks.load_task("mnli", tokenizer=tiny_tokenizer(), config=config)
    assert list(data.evals) == list(names[1:])
    assert [row.label for row in data.train.encode([0, 1])] == [2, 0]  # the model's own order


def test_tasks_import_neither_torch_nor_transformers():
    code = (
        "import sys, deploy_prune.tasks as t; t.task_names(); "
        "sys.exit(bool({'torch', 'transformers', 'datasets', 'sklearn', 'torchmetrics'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
