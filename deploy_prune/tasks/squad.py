"""Read questions and answers: the official SQuAD json, or flat rows as on the hub."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..documents import parse_json
from ..errors import DataError
from .table import Table, read_table


@dataclass(frozen=True)
class Question:
    """Hold one question; `answers` are (text, first character) pairs, none if it is unanswerable.

    `answers` is None where nobody says what the answer is (unlabelled).
    """

    id: str
    question: str
    context: str
    answers: tuple[tuple[str, int], ...] | None


def read_questions(path: Path) -> list[Question]:
    """Read one file: .json with SQuAD's "data", else rows with question, context and answers.

    Raises DataError naming the file and the question for missing fields or answers not in the context.
    """
    if path.suffix.lower() == ".json":
        try:
            document = parse_json(path.read_text(encoding="utf-8-sig"))
        except (OSError, ValueError):
            document = None  # lines of json, or unreadable: read_table reads the one and explains the other
        if isinstance(document, dict) and "data" in document:
            return _from_squad(document, str(path))
    return questions_from_table(read_table(path))


def questions_from_table(table: Table) -> list[Question]:
    """Turn flat rows into questions; answers are {"text": [..], "answer_start": [..]}."""
    ids = table.columns.get("id") or [str(i) for i in range(len(table))]
    texts, contexts = table.texts("question"), table.texts("context")
    answers = table.columns.get("answers") or [None] * len(table)
    if all(a is None for a in answers):
        return [Question(str(i), q, c, None) for i, q, c in zip(ids, texts, contexts, strict=True)]
    return [
        Question(str(ids[i]), texts[i], contexts[i], _answers(answers[i], contexts[i], table.where(i)))
        for i in range(len(table))
    ]


def _from_squad(document: dict[str, Any], source: str) -> list[Question]:
    out: list[Question] = []
    where = source
    try:
        for article in document["data"]:
            for paragraph in article["paragraphs"]:
                context = paragraph["context"]
                for qa in paragraph["qas"]:
                    where = f"{source}, question {qa.get('id')}"
                    raw = [] if qa.get("is_impossible") else qa.get("answers")
                    answers = None if raw is None else _answers(raw, context, where)
                    if not isinstance(context, str) or not isinstance(qa["question"], str):
                        raise TypeError("its question and context should be texts")
                    out.append(Question(str(qa["id"]), qa["question"], context, answers))
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{where} is not in SQuAD's form: {type(error).__name__}: {error}.",
            hint="Expected data[].paragraphs[].{context, qas[].{id, question, answers[].{text, answer_start}}}.",
        ) from error
    if not out:
        raise DataError(f"{source} holds no questions.", hint="Give a file with at least one question.")
    if len({q.answers is None for q in out}) > 1:
        missing = next(q.id for q in out if q.answers is None)
        raise DataError(f"{source}: some questions have answers, but question {missing} has no such field.")
    return out


def _answers(raw: Any, context: str, where: str) -> tuple[tuple[str, int], ...]:
    """Check the answers of one question, moving a start that is off to the nearest occurrence."""
    try:
        if isinstance(raw, dict):
            pairs = list(zip(raw["text"], raw["answer_start"], strict=True))
        else:
            pairs = [(a["text"], a["answer_start"]) for a in raw]
        return tuple((text, _nearest(text, int(start), context, where)) for text, start in pairs)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise DataError(
            f"{where}: its answers are {raw!r:.200}.", hint="Expected a text and an answer_start for each."
        ) from error


def _nearest(text: str, start: int, context: str, where: str) -> int:
    if start >= 0 and context.startswith(text, start):
        return start
    # Two searches, since an occurrence of each at every character would take quadratic time.
    at = min(max(start, 0), len(context))
    found = [i for i in (context.rfind(text, 0, at + len(text)), context.find(text, at)) if i >= 0]
    if not found or not text:
        raise DataError(
            f"{where}: the answer {text!r:.200} does not stand in its context.",
            hint="Mend the answer; an unanswerable question has an empty list of answers.",
        )
    return min(found, key=lambda i: abs(i - start))
