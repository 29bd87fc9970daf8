"""Find the text and label columns of a table by their usual names."""

from __future__ import annotations

from ..errors import DataError
from .table import Table

PAIRS = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("text1", "text2"),
    ("text_a", "text_b"),
    ("question", "sentence"),
    ("question", "passage"),
    ("query", "passage"),
    ("query", "document"),
    ("#1 String", "#2 String"),
)
SINGLES = ("text", "sentence", "content", "review", "document", "comment", "tweet", "body")
LABELS = ("label", "labels", "gold_label", "target", "class", "category", "score", "Quality", "is_duplicate")


def text_columns(table: Table, override: str | None, *, pair: bool | None) -> tuple[str, ...]:
    """Return the one or two text columns; `override` is "a" or "a,b", `pair` None takes either.

    One half of a pair is never taken for a single text unless `override` says so.
    Raises DataError naming the columns there are.
    """
    if override:
        # A column whose own name holds a comma is taken whole.
        names = (override,) if override in table.columns else tuple(n.strip() for n in override.split(","))
        for name in names:
            table.column(name)
        if len(names) > 2 or (pair is not None and len(names) != 1 + pair):
            wanted = "one or two columns" if pair is None else "two columns, 'a,b'" if pair else "one column"
            raise DataError(f"This task takes {wanted} of text, not {len(names)} ('{override}').")
        return names
    found_pair = next((p for p in PAIRS if set(p) <= set(table.columns)), None)
    found_single = next((s for s in SINGLES if s in table.columns), None)
    if found_pair and pair is not False:
        return found_pair
    if found_single and not pair and found_single not in (found_pair or ()):
        return (found_single,)
    other = ""
    if found_pair:
        other = " For a pair of texts, use --task text-pair."
    elif found_single:
        other = " For a single text, use --task text-classification."
    raise DataError(
        f"{table.source}: found no {'pair of text columns' if pair else 'single text column'} among: "
        f"{', '.join(table.columns)}.",
        hint=f"Name {'them with --text-column a,b' if pair else 'it with --text-column'}.{other}",
    )


def label_column(table: Table, override: str | None) -> str | None:
    """Return the label column, or None for unlabelled data (no such column, or nothing in it).

    Raises DataError when the column named by `override` is missing.
    """
    if override:
        table.column(override, "--label-column")
        name: str | None = override
    else:
        name = next((n for n in LABELS if n in table.columns), None)
    if name is not None and all(value is None for value in table.columns[name]):
        return None
    return name


def has_pair(table: Table, override: str | None = None) -> bool | None:
    """Say whether the rows are pairs of texts; None where the columns do not tell."""
    try:
        return len(text_columns(table, override, pair=None)) == 2
    except DataError:
        return None
