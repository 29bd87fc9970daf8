"""Reading tables, finding split files, splitting a single file, mapping labels."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tasks_tiny import tiny_config, tiny_tokenizer

from deploy_prune.errors import DataError, InputError
from deploy_prune.tasks.columns import has_pair, label_column, text_columns
from deploy_prune.tasks.encoding import resolve_length
from deploy_prune.tasks.labels import class_ids, float_targets
from deploy_prune.tasks.source import split_files
from deploy_prune.tasks.splitting import split_by_content
from deploy_prune.tasks.table import Table, read_table

ROWS = [{"text": 'say "hi", you', "label": 1}, {"text": "no\ttab", "label": 0}]


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def test_csv_jsonl_json_and_parquet_read_the_same(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    csv = write(tmp_path / "a.csv", 'text,label\n"say ""hi"", you",1\n\n"no\ttab",0\n')
    lines = write(tmp_path / "a.jsonl", "\n".join(json.dumps(r) for r in ROWS) + "\n\n")
    array = write(tmp_path / "a.json", json.dumps(ROWS, indent=1))
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    for path in (csv, lines, array, tmp_path / "a.parquet"):
        table = read_table(path)
        assert table.texts("text") == [r["text"] for r in ROWS]
        assert [int(v) for v in table.column("label")] == [1, 0]


def test_tsv_takes_quotes_literally_and_drops_the_byte_order_mark(tmp_path):
    table = read_table(write(tmp_path / "a.tsv", '\ufeffQuality\ts\n1\t" open quote\n0\tclosed "\n'))
    assert table.columns == {"Quality": ["1", "0"], "s": ['" open quote', 'closed "']}
    assert table.where(1) == f"{tmp_path / 'a.tsv'}, line 3"


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.csv", "text,label\nx,1\ny\n", ("line 3", "1 fields", "expected 2")),
        ("a.jsonl", '{"text": "x"}\n{"text": \n', ("line 2", "not JSON")),
        ("a.jsonl", '{"text": "x"}\n[1]\n', ("line 2", "list")),
        ("a.json", '[{"text": "x"}, 3]', ("row 2", "int")),
        ("a.csv", "text,label\n", ("no rows",)),
        ("a.jsonl", "", ("no rows",)),
        ("a.parquet", "text", ("not a parquet file",)),
        ("a.xlsx", "", ("known kind", ".jsonl")),
    ],
)
def test_malformed_files_say_where(tmp_path, name, content, words):
    with pytest.raises(DataError) as caught:
        read_table(write(tmp_path / name, content))
    assert str(tmp_path / name) in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_a_missing_or_binary_file_is_a_data_error(tmp_path):
    with pytest.raises(DataError, match="No such file"):
        read_table(tmp_path / "none.csv")
    (tmp_path / "latin.csv").write_bytes("text\nd\xe9j\xe0\n".encode("latin-1"))
    with pytest.raises(DataError, match="not UTF-8"):
        read_table(tmp_path / "latin.csv")


def test_text_that_is_not_text_names_the_row():
    table = Table("t", {"text": ["a", None], "label": [0, 1]}, [2, 5])
    with pytest.raises(DataError, match=r"t, line 5.*None"):
        table.texts("text")


@pytest.mark.parametrize(
    ("names", "train", "evaluation"),
    [
        (["train.csv", "validation.csv", "test.csv"], "train.csv", "validation.csv"),
        (["train.jsonl", "dev.jsonl"], "train.jsonl", "dev.jsonl"),
        (["train.csv", "test.csv", "notes.md"], "train.csv", "test.csv"),
        (["train-v1.1.json", "dev-v1.1.json"], "train-v1.1.json", "dev-v1.1.json"),
        (["train_subset.train.json", "train_subset.valid.json", "other.json"],
         "train_subset.train.json", "train_subset.valid.json"),
        (["train.csv", "train_raw.csv", "dev.csv"], "train.csv", "dev.csv"),
    ],
)  # fmt: skip
def test_split_files_by_name(tmp_path, names, train, evaluation):
    for name in names:
        write(tmp_path / name, "x")
    assert [p.name for p in split_files(tmp_path)] == [train, evaluation]


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["train.csv"], ("validation.*", "train.csv")),
        (["dev.csv"], ("no train.*",)),
        ([], ("none",)),
        (["train.csv", "train.jsonl", "dev.csv"], ("More than one",)),
    ],
)
def test_split_files_that_are_missing_or_ambiguous(tmp_path, names, words):
    for name in names:
        write(tmp_path / name, "x")
    with pytest.raises(DataError) as caught:
        split_files(tmp_path)
    for word in words:
        assert word in str(caught.value)


PAIRS = st.lists(st.tuples(st.text("abC \t", max_size=4), st.text("abC ", max_size=4)), min_size=2, max_size=60)


@settings(max_examples=200, deadline=None)
@given(PAIRS, st.randoms())
def test_no_text_stands_in_both_splits_and_order_does_not_matter(pairs, random):
    def fold(text):
        return " ".join(text.casefold().split())

    try:
        train, evaluation = split_by_content(pairs, "data")
    except DataError:
        return
    assert sorted(train + evaluation) == list(range(len(pairs)))
    sides = [{fold(t) for i in side for t in pairs[i]} - {""} for side in (train, evaluation)]
    assert not sides[0] & sides[1]
    order = list(range(len(pairs)))
    random.shuffle(order)
    again, _ = split_by_content([pairs[i] for i in order], "data")
    assert sorted(order[i] for i in again) == train


def test_the_split_takes_about_a_fifth_and_stays_fixed_as_rows_are_added():
    keys = [(f"sentence {i}",) for i in range(2000)]
    train, evaluation = split_by_content(keys, "data")
    assert 340 <= len(evaluation) <= 460
    assert split_by_content(keys[:1000], "data")[0] == [i for i in train if i < 1000]


def test_a_file_that_cannot_be_split_is_refused():
    with pytest.raises(DataError, match="cannot be split"):
        split_by_content([("Same",), ("same ",)], "data.csv")


def test_columns_are_found_by_name():
    pair = Table("t", {"id": [1], "sentence1": ["a"], "sentence2": ["b"], "label": [0]})
    single = Table("t", {"text": ["a"], "score": [None]})
    assert text_columns(pair, None, pair=None) == ("sentence1", "sentence2")
    assert text_columns(single, None, pair=False) == ("text",)
    assert (label_column(pair, None), label_column(single, None)) == ("label", None)
    assert (has_pair(pair), has_pair(single), has_pair(Table("t", {"x": [""]}))) == (True, False, None)
    assert text_columns(Table("t", {"x": ["a"], "y": ["b"]}), "y, x", pair=True) == ("y", "x")


def test_half_of_a_pair_is_no_single_text():
    table = Table("t", {"question": ["a"], "sentence": ["b"], "label": [0]})
    with pytest.raises(DataError, match="text-pair"):
        text_columns(table, None, pair=False)
    assert text_columns(table, "sentence", pair=False) == ("sentence",)


@pytest.mark.parametrize(
    ("override", "pair", "words"),
    [
        (None, False, ("t: found no single text column among: q, a", "--text-column")),
        ("z", False, ("no column 'z'", "q, a")),
        ("q,a", False, ("one column",)),
        ("q", True, ("two columns",)),
    ],
)
def test_missing_text_columns_name_those_there_are(override, pair, words):
    with pytest.raises(DataError) as caught:
        text_columns(Table("t", {"q": ["a"], "a": ["b"]}), override, pair=pair)
    for word in words:
        assert word in str(caught.value)


def where(i):
    return f"row {i}"


@pytest.mark.parametrize(
    ("values", "names", "canonical", "expected"),
    [
        ([0, 1, 1], ["LABEL_0", "LABEL_1"], (), [0, 1, 1]),
        (["0", "1.0", 1.0], ["LABEL_0", "LABEL_1"], (), [0, 1, 1]),
        (["LABEL_1", "label_0"], ["LABEL_0", "LABEL_1"], (), [1, 0]),
        (["Neg", "POS", 1], ["neg", "pos"], (), [0, 1, 1]),
        (["a", "A"], ["A", "a"], (), [1, 0]),
        ([True, False], ["no", "yes"], (), [1, 0]),
        (["entailment", "not_entailment"], ["LABEL_0", "LABEL_1"], ("entailment", "not_entailment"), [0, 1]),
        (["entailment", "neutral"], ["CONTRADICTION", "NEUTRAL", "ENTAILMENT"],
         ("entailment", "neutral", "contradiction"), [2, 1]),
        ([0, "1"], ["Not Entailment", "entailment"], ("entailment", "not_entailment"), [1, 0]),
        ([0, 1], ["bad", "good"], ("negative", "positive"), [0, 1]),
    ],
)  # fmt: skip
def test_labels_become_the_models_classes(values, names, canonical, expected):
    assert class_ids(values, where, names, canonical) == expected


@pytest.mark.parametrize(
    ("values", "canonical", "words"),
    [
        ([0, 1, 5, 5], (), ("5", "row 2", "0=LABEL_0, 1=LABEL_1")),
        ([0, -1], (), ("-1", "row 1")),
        (["pos", "neg"], (), ("'pos', 'neg'", "row 0")),
        ([0, None], (), ("None", "row 1")),
        (["maybe"], ("no", "yes"), ("'maybe'",)),
        ([[1]], (), ("[1]",)),
        ([0.5], (), ("0.5",)),
    ],
)
def test_a_label_mismatch_names_both_sides(values, canonical, words):
    with pytest.raises(DataError, match="Label mismatch") as caught:
        class_ids(values, where, ["LABEL_0", "LABEL_1"], canonical)
    assert caught.value.exit_code == 2
    for word in words:
        assert word in str(caught.value)


def test_regression_targets_must_be_finite_numbers():
    assert float_targets(["4.75", 5], where) == [4.75, 5.0]
    for bad in ("x", None, float("nan"), "inf"):
        with pytest.raises(DataError, match="row 1"):
            float_targets([1.0, bad], where)


@pytest.mark.parametrize(
    ("config", "model_max", "requested", "expected"),
    [
        ({"max_position_embeddings": 512}, 10**30, None, 512),
        ({"max_position_embeddings": 1024}, 10**30, None, 512),
        ({"max_position_embeddings": 1024}, 10**30, 1024, 1024),
        ({"max_position_embeddings": 514, "model_type": "roberta", "pad_token_id": 1}, 600, None, 512),
        ({"max_position_embeddings": 512}, 128, None, 128),
        ({"max_position_embeddings": 512}, 128, 256, 256),
    ],
)
def test_the_longest_row(config, model_max, requested, expected):
    tokenizer = tiny_tokenizer(model_max_length=model_max)
    assert resolve_length(tokenizer, tiny_config(**config), requested) == expected


@pytest.mark.parametrize("requested", [0, 4, 513])
def test_a_length_outside_the_models_range_is_refused(requested):
    with pytest.raises(InputError, match=r"8\.\.512"):
        resolve_length(tiny_tokenizer(), tiny_config(), requested)
