"""Map the labels of the data onto the model's class numbers."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

from ..errors import DataError

_INTEGER = re.compile(r"\s*[+-]?\d+(\.0*)?\s*")


def model_labels(config: Any) -> list[str]:
    """Return the model's class names in the order of its outputs."""
    id2label = {int(key): str(name) for key, name in (config.id2label or {}).items()}
    return [id2label.get(i, f"LABEL_{i}") for i in range(int(config.num_labels))]


def is_generic(names: Sequence[str]) -> bool:
    """Say whether the names only count (LABEL_0, LABEL_1 ...) and so mean nothing."""
    return all(name in (f"LABEL_{i}", str(i)) for i, name in enumerate(names))


def canonical_order(names: Sequence[str], canonical: Sequence[str]) -> list[int] | None:
    """Return the model's class for each canonical name; None where the model uses other names."""
    if is_generic(names):
        return list(range(len(canonical)))
    own = {fold(name): i for i, name in enumerate(names)}
    if sorted(own) != sorted(fold(name) for name in canonical):
        return None
    return [own[fold(name)] for name in canonical]


def class_ids(
    values: Sequence[Any],
    where: Callable[[int], str],
    names: Sequence[str],
    canonical: Sequence[str] = (),
) -> list[int]:
    """Map labels to class numbers: names by the model's names, integers as they are.

    `canonical` are a known task's class names in the order that its data count them: a model that uses
    these names in another order gets its own order, one with generic names gets the canonical order.
    `where(i)` says where value i stands. Raises DataError naming the labels the model does not have.
    """
    exact = {name: i for i, name in enumerate(names)}
    loose = {fold(name): i for i, name in enumerate(names)}
    order = canonical_order(names, canonical) if canonical else None
    task = {fold(name): i for i, name in enumerate(canonical)}

    def lookup(value: Any) -> int | None:
        number = _integer(value)
        if number is not None and order is not None:
            return order[number] if 0 <= number < len(order) else None
        text = str(value)
        if text in exact or fold(text) in loose:
            return exact.get(text, loose.get(fold(text)))
        if order is not None and fold(text) in task:
            return order[task[fold(text)]]
        return number if number is not None and 0 <= number < len(names) else None

    known: dict[str, int | None] = {}  # by repr: a value need not be hashable
    unknown: dict[str, int] = {}
    for i, value in enumerate(values):
        key = repr(value)
        if key not in known:
            known[key] = lookup(value)
        if known[key] is None:
            unknown.setdefault(key, i)
    if unknown:
        raise _mismatch(unknown, where, names)
    return [known[repr(value)] for value in values]  # type: ignore[misc]


def float_targets(values: Sequence[Any], where: Callable[[int], str]) -> list[float]:
    """Read labels as finite numbers. Raises DataError for the first that is not."""
    out = []
    for i, value in enumerate(values):
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise DataError(
                f"{where(i)}: a regression label must be a number, found {value!r}.",
                hint="Mend the row, name another column with --label-column, or choose another task.",
            )
        out.append(number)
    return out


def _mismatch(unknown: dict[str, int], where: Callable[[int], str], names: Sequence[str]) -> DataError:
    first = next(iter(unknown.values()))
    found = ", ".join(list(unknown)[:5]) + (", ..." if len(unknown) > 5 else "")
    own = ", ".join(f"{i}={name}" for i, name in enumerate(names[:12]))
    own += ", ..." if len(names) > 12 else ""
    return DataError(
        f"Label mismatch: the data have labels that the model does not: {found} (first at {where(first)}). "
        f"The model has {len(names)}: {own}.",
        hint="Use integers, name the classes in id2label and label2id of the model's config.json, "
        "or name another column with --label-column.",
    )


def fold(name: str) -> str:
    return re.sub(r"[\s_-]+", "_", name.strip().lower())


def _integer(value: Any) -> int | None:
    if isinstance(value, float):
        return int(value) if value.is_integer() else None
    if isinstance(value, int):  # bool too
        return int(value)
    return int(float(value)) if isinstance(value, str) and _INTEGER.fullmatch(value) else None
