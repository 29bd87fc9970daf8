"""The tasks on real data sets: sizes, speed of reading, labels, scores of perfect outputs."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from tasks_tiny import tiny_config

from deploy_prune import tasks
from deploy_prune.errors import DataError

ROOT = os.environ.get("DEPLOY_PRUNE_DATA")
pytestmark = [
    pytest.mark.data,
    pytest.mark.skipif(not ROOT, reason="DEPLOY_PRUNE_DATA names no folder of real data"),
]


@pytest.fixture(scope="module")
def tokenizer():
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(Path(str(ROOT)) / "checkpoints" / "minilm-sst2")


def load(task, where, config, tokenizer, **kwargs):
    return tasks.load_task(task, tokenizer=tokenizer, config=config, data=Path(str(ROOT)) / "data" / where, **kwargs)


@pytest.mark.parametrize(
    ("task", "folder", "train", "evaluation", "classes"),
    [
        ("sst2", "SST-2", 67349, 872, 2),
        ("mrpc", "MRPC", 3667, 408, 2),
        ("stsb", "STS-B", 5749, 1500, 1),
        ("rte", "RTE", 2490, 277, 2),
        ("cola", "CoLA", 8551, 1043, 2),
    ],
)
def test_glue(tokenizer, task, folder, train, evaluation, classes):
    data = load(task, f"glue/{folder}", tiny_config(labels=classes), tokenizer)
    assert (len(data.train), len(data.evaluation)) == (train, evaluation)
    rows = data.evaluation.rows()
    labels = [row.label for row in rows]
    assert (min(labels), max(labels)) == (0, 5 if classes == 1 else 1)
    assert max(row.length for row in rows) <= 512
    outputs = [{"logits": np.eye(2)[y] if classes == 2 else np.array([y])} for y in labels]
    assert all(v == pytest.approx(1) for v in data.evaluation.score(outputs).values())
    assert [row.length > 2 for row in data.train.encode([0, train - 1])] == [True, True]


def test_sst2_dev_mean_length_is_the_known_one(tokenizer):
    rows = load("sst2", "glue/SST-2", tiny_config(), tokenizer).evaluation.rows()
    assert np.mean([row.length for row in rows]) == pytest.approx(25.16, abs=0.1)


def test_qnli_without_training_rows_is_refused(tokenizer):
    with pytest.raises(DataError, match=r"train\.tsv"):
        load("qnli", "glue/QNLI", tiny_config(), tokenizer)


def test_a_glue_file_as_data_of_ones_own(tokenizer):
    data = load("text-pair", "glue/QNLI/dev.tsv", tiny_config(labels=["entailment", "not_entailment"]), tokenizer)
    texts = [{t for pair in s.texts(10**6) for t in pair} for s in (data.train, data.evaluation)]
    assert not texts[0] & texts[1]
    assert len(data.train) + len(data.evaluation) == 5463
    assert 0.1 < len(data.evaluation) / 5463 < 0.35


@pytest.mark.parametrize(("where", "count"), [("squad", (4000, 500)), ("squad/xquad.en.json", None)])
def test_squad(tokenizer, where, count):
    data = load("squad", where, tiny_config("QuestionAnswering"), tokenizer)
    if count:
        assert (len(data.train), len(data.evaluation)) == count
    else:
        assert len(data.train) + len(data.evaluation) == 1190
        assert 0.1 < len(data.evaluation) / 1190 < 0.3
    outputs = []
    for row in data.evaluation.rows():
        logits = {"start_logits": np.zeros(row.length), "end_logits": np.zeros(row.length)}
        logits["start_logits"][row.label[0]] = logits["end_logits"][row.label[1]] = 9
        outputs.append(logits)
    scores = data.evaluation.score(outputs)  # not all: some answers have more than 30 tokens
    assert scores["f1"] > 0.98
    assert scores["exact_match"] > 0.98
    rows = data.train.encode(range(0, len(data.train), 40))
    assert np.mean([row.label == (0, 0) for row in rows]) < 0.02
    assert max(row.length for row in rows) <= 384
