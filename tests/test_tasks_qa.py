"""Question answering: windows, labels, and the best span, on tiny hand-made contexts."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tasks_tiny import tiny_config, tiny_tokenizer

from deploy_prune import tasks
from deploy_prune.errors import DataError, InputError
from deploy_prune.tasks.qa import QaSplit, best_span
from deploy_prune.tasks.spec import LoadRequest
from deploy_prune.tasks.squad import Question, read_questions

WORDS = "who where the cat sat on mat in paris dog ran far away"
CONFIG = tiny_config("QuestionAnswering")


def question(i, context, *answers, text="who sat"):
    return Question(f"q{i}", text, context, tuple((a, context.index(a)) for a in answers))


def qa_split(questions, max_length=None, unanswerable=False):
    request = LoadRequest("squad", tiny_tokenizer(WORDS), CONFIG, max_length=max_length)
    return QaSplit("validation", questions, request, unanswerable=unanswerable)


def point_at(rows, pairs=None):
    """Return logits that point at each row's label, or at the given pairs of positions."""
    out = []
    for row, (start, end) in zip(rows, pairs or [r.label for r in rows], strict=True):
        logits = {"start_logits": np.zeros(row.length), "end_logits": np.zeros(row.length)}
        logits["start_logits"][start] = logits["end_logits"][end] = 5
        out.append(logits)
    return out


def squad_json(path, questions, **fields):
    qas = []
    for q in questions:
        answers = [{"text": text, "answer_start": start} for text, start in q.answers]
        qas.append({"id": q.id, "question": q.question, "answers": answers, **fields})
    document = {"data": [{"paragraphs": [{"context": questions[0].context, "qas": qas}]}]}
    path.write_text(json.dumps(document))
    return path


def test_the_label_is_the_answers_first_and_last_token():
    split = qa_split([question(0, "the cat sat on the mat", "the mat")])
    row = split.encode([0])[0]
    # [CLS] who sat [SEP] the cat sat on the mat [SEP]
    assert row.label == (8, 9)
    assert row.length == 11
    assert list(row.features["token_type_ids"]) == [0] * 4 + [1] * 7


def test_calibration_gives_the_window_with_the_answer():
    context = " ".join(["cat"] * 40 + ["in paris"] + ["dog"] * 40)
    split = qa_split([question(0, context, "paris"), question(1, context)], max_length=24)
    assert len(split.rows()) > 8
    found, nowhere = split.encode([0, 1])
    start, end = found.label
    assert start == end
    tokens = split._tokenizer.convert_ids_to_tokens(found.features["input_ids"])
    assert tokens[start] == "paris"
    assert nowhere.label == (0, 0)  # [CLS]
    assert [r.length for r in split.encode([1, 0, 1])] == [24, 24, 24]


def test_evaluation_windows_are_scored_together():
    context = " ".join(["cat"] * 40 + ["in paris"] + ["dog"] * 40)
    split = qa_split([question(0, context, "paris"), question(1, "dog ran far", "ran")], max_length=24)
    rows = split.rows()
    assert split.predictions(point_at(rows)) == ["paris", "ran"]
    assert split.score(point_at(rows)) == {"f1": 1.0, "exact_match": 1.0}


def test_an_answerable_task_never_says_nothing_and_squad_2_compares_with_cls():
    questions = [question(0, "the cat sat"), question(1, "the dog ran", "dog")]
    at_cls = [(0, 0), (0, 0)]
    v1, v2 = qa_split(questions), qa_split(questions, unanswerable=True)
    assert all(v1.predictions(point_at(v1.rows(), at_cls)))
    assert v2.predictions(point_at(v2.rows(), at_cls)) == ["", ""]
    assert v2.score(point_at(v2.rows(), at_cls)) == {"f1": 0.5, "exact_match": 0.5}
    assert v2.predictions(point_at(v2.rows(), [(0, 0), (5, 5)])) == ["", "dog"]
    assert v2.score(point_at(v2.rows(), [(0, 0), (5, 5)])) == {"f1": 1.0, "exact_match": 1.0}


def test_the_no_answer_score_is_the_least_over_the_windows():
    context = " ".join(["cat"] * 20 + ["paris"] + ["dog"] * 20)
    split = qa_split([question(0, context, "paris")], max_length=24, unanswerable=True)
    outputs = point_at(split.rows())  # windows without the answer point at [CLS] as strongly as that one at it
    assert split.predictions(outputs) == ["paris"]


def test_long_questions_are_cut_and_leave_room_for_the_context():
    split = qa_split([question(0, "the cat sat", "cat", text=" ".join(["who"] * 200))], max_length=32)
    row = split.encode([0])[0]
    assert row.length == 8 + 3 + 3  # a quarter of 32, the context, [CLS] and two [SEP]
    assert row.label == (11, 11)


def brute_span(start, end, context):
    scores = [
        (start[i] + end[j], i, j)
        for i in range(len(start))
        for j in range(i, min(len(start), i + 30))
        if context[i] and context[j]
    ]
    return max(scores)[0] if scores else -np.inf


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 19), st.integers(0, 2**31))
def test_best_span_is_the_best_of_all_pairs(length, seed):
    rng = np.random.default_rng(seed)
    start, end = rng.normal(size=(2, length))
    context = rng.random(length) < 0.8
    score, first, last = best_span(start, end, context)
    assert score == brute_span(start, end, context)
    if np.isfinite(score):
        assert first <= last
        assert context[first]
        assert context[last]


