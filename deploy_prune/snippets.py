"""Read the movie-review snippets of the demo: sentences with a mean human sentiment score.

Source: Hutto and Gilbert, "VADER", ICWSM 2014 (movieReviewSnippets_GroundTruth.txt).
"""

from __future__ import annotations

import hashlib
import html
import re
from typing import TypedDict

# People rated from -4 to 4 in whole steps, 0 being neutral: a mean that rounds to 0 is neutral too.
NEUTRAL_BELOW = 0.5


class Snippet(TypedDict):
    """Hold one sentence; the label is 1 where people found it positive, 0 where negative."""

    text: str
    label: int


def parse_snippets(content: bytes) -> list[Snippet]:
    """Return the rows of tab-separated (id, mean score, text) lines, labelled by the sign of the score.

    Neutral sentences are left out, and of repeated ones the later.
    """
    rows: dict[str, Snippet] = {}
    for line in content.decode("utf-8").split("\n"):
        if not line.strip():
            continue
        _, score, text = line.split("\t", 2)
        text = " ".join(html.unescape(text).split())
        key = sentence_key(text)
        if key and abs(float(score)) >= NEUTRAL_BELOW:
            rows.setdefault(key, Snippet(text=text, label=int(float(score) > 0)))
    return list(rows.values())


def sentence_key(text: str) -> str:
    """Return what two copies of a sentence share, whatever their case, spacing and punctuation."""
    return " ".join(re.findall(r"\w+", text.casefold()))


def split_snippets(rows: list[Snippet], held_out: int) -> dict[str, list[Snippet]]:
    """Hold out the rows whose sentences hash lowest: a fixed split, whatever the order of the rows."""
    ranked = sorted(rows, key=lambda row: hashlib.sha256(sentence_key(row["text"]).encode()).digest())
    return {"train": ranked[held_out:], "validation": ranked[:held_out]}
