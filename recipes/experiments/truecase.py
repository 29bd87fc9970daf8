"""Make a tagging task out of plain text: find the words that were capitalised, once all are lower-cased.

The text is that of SQuAD contexts. Runs of capitalised words that do not start a sentence are tagged
B-CAP, I-CAP, the others O: the gold labels come from the text itself.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

TAGS = ("O", "B-CAP", "I-CAP")
Sentence = list[tuple[str, str]]  # (lower-cased word, tag)


def write_conll(squad: Path, out: Path) -> None:
    """Write train.txt and validation.txt from the folder's *train.json and *valid.json; no sentence is in both."""
    out.mkdir(parents=True, exist_ok=True)
    seen: set[tuple[str, ...]] = set()
    for name, pattern in (("validation", "*valid.json"), ("train", "*train.json")):
        (source,) = squad.glob(pattern)
        blocks = []
        for sentence in tagged_sentences(source):
            words = tuple(word for word, _ in sentence)
            if words not in seen:
                seen.add(words)
                blocks.append("".join(f"{word} {tag}\n" for word, tag in sentence))
        (out / f"{name}.txt").write_text("\n".join(blocks), encoding="utf-8")


def tagged_sentences(source: Path) -> Iterator[Sentence]:
    """Yield the sentences of at least five words of a SQuAD file."""
    document = json.loads(source.read_text(encoding="utf-8"))
    for article in document["data"]:
        for paragraph in article["paragraphs"]:
            for text in re.split(r"(?<=[.!?])[\"”)]*\s+(?=[\"“(]*[A-Z])", paragraph["context"]):
                words = re.findall(r"\w+(?:[-'’]\w+)*|[^\w\s]", text)
                if len(words) >= 5:
                    yield tag(words)


def tag(words: list[str]) -> Sentence:
    """Tag the capitalised words, except the sentence's first word, and lower-case all."""
    tagged: Sentence = []
    started = inside = False
    for word in words:
        capital = started and word[0].isupper()
        tagged.append((word.lower(), ("I-CAP" if inside else "B-CAP") if capital else "O"))
        started, inside = started or word[0].isalnum(), capital
    return tagged
