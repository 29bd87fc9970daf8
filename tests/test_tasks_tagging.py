"""Token classification: CoNLL files and lists of words, labels on first tokens, scores."""

from __future__ import annotations

import json

import numpy as np
import pytest
from tasks_tiny import tiny_config, tiny_tokenizer
from tokenizers import Tokenizer, models
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerFast

from deploy_prune import tasks
from deploy_prune.errors import DataError, InputError
from deploy_prune.tasks.encoding import require_words

TAGS = ["O", "B-PER", "I-PER", "B-LOC"]
CONFIG = tiny_config("TokenClassification", TAGS)
CONLL = """-DOCSTART- -X- O

Ann NNP B-PER
Lee NNP I-PER
sat VBD O

in IN O
Paris NNP B-LOC
"""


def folder(root, text=CONLL, names=("train.txt", "valid.txt")):
    for name in names:
        (root / name).write_text(text)
    return root


def load(data, task="token-classification", config=CONFIG, tokenizer=None, **kwargs):
    return tasks.load_task(
        task, tokenizer=tokenizer or tiny_tokenizer("ann sat in"), config=config, data=data, **kwargs
    )


def perfect(rows, classes=4):
    return [{"logits": np.eye(classes)[np.maximum(row.label, 0)]} for row in rows]


def test_a_word_is_labelled_on_its_first_token(tmp_path):
    data = load(folder(tmp_path))
    first, second = data.train.encode([0, 1])
    assert list(first.label) == [-100, 1, 2, -100, -100, 0, -100]  # [CLS] ann l ##e ##e sat [SEP]
    assert list(second.label) == [-100, 0, 3, -100, -100, -100, -100, -100]  # [CLS] in p ##a ##r ##i ##s [SEP]
    assert first.label.dtype == np.int64
    assert (data.head, data.metric, data.labels) == ("token", "f1", TAGS)


def test_scores_are_of_words(tmp_path):
    split = load(folder(tmp_path)).evaluation
    rows = split.rows()
    assert split.score(perfect(rows)) == {"f1": 1.0, "accuracy": 1.0}
    outputs = perfect(rows)
    outputs[1]["logits"][2] = np.eye(4)[0]  # Paris is missed: 1 of 2 entities, none wrong
    assert split.score(outputs) == {"f1": pytest.approx(2 / 3), "accuracy": pytest.approx(4 / 5)}
    outputs = perfect(rows)
    outputs[0]["logits"][3] = np.eye(4)[3]  # a later token of a word does not count
    assert split.score(outputs)["f1"] == 1.0


def test_words_that_are_cut_off_do_not_count(tmp_path):
    text = "\n".join(["Ann O"] * 30 + ["Lee B-PER"]) + "\n"
    split = load(folder(tmp_path, text), max_length=8).evaluation
    assert split.rows()[0].length == 8
    assert split.score(perfect(split.rows()))["accuracy"] == 1.0


def test_tags_without_entities_are_scored_by_accuracy(tmp_path):
    config = tiny_config("TokenClassification", ["NNP", "VBD", "IN"])
    data = load(folder(tmp_path), config=config, label_column="1")
    assert data.metric == "accuracy"
    rows = data.evaluation.rows()
    assert data.evaluation.score(perfect(rows, 3)) == {"accuracy": 1.0}
    assert list(rows[1].label[:3]) == [-100, 2, 0]


def test_conll2003_knows_its_tags(tmp_path):
    config = tiny_config("TokenClassification", 9)
    data = load(folder(tmp_path, names=("eng.train", "eng.testa", "eng.testb")), "conll2003", config)
    assert data.labels[:3] == ["O", "B-PER", "I-PER"]
    assert list(data.train.encode([1])[0].label[:3]) == [-100, 0, 5]  # B-LOC
    assert data.evaluation.score(perfect(data.evaluation.rows(), 9))["f1"] == 1.0


def test_lists_of_words_in_jsonl_are_split_by_sentence(tmp_path):
    path = tmp_path / "all.jsonl"
    rows = [{"tokens": ["Ann", f"w{i}"], "ner_tags": [1, "O"]} for i in range(80)]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows + rows))
    data = load(path)
    sides = [{tuple(w) for w in s.texts(200)} for s in (data.train, data.evaluation)]
    assert len(data.train) + len(data.evaluation) == 160
    assert not sides[0] & sides[1]
    assert list(data.train.encode([0])[0].label[:3]) == [-100, 1, 0]


def test_one_column_is_unlabelled(tmp_path):
    data = load(folder(tmp_path, "Ann\nsat\n\nin\n"))
    assert data.metric is None
    assert data.train.encode([0])[0].label is None
    assert data.evaluation.score([]) == {}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Ann B-PER\nsat\n", ("line 2", "1 columns", "expected 2")),
        ("Ann B-PER\n\nsat X-PER\n", ("Label mismatch", "'X-PER'", "sentence at line 3", "1=B-PER")),
        ("\n\n", ("no sentences",)),
    ],
)
def test_malformed_conll_says_where(tmp_path, text, words):
    with pytest.raises(DataError) as caught:
        load(folder(tmp_path, text))
    for word in (*words, "train.txt"):
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"tokens": ["a", "b"], "tags": ["O"]}, ("row 1", "2 tags")),
        ({"tokens": "a b", "tags": ["O"]}, ("row 1", "list of words")),
        ({"sentence": ["a"]}, ("no column 'tokens'", "sentence")),
    ],
)
def test_malformed_lists_say_where(tmp_path, row, words):
    path = tmp_path / "all.json"
    path.write_text(json.dumps([row, row]))
    with pytest.raises(DataError) as caught:
        load(path)
    for word in words:
        assert word in str(caught.value)


def test_a_column_name_means_nothing_in_conll(tmp_path):
    with pytest.raises(DataError, match="'ner' means nothing"):
        load(folder(tmp_path), label_column="ner")


@pytest.mark.parametrize("prefix", [True, False])
def test_a_tokenizer_that_reads_single_words_otherwise_is_refused(prefix):
    backend = Tokenizer(models.BPE({"a": 0, "Ġ": 1, "Ġa": 2}, [("Ġ", "a")]))
    backend.pre_tokenizer = ByteLevel(add_prefix_space=prefix)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, add_prefix_space=prefix)
    if prefix:
        require_words(tokenizer)
    else:
        with pytest.raises(InputError, match="add_prefix_space"):
            require_words(tokenizer)
