"""Token classification: CoNLL-2003 and data of the same form."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from .base import RowOutput, TaskData
from .conll import CONLL_SUFFIXES, TABLE_SUFFIXES, Sentences, read_sentences, sentences_from_table
from .encoding import EncodedSplit, require_fast, require_words
from .labels import class_ids, is_generic, model_labels
from .metrics import tag_scores
from .source import fetch, require_path, split_files
from .spec import LoadRequest, TaskSpec
from .splitting import split_by_content
from .table import Table

IGNORE = -100
CONLL2003 = ("O", "B-PER", "I-PER", "B-ORG", "I-ORG", "B-LOC", "I-LOC", "B-MISC", "I-MISC")


class TagSplit(EncodedSplit):
    """Hold sentences of words with one tag each; a word is labelled on its first token."""

    def __init__(
        self, name: str, sentences: Sentences, tags: list[list[int]] | None, names: list[str], request: LoadRequest
    ) -> None:
        self.name = name
        self.labelled = tags is not None
        self._words = sentences.words
        self._tags = tags
        self._names = names
        super().__init__(request)

    def __len__(self) -> int:
        return len(self._words)

    def _tokenize(self, indices: Sequence[int]) -> Any:
        words = [self._words[i] for i in indices]
        return self._tokenizer(words, is_split_into_words=True, truncation=True, max_length=self._max_length)

    def score(self, outputs: Sequence[RowOutput], dense: Sequence[RowOutput] | None = None) -> dict[str, float]:
        """Score the tags of the words that were not cut off; entity F1 first, if tags are of entities."""
        if not self.labelled:
            return {}
        predictions, labels = [], []
        for row, output in zip(self.rows(), outputs, strict=True):
            counts = row.label != IGNORE  # (T,)
            predictions.append([self._names[i] for i in output["logits"].argmax(axis=-1)[counts]])
            labels.append([self._names[i] for i in row.label[counts]])
        scores = tag_scores(predictions, labels)
        return scores if has_entities(self._names) else {"accuracy": scores["accuracy"]}

    def texts(self, limit: int) -> list[Any]:
        return [list(words) for words in self._words[:limit]]

    def _label(self, encoding: Any, row: int, index: int) -> np.ndarray | None:
        """Return the tag numbers (T,), -100 except on each word's first token."""
        if self._tags is None:
            return None
        word_ids = encoding.word_ids(row)
        out = np.full(len(word_ids), IGNORE, dtype=np.int64)
        seen: set[int | None] = {None}
        for position, word in enumerate(word_ids):
            if word not in seen:
                seen.add(word)
                out[position] = self._tags[index][word]
        return out


def has_entities(names: Sequence[str]) -> bool:
    """Say whether the tags mark entities (B-, I-, ...), so that an entity F1 means something."""
    return any(name[:2] in ("B-", "I-", "E-", "S-", "L-", "U-") for name in names)


def load_tags(hub: str, canonical: tuple[str, ...], request: LoadRequest) -> TaskData:
    """Load a folder with train* and validation* files, a single file (split by sentence), or the hub.

    Raises DataError for missing files, malformed lines, or tags that the model does not have.
    """
    require_fast(request.tokenizer, request.task)
    require_words(request.tokenizer)
    words, tags = request.text_column, request.label_column
    if request.data is None and hub:
        splits = fetch(hub, revision="refs/convert/parquet")
        train, evaluation = (
            sentences_from_table(Table(f"{hub} {name}", splits[name].to_dict()), words, tags)
            for name in ("train", "validation")
        )
    else:
        data = require_path(request.data, request.task)
        if data.is_dir():
            paths = split_files(data, (*CONLL_SUFFIXES, *TABLE_SUFFIXES))
            train, evaluation = (read_sentences(path, words, tags) for path in paths)
        else:
            whole = read_sentences(data, words, tags)
            parts = split_by_content([[" ".join(s)] for s in whole.words], str(data))
            train, evaluation = (whole.select(part) for part in parts)
    names = model_labels(request.config)
    shown = list(canonical) if canonical and is_generic(names) else names
    both = {
        name: TagSplit(name, sentences, _tag_ids(sentences, names, canonical), shown, request)
        for name, sentences in (("train", train), ("validation", evaluation))
    }
    metric = ("f1" if has_entities(shown) else "accuracy") if both["validation"].labelled else None
    return TaskData(request.task, "token", metric, both["train"], {"validation": both["validation"]}, shown)


def _tag_ids(sentences: Sentences, names: list[str], canonical: tuple[str, ...]) -> list[list[int]] | None:
    if sentences.tags is None:
        return None
    owner = [row for row, tags in enumerate(sentences.tags) for _ in tags]
    flat = [tag for tags in sentences.tags for tag in tags]
    ids = iter(class_ids(flat, lambda i: sentences.where[owner[i]], names, canonical))
    return [[next(ids) for _ in tags] for tags in sentences.tags]


SPECS = [
    TaskSpec("conll2003", "token", partial(load_tags, "eriktks/conll2003", CONLL2003), CONLL2003),
    TaskSpec("token-classification", "token", partial(load_tags, "", ())),
]
