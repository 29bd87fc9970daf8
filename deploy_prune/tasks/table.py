"""Read a file of examples into named columns: csv, tsv, json, jsonl, parquet."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..documents import one_line, parse_json
from ..errors import DataError, MissingExtraError

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
MOST_PARQUET_BYTES = 8 * 2**30  # decoded; a few bytes of a run-length encoding can stand for any number of rows
_PARQUET_ROWS = 1024  # that are decoded at once


@dataclass
class Table:
    """Hold columns of equal length, and where each row came from (for error messages)."""

    source: str
    columns: dict[str, list[Any]]
    lines: list[int] | None = None  # line of each row in the file, from 1; None where there are none

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), []))

    def where(self, row: int) -> str:
        return f"{self.source}, line {self.lines[row]}" if self.lines else f"{self.source}, row {row + 1}"

    def column(self, name: str, option: str = "--text-column") -> list[Any]:
        """Return one column. Raises DataError naming the columns there are."""
        if name not in self.columns:
            raise DataError(
                f"{self.source} has no column '{name}'; it has: {', '.join(self.columns) or 'none'}.",
                hint=f"Name the column with {option}.",
            )
        return self.columns[name]

    def texts(self, name: str) -> list[str]:
        """Return a column of strings. Raises DataError for the first value that is not one."""
        values = self.column(name)
        for row, value in enumerate(values):
            if not isinstance(value, str):
                raise DataError(
                    f"{self.where(row)}: column '{name}' should hold text, found {value!r:.200}.",
                    hint="Mend or remove the row, or name another column with --text-column.",
                )
        return values

    def select(self, indices: Sequence[int]) -> Table:
        columns = {name: [values[i] for i in indices] for name, values in self.columns.items()}
        return Table(self.source, columns, [self.lines[i] for i in indices] if self.lines else None)


def read_table(path: Path, *, header: Sequence[str] = (), skip_malformed: bool = False) -> Table:
    """Read one file by its suffix. Tab-separated files take quotes literally, as GLUE does.

    `header` names the columns of a tsv file that has no header line; `skip_malformed` drops its rows of
    the wrong width. Raises DataError for a missing, empty, unreadable or malformed file.
    """
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise DataError(f"{path} is not a known kind of data file.", hint=f"Known: {', '.join(SUFFIXES)}.")
    try:
        if suffix == ".parquet":
            table = _read_parquet(path)
        elif suffix in (".csv", ".tsv"):
            table = _read_separated(path, header, skip_malformed)
        else:
            table = table_from_records(str(path), *_read_json(path))
    except OSError as error:
        raise DataError(f"Cannot read {path}: {error.strerror or error}.", hint="Check the path.") from error
    except csv.Error as error:
        raise DataError(f"{path} is not well-formed: {error}.", hint="Mend the file.") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8: {error}.", hint="Convert the file to UTF-8.") from error
    if len(table) == 0:
        raise DataError(f"{path} holds no rows.", hint="Give a file with at least one example.")
    return table


def table_from_records(source: str, records: Sequence[dict[str, Any]], lines: list[int] | None = None) -> Table:
    """Turn records into columns; a key missing from a record is None there."""
    names = dict.fromkeys(name for record in records for name in record)
    return Table(source, {name: [record.get(name) for record in records] for name in names}, lines)


def _read_separated(path: Path, header: Sequence[str], skip_malformed: bool) -> Table:
    csv.field_size_limit(2**31 - 1)
    tabs = path.suffix.lower() == ".tsv"
    rows: list[list[str]] = []
    lines: list[int] = []
    names = list(header)
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE) if tabs else csv.reader(file)
        for row in reader:
            if not row:
                continue
            if not names:
                names = row
            elif len(row) == len(names):
                rows.append(row)
                lines.append(reader.line_num)
            elif not skip_malformed:
                raise DataError(
                    f"{path}, line {reader.line_num}: found {len(row)} fields, expected {len(names)} "
                    f"({', '.join(names)}).",
                    hint="Mend or remove the line.",
                )
    return Table(str(path), {name: [row[i] for row in rows] for i, name in enumerate(names)}, lines)


def _read_json(path: Path) -> tuple[list[dict[str, Any]], list[int] | None]:
    """Return the records of a list, or of one object per line with their line numbers."""
    text = path.read_text(encoding="utf-8-sig")
    if text.lstrip().startswith("["):
        try:
            records = parse_json(text)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}, line {error.lineno}: not JSON: {error.msg}.") from error
        except ValueError as error:
            raise DataError(f"{path}: not JSON: {one_line(error)}.") from error
        for row, record in enumerate(records):
            _require_object(record, f"{path}, row {row + 1}")
        return records, None
    pairs = list(_json_lines(path, text))
    return [record for record, _ in pairs], [line for _, line in pairs]


def _json_lines(path: Path, text: str) -> Iterator[tuple[dict[str, Any], int]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = parse_json(line)
        except ValueError as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else one_line(error)
            raise DataError(
                f"{path}, line {number}: not JSON: {reason}.", hint="Each line must be one JSON object."
            ) from error
        _require_object(record, f"{path}, line {number}")
        yield record, number


def _require_object(record: Any, where: str) -> None:
    if not isinstance(record, dict):
        raise DataError(f"{where}: expected a JSON object, found {type(record).__name__}.")


def _read_parquet(path: Path) -> Table:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise MissingExtraError("pyarrow", "cpu") from error
    columns: dict[str, list[Any]] = {}
    decoded = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(_PARQUET_ROWS):
                decoded += batch.nbytes
                if decoded > MOST_PARQUET_BYTES:
                    raise DataError(f"{path} takes more than {MOST_PARQUET_BYTES >> 30} GiB of memory.")
                for name, values in batch.to_pydict().items():
                    columns.setdefault(name, []).extend(values)
            names = file.schema_arrow.names
    except (pa.ArrowException, ValueError, OverflowError) as error:
        raise DataError(f"{path} is not a parquet file: {one_line(error)}.") from error
    return Table(str(path), columns or {name: [] for name in names})
