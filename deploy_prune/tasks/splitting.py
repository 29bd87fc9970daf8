"""Split one file into calibration and evaluation rows, the same way every time."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from ..errors import DataError

EVALUATION_SHARE = 0.2


def split_by_content(keys: Sequence[Sequence[str]], source: str) -> tuple[list[int], list[int]]:
    """Return the row numbers for calibration and evaluation; no text stands on both sides.

    Each row has one or more texts. Rows that share a text (but for case and spacing) form a group, and a
    group goes to evaluation when the SHA-256 of its first text in sorted order falls in the lowest fifth:
    neither the order of the rows nor a seed matters. Raises DataError when a side is left empty.
    """
    folded = [[t for text in texts if (t := " ".join(text.casefold().split()))] or [""] for texts in keys]
    parent: dict[str, str] = {}

    def root(text: str) -> str:
        while parent.setdefault(text, text) != text:
            parent[text] = parent[parent[text]]
            text = parent[text]
        return text

    for texts in folded:
        for text in texts:
            a, b = sorted((root(texts[0]), root(text)))
            parent[b] = a  # the smaller text leads, so a group's root is its first text
    train: list[int] = []
    evaluation: list[int] = []
    for row, texts in enumerate(folded):
        (evaluation if _unit_hash(root(texts[0])) < EVALUATION_SHARE else train).append(row)
    if not train or not evaluation:
        raise DataError(
            f"{source}: its {len(keys)} rows cannot be split into calibration and evaluation rows without "
            "a text in both.",
            hint="Give a folder with train.* and validation.* instead.",
        )
    return train, evaluation


def _unit_hash(text: str) -> float:
    """Return a number in [0, 1) from the text alone."""
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:7]) / 2**56
