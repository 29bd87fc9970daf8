"""Check the texts that go in, and read what a model gives out as answers, by the kind of its head."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import InputError

if TYPE_CHECKING:
    from tokenizers import Encoding

Text = str | tuple[str, str]
ANSWER_TOKENS = 30  # longest answer to a question


def check_texts(texts: str | Iterable[Text], head: str) -> list[Text]:
    """Return the texts as a list, a single string as a list of one.

    Raises InputError, with the number of the text, for what the head cannot read.
    """
    if isinstance(texts, str):
        texts = [texts]
    if not isinstance(texts, Iterable):
        raise InputError(f"Texts are expected, not {type(texts).__name__}.", hint="Give a string or a list of strings.")
    return [_check_text(i, text, head) for i, text in enumerate(texts)]


def _check_text(i: int, text: Any, head: str) -> Text:
    parts = [text] if isinstance(text, str) else text
    if not isinstance(parts, list | tuple) or len(parts) > 2 or not parts:
        raise InputError(
            f"Text {i} is {type(text).__name__}, neither a string nor a pair of strings.",
            hint="Give a list of strings, or of (string, string) pairs.",
        )
    for part in parts:
        if not isinstance(part, str):
            raise InputError(f"Text {i} holds {type(part).__name__}, not a string.", hint="Convert it with str().")
        if not _is_unicode(part):
            raise InputError(f"Text {i} holds half of a surrogate pair, which is no character.", hint="Clean it first.")
    if head == "qa" and len(parts) != 2:
        raise InputError(
            f"Text {i} is a single string, but this model answers questions.",
            hint="Give pairs of a question and the context to search: [(question, context), ...]",
        )
    if head == "token" and len(parts) != 1:
        raise InputError(f"Text {i} is a pair, but this model labels the tokens of one text.", hint="Give strings.")
    return (parts[0], parts[1]) if len(parts) == 2 else parts[0]


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def read_answers(
    head: str,
    outputs: Mapping[str, np.ndarray],
    prepared: Sequence[Any],
    given: Sequence[Any],
    names: Callable[[int], Sequence[str]],
) -> list[Any]:
    """Return the answer of each row; `names` gives the labels of that many classes. Raises InputError for no head.

    `given` are texts, `prepared` their encodings, where the answers speak of words.
    """
    if head == "classification":
        return [_class(p, names(len(p))) for p in softmax(outputs["logits"])]
    if head == "regression":
        return [{"value": float(row[0])} for row in outputs["logits"]]
    if head == "token":
        rows = zip(softmax(outputs["logits"]), prepared, given, strict=True)
        return [_tokens(p, encoding, str(text), names(p.shape[-1])) for p, encoding, text in rows]
    if head == "qa":
        spans = zip(outputs["start_logits"], outputs["end_logits"], prepared, given, strict=True)
        return [_answer(start, end, encoding, text[1]) for start, end, encoding, text in spans]
    if head == "embedding":
        return [{"embedding": row.copy()} for row in outputs["embedding"]]
    raise InputError(f"No answers are defined for the head '{head}'.", hint="Use outputs() for the raw tensors.")


def softmax(logits: np.ndarray) -> np.ndarray:
    """Return the probabilities along the last axis, in float64."""
    power = np.exp(logits.astype(np.float64) - logits.max(-1, keepdims=True))
    return power / power.sum(-1, keepdims=True)


def _class(probabilities: np.ndarray, names: Sequence[str]) -> dict[str, Any]:
    best = int(probabilities.argmax())
    scores = {name: float(p) for name, p in zip(names, probabilities, strict=True)}
    return {"label": names[best], "score": float(probabilities[best]), "scores": scores}


def _tokens(probabilities: np.ndarray, encoding: Encoding, text: str, names: Sequence[str]) -> list[dict[str, Any]]:
    found = []
    for p, (start, end), special in zip(probabilities, encoding.offsets, encoding.special_tokens_mask, strict=True):
        if not special:  # padding counts as special
            best = int(p.argmax())
            word = {"word": text[start:end], "start": start, "end": end}
            found.append({**word, "label": names[best], "score": float(p[best])})
    return found


def _answer(start: np.ndarray, end: np.ndarray, encoding: Encoding, context: str) -> dict[str, Any]:
    positions = np.flatnonzero([sequence == 1 for sequence in encoding.sequence_ids])
    if not positions.size:
        return {"answer": "", "start": 0, "end": 0, "score": 0.0}
    score, first, last = best_span(start[positions], end[positions])
    begin, stop = encoding.offsets[positions[first]][0], encoding.offsets[positions[last]][1]
    return {"answer": context[begin:stop], "start": begin, "end": stop, "score": score}


def best_span(start: np.ndarray, end: np.ndarray) -> tuple[float, int, int]:
    """Return (probability, first, last) of the best span of logits (T,), T > 0: first <= last, at most 30 tokens.

    A span's probability is that of its start times that of its end.
    """
    length = np.arange(len(end))[None, :] - np.arange(len(start))[:, None] + 1  # (starts, ends)
    # Logits are compared, not probabilities, which may all underflow to 0.
    totals = np.where((length > 0) & (length <= ANSWER_TOKENS), start[:, None] + end[None, :], -np.inf)
    first, last = (int(i) for i in np.unravel_index(int(totals.argmax()), totals.shape))
    return float(softmax(start)[first] * softmax(end)[last]), first, last
