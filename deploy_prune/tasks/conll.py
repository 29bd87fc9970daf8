"""Read sentences of tagged words: CoNLL columns, or rows with a list of words and a list of tags."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import DataError
from .table import Table, read_table

CONLL_SUFFIXES = (".txt", ".conll", ".iob", ".iob2", ".bio", ".tsv", ".train", ".testa", ".testb")
TABLE_SUFFIXES = (".jsonl", ".json", ".parquet")
WORDS = ("tokens", "words")
TAGS = ("ner_tags", "tags", "labels", "pos_tags")


@dataclass
class Sentences:
    """Hold words and their tags (None where there are none), and where each sentence came from."""

    words: list[list[str]] = field(default_factory=list)
    tags: list[list[Any]] | None = None
    where: list[str] = field(default_factory=list)

    def select(self, indices: Sequence[int]) -> Sentences:
        tags = None if self.tags is None else [self.tags[i] for i in indices]
        return Sentences([self.words[i] for i in indices], tags, [self.where[i] for i in indices])


def read_sentences(path: Path, words: str | None, tags: str | None) -> Sentences:
    """Read one file; `words` and `tags` name the columns (numbers from 0, or from the end, for CoNLL).

    Raises DataError naming the file and line for malformed rows.
    """
    if path.suffix.lower() in TABLE_SUFFIXES:
        return sentences_from_table(read_table(path), words, tags)
    if path.suffix.lower() not in CONLL_SUFFIXES:
        known = ", ".join((*CONLL_SUFFIXES, *TABLE_SUFFIXES))
        raise DataError(f"{path} is not a known kind of tagged file.", hint=f"Known endings: {known}.")
    return _read_conll(path, _column(words, 0), _column(tags, -1))


def sentences_from_table(table: Table, words: str | None, tags: str | None) -> Sentences:
    """Take the lists of words and tags from a table. Raises DataError for lists of unequal length."""
    word_name = words or next((n for n in WORDS if n in table.columns), WORDS[0])
    tag_name = tags or next((n for n in TAGS if n in table.columns), None)
    all_words = table.column(word_name)
    all_tags: list[Any] = table.column(tag_name, "--label-column") if tag_name else [None] * len(table)
    labelled = any(t is not None for t in all_tags)
    for row, (sentence, tagging) in enumerate(zip(all_words, all_tags, strict=True)):
        if not isinstance(sentence, list) or not all(isinstance(w, str) for w in sentence):
            raise DataError(f"{table.where(row)}: '{word_name}' should be a list of words, found {sentence!r:.200}.")
        if labelled and (not isinstance(tagging, list) or len(tagging) != len(sentence)):
            raise DataError(
                f"{table.where(row)}: '{tag_name}' should be a list of {len(sentence)} tags, found {tagging!r:.200}."
            )
    return Sentences(all_words, all_tags if labelled else None, [table.where(i) for i in range(len(table))])


def _read_conll(path: Path, word: int, tag: int) -> Sentences:
    """Read lines of columns; a blank line ends a sentence. Files of one column are unlabelled."""
    out = Sentences()
    all_tags: list[list[str]] = []
    width = 0
    inside = False
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip() or line.startswith("-DOCSTART-"):
            inside = False
            continue
        fields = line.split("\t") if "\t" in line else line.split()
        width = width or len(fields)
        if len(fields) != width or not -width <= tag < width or not -width <= word < width:
            raise DataError(
                f"{path}, line {number}: found {len(fields)} columns ({line.strip()[:60]!r}), expected {width} "
                f"with the word in column {word} and the tag in column {tag}.",
                hint="Mend the line, or name the columns by number with --text-column and --label-column.",
            )
        if not inside:
            out.words.append([])
            all_tags.append([])
            out.where.append(f"{path}, sentence at line {number}")
            inside = True
        out.words[-1].append(fields[word].strip())
        all_tags[-1].append(fields[tag].strip())
    if not out.words:
        raise DataError(f"{path} holds no sentences.", hint="Expected lines of a word and its tag.")
    out.tags = all_tags if width > 1 else None
    return out


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8-sig").split("\n")
    except OSError as error:
        raise DataError(f"Cannot read {path}: {error.strerror or error}.", hint="Check the path.") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8: {error}.", hint="Convert the file to UTF-8.") from error


def _column(name: str | None, default: int) -> int:
    try:
        return default if name is None else int(name)
    except ValueError:
        raise DataError(
            f"CoNLL files have no column names, so '{name}' means nothing.",
            hint="Give the column's number, from 0, or from the end: -1.",
        ) from None
