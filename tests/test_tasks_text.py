"""GLUE folders and generic data of one text or a pair: loading, encoding, scoring."""

from __future__ import annotations

import json

import numpy as np
import pytest
from tasks_tiny import tiny_config, tiny_tokenizer

from deploy_prune import tasks
from deploy_prune.errors import DataError, InputError

HEADERS = {
    "cola": ("CoLA", "", "s\t{label}\t*\t{a}", ("0", "1")),
    "sst2": ("SST-2", "sentence\tlabel", "{a}\t{label}", ("0", "1")),
    "mrpc": ("MRPC", "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String", '{label}\t1\t2\t" {a}\t{b}', ("0", "1")),
    "qqp": ("QQP", "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate", "1\t2\t3\t{a}\t{b}\t{label}", ("0", "1")),
    "qnli": ("QNLI", "index\tquestion\tsentence\tlabel", "0\t{a}\t{b}\t{label}", ("entailment", "not_entailment")),
    "rte": ("RTE", "index\tsentence1\tsentence2\tlabel", "0\t{a}\t{b}\t{label}", ("entailment", "not_entailment")),
    "stsb": ("STS-B", "index\tsentence1\tsentence2\tscore", "0\t{a}\t{b}\t{label}", ("0.000", "4.750")),
    "mnli": (
        "MNLI",
        "index\tsentence1\tsentence2\tlabel1\tgold_label",
        "0\t{a}\t{b}\tneutral\t{label}",
        ("entailment", "neutral", "contradiction"),
    ),
}  # fmt: skip


def glue_folder(root, task):
    """Write a tiny original folder of a GLUE task: one row per label, then the first again."""
    name, header, line, labels = HEADERS[task]
    folder = root / name
    folder.mkdir()
    rows = [line.format(a=f"one {i}", b=f"two {i}", label=label) for i, label in enumerate((*labels, labels[0]))]
    text = "\n".join([header, *rows] if header else rows) + "\n"
    files = ["train", "dev_matched", "dev_mismatched"] if task == "mnli" else ["train", "dev"]
    for file in files:
        (folder / f"{file}.tsv").write_text(text, encoding="utf-8")
    return folder


def load(task, data, config, tokenizer=None, **kwargs):
    return tasks.load_task(task, tokenizer=tokenizer or tiny_tokenizer(), config=config, data=data, **kwargs)


def perfect(split, classes):
    """Return outputs that put every label right."""
    return [{"logits": np.eye(classes)[row.label] if classes > 1 else np.array([row.label])} for row in split.rows()]


@pytest.mark.parametrize("task", HEADERS)
def test_every_glue_folder_is_read_and_scored(tmp_path, task):
    glue_folder(tmp_path, task)
    classes = {"mnli": 3, "stsb": 1}.get(task, 2)
    data = load(task, tmp_path, tiny_config(labels=classes))  # the parent folder does as well
    assert len(data.train) == classes + 1 if classes > 1 else 3
    expected = [0.0, 4.75, 0.0] if task == "stsb" else [*range(classes), 0]
    assert [row.label for row in data.train.encode(range(len(data.train)))] == expected
    for split in data.evals.values():
        scores = split.score(perfect(split, classes))
        assert next(iter(scores)) == data.metric
        assert all(v == pytest.approx(1.0) for v in scores.values())
    assert data.train.labelled
    assert data.evaluation.texts(1) in ([["one 0"]], [["one 0", "two 0"]], [['" one 0', "two 0"]])


def test_metrics_of_each_task(tmp_path):
    metrics = {
        "cola": ["matthews"], "mrpc": ["accuracy", "f1"], "qqp": ["accuracy", "f1"], "stsb": ["spearman", "pearson"]
    }  # fmt: skip
    for task, names in metrics.items():
        glue_folder(tmp_path, task)
        classes = 1 if task == "stsb" else 2
        split = load(task, tmp_path, tiny_config(labels=classes)).evaluation
        assert list(split.score(perfect(split, classes))) == names


def test_mnli_has_two_evaluation_splits(tmp_path):
    data = load("mnli", glue_folder(tmp_path, "mnli"), tiny_config(labels=3))
    assert list(data.evals) == ["validation_matched", "validation_mismatched"]
    assert data.evaluation.name == "validation_matched"
    assert data.labels == ["entailment", "neutral", "contradiction"]


def test_f1_is_of_the_positive_class_also_where_the_model_orders_its_labels_otherwise(tmp_path):
    folder = glue_folder(tmp_path, "mrpc")  # labels 0, 1, 0
    config = tiny_config(labels=["equivalent", "not_equivalent"])
    split = load("mrpc", folder, config).evaluation
    always_equivalent = [{"logits": np.array([1.0, 0.0])}] * 3
    assert split.score(always_equivalent) == {"accuracy": pytest.approx(1 / 3), "f1": pytest.approx(0.5)}


@pytest.mark.parametrize(("task", "file"), [("qnli", "train.tsv"), ("sst2", "dev.tsv"), ("mnli", "dev_mismatched.tsv")])
def test_a_missing_glue_file_is_named(tmp_path, task, file):
    folder = glue_folder(tmp_path, task)
    (folder / file).unlink()
    with pytest.raises(DataError, match=file) as caught:
        load(task, folder, tiny_config(labels=3 if task == "mnli" else 2))
    assert str(folder) in str(caught.value)


