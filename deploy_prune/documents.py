"""Read JSON and TOML of strangers: bounded in size and depth, every fault a ValueError. No torch here."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

MOST_BYTES = 1 << 26  # of a document that describes something; files of data have no such bound


def read_text(path: str | Path, *, most_bytes: int = MOST_BYTES, encoding: str = "utf-8") -> str:
    """Return a text file's contents, not reading more than is allowed.

    Raises OSError, and ValueError for what is larger or not UTF-8.
    """
    with open(path, "rb") as file:
        raw = file.read(most_bytes + 1)
    if len(raw) > most_bytes:
        raise ValueError(f"it is larger than {most_bytes:,} bytes")
    return raw.decode(encoding)


def parse_json(text: str) -> Any:
    """Return what a JSON text says. Raises ValueError (JSONDecodeError where a place can be named)."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_json(path: str | Path, *, most_bytes: int = MOST_BYTES) -> Any:
    """Return what a JSON file says. Raises OSError or ValueError."""
    return parse_json(read_text(path, most_bytes=most_bytes))


def read_toml(path: str | Path, *, most_bytes: int = 1 << 20) -> dict[str, Any]:
    """Return what a TOML file says. Raises OSError or ValueError."""
    try:
        return tomllib.loads(read_text(path, most_bytes=most_bytes))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def one_line(error: BaseException, most: int = 200) -> str:
    """Return an error's first line, cut short: what a stranger wrote may be long."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:most]