def test_best_span_keeps_to_30_tokens_and_the_20_best():
    start, end = np.zeros(50), np.zeros(50)
    start[0], end[40], end[29] = 9, 9, 5
    assert best_span(start, end, np.ones(50, bool)) == (14, 0, 29)
    start = -np.arange(60.0)  # the 20 best starts are 0..19, the 20 best ends 40..59: only 30 tokens allowed
    assert best_span(start, np.arange(60.0), np.ones(60, bool)) == (-11 + 40, 11, 40)


def test_official_json_in_a_folder_and_alone(tmp_path):
    context = "the cat sat on the mat"
    squad_json(tmp_path / "train-v1.1.json", [question(0, context, "mat"), question(1, context, "cat")])
    squad_json(tmp_path / "dev-v1.1.json", [question(2, context, "cat", "the cat")])
    data = tasks.load_task("squad", tokenizer=tiny_tokenizer(WORDS), config=CONFIG, data=tmp_path)
    assert (len(data.train), len(data.evaluation), data.metric) == (2, 1, "f1")
    assert data.evaluation.texts(5) == [["who sat", context]]
    with pytest.raises(DataError, match="cannot be split"):  # one context cannot stand on both sides
        tasks.load_task("squad", tokenizer=tiny_tokenizer(WORDS), config=CONFIG, data=tmp_path / "train-v1.1.json")


def flat_rows(count, answers=True):
    rows = []
    for i in range(count):
        row = {"id": str(i), "question": "who sat", "context": f"the cat sat {i // 2}"}
        if answers:
            row["answers"] = {"text": ["cat"], "answer_start": [4]}
        rows.append(row)
    return rows


def test_flat_rows_are_split_by_context_and_may_be_unlabelled(tmp_path):
    for answers in (True, False):
        path = tmp_path / "all.jsonl"
        path.write_text("".join(json.dumps(r) + "\n" for r in flat_rows(100, answers)))
        data = tasks.load_task("question-answering", tokenizer=tiny_tokenizer(WORDS), config=CONFIG, data=path)
        assert (data.metric, data.train.labelled) == (("f1", True) if answers else (None, False))
        sides = [{c for _, c in s.texts(100)} for s in (data.train, data.evaluation)]
        assert not sides[0] & sides[1]
        assert len(data.train) + len(data.evaluation) == 100
        if not answers:
            assert data.train.encode([0])[0].label is None
            assert data.evaluation.score([]) == {}


def test_question_answering_finds_out_whether_questions_are_unanswerable(tmp_path):
    rows = flat_rows(60)
    rows[3]["answers"] = {"text": [], "answer_start": []}
    path = tmp_path / "all.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    for task in ("question-answering", "squad_v2"):
        data = tasks.load_task(task, tokenizer=tiny_tokenizer(WORDS), config=CONFIG, data=path)
        outputs = point_at(data.evaluation.rows(), [(0, 0)] * len(data.evaluation.rows()))
        assert set(data.evaluation.predictions(outputs)) == {""}
    with pytest.raises(DataError, match="question 3 has no answer") as caught:
        tasks.load_task("squad", tokenizer=tiny_tokenizer(WORDS), config=CONFIG, data=path)
    assert "squad_v2" in caught.value.hint


def test_is_impossible_means_no_answer(tmp_path):
    path = squad_json(tmp_path / "a.json", [question(0, "the cat sat", "cat")], is_impossible=True)
    assert read_questions(path)[0].answers == ()


def test_an_answer_that_is_off_moves_to_the_nearest_occurrence(tmp_path):
    q = Question("q", "who", "cat dog cat dog cat", (("cat", 9),))
    assert read_questions(squad_json(tmp_path / "a.json", [q]))[0].answers == (("cat", 8),)
    lost = Question("q7", "who", "cat dog", (("mat", 0),))
    with pytest.raises(DataError, match=r"question q7.*'mat'"):
        read_questions(squad_json(tmp_path / "a.json", [lost]))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"data": []}, ("no questions",)),
        ({"data": [{"paragraphs": [{"qas": []}]}]}, ("SQuAD's form", "context")),
        ({"data": [{"paragraphs": [{"context": "c", "qas": [{"id": "7", "answers": []}]}]}]}, ("question 7",)),
        ({"data": [{"paragraphs": [{"context": "c", "qas": [{"id": "7", "question": "q", "answers": [{}]}]}]}]},
         ("question 7", "answer_start")),
        ({"version": 1}, ("question",)),
    ],
)  # fmt: skip
def test_malformed_json_says_where(tmp_path, content, words):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(content))
    with pytest.raises(DataError) as caught:
        read_questions(path)
    for word in (str(path), *words):
        assert word in str(caught.value)


def test_a_slow_tokenizer_is_refused(tmp_path):
    with pytest.raises(InputError, match="fast tokenizer"):
        tasks.load_task("squad", tokenizer=object(), config=CONFIG, data=tmp_path)