def test_qqp_skips_the_broken_lines_that_its_file_is_known_for(tmp_path):
    folder = glue_folder(tmp_path, "qqp")
    with (folder / "train.tsv").open("a") as file:
        file.write("1\t2\tbroken\n")
    assert len(load("qqp", folder, tiny_config()).train) == 3
    folder = glue_folder(tmp_path, "sst2")
    with (folder / "train.tsv").open("a") as file:
        file.write("broken\n")
    with pytest.raises(DataError, match="line 5"):
        load("sst2", folder, tiny_config())


def test_encode_reads_only_the_named_rows_in_order(tmp_path):
    (tmp_path / "train.csv").write_text("text,label\n" + "".join(f"{'a' * i},{i % 2}\n" for i in range(1, 30)))
    (tmp_path / "dev.csv").write_text("text,label\na,0\n")
    tokenizer = tiny_tokenizer()
    data = load("text-classification", tmp_path, tiny_config(), tokenizer)
    rows = data.train.encode([9, 0, 9])
    assert [row.length for row in rows] == [12, 3, 12]  # letters + [CLS] + [SEP]
    assert [row.label for row in rows] == [0, 1, 0]
    for name in ("input_ids", "attention_mask", "token_type_ids"):
        assert rows[0].features[name].dtype == np.int64
        assert rows[0].features[name].shape == (12,)
    assert data.train.encode([]) == []


def test_rows_are_cut_to_the_longest_length(tmp_path):
    (tmp_path / "all.csv").write_text("text,label\n" + "".join(f"{'ab' * i} {i},1\n" for i in range(1, 40)))
    data = load("text-classification", tmp_path / "all.csv", tiny_config(), max_length=16)
    assert max(row.length for row in data.train.encode(range(len(data.train)))) == 16


@pytest.mark.parametrize(("types", "expected"), [(0, False), (1, False), (2, True)])
def test_token_types_only_for_models_that_have_them(tmp_path, types, expected):
    folder = glue_folder(tmp_path, "rte")
    row = load("rte", folder, tiny_config(type_vocab_size=types)).train.encode([0])[0]
    assert ("token_type_ids" in row.features) == expected
    if expected:
        assert set(row.features["token_type_ids"]) == {0, 1}


def test_a_single_file_is_split_and_unlabelled_data_have_no_metric(tmp_path):
    path = tmp_path / "all.jsonl"
    path.write_text("".join(json.dumps({"text": f"text {i % 50}"}) + "\n" for i in range(100)))
    data = load("text-classification", path, tiny_config())
    assert data.metric is None
    assert not data.train.labelled
    assert data.train.encode([0])[0].label is None
    assert data.evaluation.score([{"logits": np.zeros(2)}] * len(data.evaluation)) == {}
    assert len(data.train) + len(data.evaluation) == 100
    train, evaluation = ({t for (t,) in s.texts(100)} for s in (data.train, data.evaluation))
    assert not train & evaluation


def test_column_options(tmp_path):
    path = tmp_path / "all.csv"
    path.write_text("x,y,z\n" + "".join(f"a{i},b{i},{i % 3}\n" for i in range(60)))
    config = tiny_config(labels=3)
    data = load("text-pair", path, config, text_column="x,y", label_column="z")
    assert data.train.texts(1) == [["a0", "b0"]]
    assert data.metric == "accuracy"
    with pytest.raises(DataError, match="no column 'w'"):
        load("text-pair", path, config, text_column="x,y", label_column="w")
    with pytest.raises(DataError, match=r"pair of text columns.*x, y, z"):
        load("text-pair", path, config)


def test_label_mismatch_names_file_and_line(tmp_path):
    path = tmp_path / "all.csv"
    path.write_text("text,label\n" + "".join(f"a{i},{5 if i == 7 else 0}\n" for i in range(60)))
    with pytest.raises(DataError, match=r"Label mismatch.*'5'.*all.csv, line 9"):
        load("text-classification", path, tiny_config())


def test_regression_takes_one_text_or_a_pair(tmp_path):
    path = tmp_path / "all.csv"
    for header, line in (("text,score", "a{0},{0}.5"), ("sentence1,sentence2,score", "a{0},b{0},{0}.5")):
        path.write_text(header + "\n" + "".join(line.format(i) + "\n" for i in range(40)))
        data = load("regression", path, tiny_config(labels=1))
        assert data.metric == "spearman"
        assert data.labels == []
        assert isinstance(data.train.encode([0])[0].label, float)


def test_embedding_scores_recall_against_dense(tmp_path):
    path = tmp_path / "all.jsonl"
    path.write_text("".join(json.dumps({"text": f"text {i}", "label": "ignored"}) + "\n" for i in range(200)))
    data = load("embedding", path, tiny_config(""))
    assert (data.head, data.metric, data.train.labelled) == ("embedding", "recall@10", False)
    rng = np.random.default_rng(0)
    dense = [{"embedding": v} for v in rng.normal(size=(len(data.evaluation), 8)).astype(np.float32)]
    other = [{"embedding": v} for v in rng.normal(size=(len(data.evaluation), 8)).astype(np.float32)]
    assert data.evaluation.score(dense, dense) == {"recall@10": 1.0}
    assert 0 < data.evaluation.score(other, dense)["recall@10"] < 0.6
    with pytest.raises(InputError, match="dense"):
        data.evaluation.score(dense)


def test_data_has_pair(tmp_path):
    (tmp_path / "train.csv").write_text("premise,hypothesis\na,b\n")
    (tmp_path / "dev.csv").write_text("premise,hypothesis\na,b\n")
    assert tasks.data_has_pair(tmp_path) is True
    assert tasks.data_has_pair(tmp_path / "dev.csv", "premise") is False
    with pytest.raises(DataError, match="no file or folder"):
        tasks.data_has_pair(tmp_path / "none")
