"""Extractive question answering: SQuAD 1.1, SQuAD 2.0, and data of the same form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from ..errors import DataError
from ..signature import token_inputs
from .base import Row, RowOutput, Split, TaskData
from .encoding import QA_LENGTH, features, require_fast, resolve_length
from .metrics import squad_scores
from .source import fetch, require_path, split_files
from .spec import LoadRequest, TaskSpec
from .splitting import split_by_content
from .squad import Question, questions_from_table, read_questions
from .table import Table

SUFFIXES = (".json", ".jsonl", ".parquet")
STRIDE = 128  # tokens that neighbouring windows share
QUESTION_LENGTH = 64  # longer questions are cut, so that windows keep room for the context
N_BEST = 20
ANSWER_LENGTH = 30  # tokens
_CHUNK = 200  # questions per call of the tokenizer


@dataclass
class Window:
    """Hold one window of a question's context: (T,) tokens, of which `context` says where they stand."""

    example: int
    row: Row
    offsets: np.ndarray  # (T, 2) first character and the one past the last
    context: np.ndarray  # (T,) bool: a token of the context
    cls: int  # position that stands for "no answer"


class QaSplit(Split):
    """Hold questions; a long context is read in overlapping windows."""

    def __init__(self, name: str, questions: Sequence[Question], request: LoadRequest, *, unanswerable: bool) -> None:
        self.name = name
        self.labelled = questions[0].answers is not None
        self._questions = questions
        self._unanswerable = unanswerable
        self._tokenizer = request.tokenizer
        self._config = request.config
        self._max_length = resolve_length(request.tokenizer, request.config, request.max_length, QA_LENGTH)
        self._windows: list[Window] | None = None

    def __len__(self) -> int:
        return len(self._questions)

    def encode(self, indices: Sequence[int]) -> list[Row]:
        """Tokenise the named questions, each as its first window that holds the answer.

        Where no window holds it, or there is none, it is the first window, labelled with the CLS position.
        """
        first: dict[int, Window] = {}
        for window in self._read(sorted({int(i) for i in indices})):
            known = first.setdefault(window.example, window)
            if known.row.label == (known.cls, known.cls) and window.row.label != (window.cls, window.cls):
                first[window.example] = window
        return [first[int(i)].row for i in indices]

    def rows(self) -> list[Row]:
        if self._windows is None:
            self._windows = self._read(range(len(self)))
        return [window.row for window in self._windows]

    def score(self, outputs: Sequence[RowOutput], dense: Sequence[RowOutput] | None = None) -> dict[str, float]:
        if not self.labelled:
            return {}
        answers = [[text for text, _ in q.answers or ()] for q in self._questions]
        return squad_scores(self.predictions(outputs), answers)

    def predictions(self, outputs: Sequence[RowOutput]) -> list[str]:
        """Return the best answer to each question, "" for none, from the outputs of `rows()`."""
        self.rows()
        best = [(-np.inf, "")] * len(self)
        null = [np.inf] * len(self)  # least "no answer" score over the windows, as in the official baseline
        for window, output in zip(self._windows or (), outputs, strict=True):
            start, end, i = output["start_logits"], output["end_logits"], window.example
            null[i] = min(null[i], float(start[window.cls] + end[window.cls]))
            score, first, last = best_span(start, end, window.context)
            if score > best[i][0]:
                text = self._questions[i].context[window.offsets[first, 0] : window.offsets[last, 1]]
                best[i] = (score, text)
        return [
            "" if self._unanswerable and none > score else text for none, (score, text) in zip(null, best, strict=True)
        ]

    def texts(self, limit: int) -> list[Any]:
        return [[q.question, q.context] for q in self._questions[:limit]]

    def _read(self, indices: Sequence[int]) -> list[Window]:
        """Tokenise questions with their contexts into windows, in order."""
        question_length = min(QUESTION_LENGTH, self._max_length // 4)
        special = self._tokenizer.num_special_tokens_to_add(pair=True)
        stride = min(STRIDE, (self._max_length - question_length - special) // 2)
        out: list[Window] = []
        for begin in range(0, len(indices), _CHUNK):
            chunk = indices[begin : begin + _CHUNK]
            encoding = self._tokenizer(
                self._cut_questions(chunk, question_length),
                [self._questions[i].context for i in chunk],
                truncation="only_second",
                max_length=self._max_length,
                stride=stride,
                return_overflowing_tokens=True,
                return_offsets_mapping=True,
            )
            names = token_inputs(encoding, self._config)
            for w, sample in enumerate(encoding["overflow_to_sample_mapping"]):
                row = Row(features(encoding, names, w))
                context = np.array([s == 1 for s in encoding.sequence_ids(w)])
                offsets = np.asarray(encoding["offset_mapping"][w])
                window = Window(chunk[sample], row, offsets, context, self._cls(row))
                row.label = self._label(window)
                out.append(window)
        return out

    def _cut_questions(self, indices: Sequence[int], length: int) -> list[str]:
        texts = [self._questions[i].question.strip() for i in indices]
        tokens = self._tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
        offsets = tokens["offset_mapping"]
        return [t if len(o) <= length else t[: o[length - 1][1]] for t, o in zip(texts, offsets, strict=True)]

    def _cls(self, row: Row) -> int:
        found = np.flatnonzero(row.features["input_ids"] == self._tokenizer.cls_token_id)
        return int(found[0]) if found.size else 0

    def _label(self, window: Window) -> tuple[int, int] | None:
        """Return the answer's first and last token in this window, or the CLS position twice."""
        answers = self._questions[window.example].answers
        if answers is None:
            return None
        nowhere = (window.cls, window.cls)
        positions = np.flatnonzero(window.context)
        if not answers or not positions.size:
            return nowhere
        text, begin = answers[0]
        end = begin + len(text)
        starts, ends = window.offsets[positions].T
        if starts[0] > begin or ends[-1] < end:
            return nowhere
        first = int(np.argmax(ends > begin))
        last = int(np.flatnonzero(starts < end)[-1])
        return int(positions[first]), int(positions[max(first, last)])


def best_span(start: np.ndarray, end: np.ndarray, context: np.ndarray) -> tuple[float, int, int]:
    """Return (score, first, last) of the best span of logits (T,) inside the context.

    The pairs of the 20 best starts and 20 best ends are tried; an answer has at most 30 tokens. The score
    is -inf where there is none.
    """
    positions = np.flatnonzero(context)
    firsts, lasts = (positions[np.argsort(-x[positions], kind="stable")[:N_BEST]] for x in (start, end))
    length = lasts[None, :] - firsts[:, None] + 1  # (starts, ends)
    scores = np.where((length > 0) & (length <= ANSWER_LENGTH), start[firsts][:, None] + end[lasts], -np.inf)
    if not scores.size:
        return -np.inf, 0, 0
    i, j = np.unravel_index(int(scores.argmax()), scores.shape)
    return float(scores[i, j]), int(firsts[i]), int(lasts[j])


def load_qa(hub: str, unanswerable: bool | None, request: LoadRequest) -> TaskData:
    """Load a folder with train* and validation*|dev* files, a single file (split by context), or the hub.

    `unanswerable` says whether questions may have no answer; None: if any in the data has none. Raises
    DataError for missing files, malformed questions, or unanswerable ones where there should be none.
    """
    require_fast(request.tokenizer, request.task)
    if request.data is None and hub:
        splits = fetch(hub)
        train, evaluation = (
            questions_from_table(Table(f"{hub} {name}", splits[name].to_dict())) for name in ("train", "validation")
        )
    else:
        data = require_path(request.data, request.task)
        if data.is_dir():
            train, evaluation = (read_questions(path) for path in split_files(data, SUFFIXES))
        else:
            whole = read_questions(data)
            parts = split_by_content([[q.context] for q in whole], str(data))
            train, evaluation = ([whole[i] for i in part] for part in parts)
    without = next((q.id for q in (*train, *evaluation) if q.answers == ()), None)
    if unanswerable is False and without is not None:
        raise DataError(
            f"The task '{request.task}' takes answerable questions only, but question {without} has no answer.",
            hint="Use --task squad_v2.",
        )
    may = without is not None if unanswerable is None else unanswerable
    both = {
        name: QaSplit(name, questions, request, unanswerable=may)
        for name, questions in (("train", train), ("validation", evaluation))
    }
    metric = "f1" if both["validation"].labelled else None
    return TaskData(request.task, "qa", metric, both["train"], {"validation": both["validation"]})


SPECS = [
    TaskSpec("squad", "qa", partial(load_qa, "rajpurkar/squad", False)),
    TaskSpec("squad_v2", "qa", partial(load_qa, "rajpurkar/squad_v2", True)),
    TaskSpec("question-answering", "qa", partial(load_qa, "", None)),
]
