"""Change documents where random bytes would not come: values of JSON by others that readers stumble over."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from typing import Any

NASTY: tuple[Any, ...] = (
    *(None, True, 0, -1, 1, 2, 2**31, 2**63, 2**64, -(2**63), 10**400, 0.5, -0.0, 1e308, 1e-320),
    *(float("nan"), float("inf"), float("-inf"), "", "x", "0", "\x00", "\ud800", "²", "../x", "/etc/passwd"),
    *("a" * 300, "é\n", [], {}, [[]], [None], ["x"], {"x": 1}, [0, 1], [[0, 1], [2]], "FP32", "BYTES", "INT64", "BOOL"),
)


def mutate(data: bytes, random_: random.Random) -> bytes | None:
    """Return a document with one to three of its values changed; None where the bytes hold no JSON.

    What stands before the first brace and behind the last one stays.
    """
    begin = min((i for i in (data.find(b"{"), data.find(b"[")) if i >= 0), default=-1)
    end = max(data.rfind(b"}"), data.rfind(b"]")) + 1
    try:
        document = json.loads(data[begin:end].decode("utf-8")) if begin >= 0 else None
    except (ValueError, RecursionError):
        return None
    if not isinstance(document, dict | list):
        return None
    for _ in range(random_.randint(1, 3)):
        places = list(_places(document))
        if not places:
            break
        _change(*random_.choice(places), random_)
    return data[:begin] + json.dumps(document).encode() + data[end:]


def _places(document: Any) -> Iterator[tuple[Any, Any]]:
    """Yield every container with the key of each of its values."""
    stack = [document]
    while stack:
        held = stack.pop()
        items = held.items() if isinstance(held, dict) else enumerate(held)
        for key, value in items:
            yield held, key
            if isinstance(value, dict | list):
                stack.append(value)


def _change(held: Any, key: Any, random_: random.Random) -> None:
    how = random_.randrange(5)
    if how == 0:
        del held[key]
    elif how == 1 and isinstance(held, list):
        held.insert(key, copy.deepcopy(held[key]))
    elif how == 1:
        held[random_.choice(("", "x", "path", "kind", "files"))] = held.pop(key)
    elif how == 2 and type(held[key]) is int:
        held[key] += random_.choice((-1, 1))
    else:
        held[key] = copy.deepcopy(random_.choice(NASTY))
