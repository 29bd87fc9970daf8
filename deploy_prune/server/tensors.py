"""Tensors of the Open Inference Protocol as numpy arrays: JSON, raw bytes, and texts.

Source: the protocol's specification, github.com/kserve/open-inference-protocol, and Triton's binary extension of it.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np

from ..errors import InputError
from .errors import TooLargeError

DTYPES = {
    "BOOL": np.bool_,
    "UINT8": np.uint8,
    "UINT16": np.uint16,
    "UINT32": np.uint32,
    "UINT64": np.uint64,
    "INT8": np.int8,
    "INT16": np.int16,
    "INT32": np.int32,
    "INT64": np.int64,
    "FP16": np.float16,
    "FP32": np.float32,
    "FP64": np.float64,
}
BYTES = "BYTES"
NAMES = {np.dtype(kind): name for name, kind in DTYPES.items()}
MOST_AXES = 8
MOST_TENSORS = 64  # of a request, in or out


def check_shape(name: str, datatype: str, shape: Sequence[Any], most_elements: int) -> tuple[int, ...]:
    """Return a tensor's shape. Raises InputError, before anything is allocated, for one that cannot be."""
    if datatype != BYTES and datatype not in DTYPES:
        raise InputError(f"Input {name}: there is no datatype {datatype!r}.", hint=f"Use {', '.join(DTYPES)}, {BYTES}.")
    sizes = list(shape)
    if not 1 <= len(sizes) <= MOST_AXES or not all(type(n) is int and n >= 1 for n in sizes):
        raise InputError(f"Input {name}: {sizes!r:.80} is no shape.", hint="Give the positive size of every axis.")
    if math.prod(sizes) > most_elements:
        raise TooLargeError(f"Input {name} has {math.prod(sizes):,} elements; at most {most_elements:,} are taken.")
    return tuple(sizes)


def from_json(name: str, datatype: str, shape: tuple[int, ...], data: Any) -> np.ndarray:
    """Return an array of JSON values, nested as the shape or flat. Raises InputError for values that are none of it."""
    if datatype == BYTES:
        return _texts(name, shape, _flat(name, data, math.prod(shape)))
    try:
        given = np.array(_numbers(data, math.prod(shape)))
        if given.dtype.kind not in "biuf":
            raise ValueError(f"{given.dtype} values")
        with np.errstate(over="ignore", invalid="ignore"):  # what does not fit is found below, or is Inf
            array: np.ndarray = given.astype(DTYPES[datatype]).reshape(shape)
        if array.dtype.kind != "f" and not np.array_equal(array, given.reshape(shape)):
            raise ValueError(f"values that are no {datatype}")
    except (ValueError, TypeError, OverflowError) as error:
        raise InputError(
            f"Input {name} does not hold {math.prod(shape)} values of {datatype}: {str(error).splitlines()[0]:.120}."
        ) from error
    return array


def from_bytes(name: str, datatype: str, shape: tuple[int, ...], raw: bytes | memoryview) -> np.ndarray:
    """Return an array of little-endian bytes; each text is preceded by its length (4 bytes). Raises InputError."""
    if datatype == BYTES:
        return _texts(name, shape, _split(name, bytes(raw), math.prod(shape)))
    dtype = np.dtype(DTYPES[datatype]).newbyteorder("<")
    wanted = math.prod(shape) * dtype.itemsize
    if len(raw) != wanted:
        raise InputError(f"Input {name} has {len(raw)} bytes; {datatype} {list(shape)} has {wanted}.")
    return np.frombuffer(raw, dtype).reshape(shape).astype(DTYPES[datatype], copy=False)


def check_finite(name: str, array: np.ndarray) -> None:
    """Raise InputError for NaN or Inf."""
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise InputError(f"Input {name} holds NaN or Inf.")


def to_bytes(array: np.ndarray) -> bytes:
    """Return an array's little-endian bytes; texts each with their length before them."""
    if array.dtype == object:
        return b"".join(struct.pack("<I", len(x)) + x for x in array.reshape(-1))
    return np.ascontiguousarray(array, array.dtype.newbyteorder("<")).tobytes()


def datatype_of(array: np.ndarray) -> str:
    """Return the protocol's name of an array's type."""
    return BYTES if array.dtype == object else NAMES[array.dtype]


def _numbers(data: Any, count: int) -> list[Any]:
    """Return the numbers of nested lists, flat. Raises ValueError before an array is made of what is none.

    numpy would make room for the longest text in the place of every value.
    """
    level = data if isinstance(data, list) else [data]
    while kinds := set(map(type, level)) - {int, float, bool}:
        if kinds != {list} or not all(type(part) is list for part in level):
            raise ValueError(f"{min(k.__name__ for k in kinds)} values")
        level = list(chain.from_iterable(level))
    if len(level) != count:
        raise ValueError(f"{len(level)} values")
    return level


def _flat(name: str, data: Any, count: int) -> list[bytes]:
    found, stack = [], [data]
    while stack:
        value = stack.pop()
        if isinstance(value, list):
            if len(value) > count:
                raise InputError(f"Input {name} has more than {count} texts.")
            stack.extend(reversed(value))
        elif isinstance(value, str):
            try:
                found.append(value.encode("utf-8"))
            except UnicodeEncodeError as error:
                raise InputError(f"Input {name} holds half of a surrogate pair.") from error
        else:
            raise InputError(f"Input {name} holds {type(value).__name__}, not a string.")
    return found


def _split(name: str, raw: bytes, count: int) -> list[bytes]:
    found: list[bytes] = []
    at = 0
    while at < len(raw):
        if at + 4 > len(raw):
            raise InputError(f"Input {name} ends inside a text's length.")
        (size,) = struct.unpack_from("<I", raw, at)
        if at + 4 + size > len(raw) or len(found) == count:
            raise InputError(f"Input {name} does not hold {count} texts, each with its length before it.")
        found.append(raw[at + 4 : at + 4 + size])
        at += 4 + size
    return found


def _texts(name: str, shape: tuple[int, ...], values: Sequence[bytes]) -> np.ndarray:
    if len(values) != math.prod(shape):
        raise InputError(f"Input {name} has {len(values)} texts, its shape {math.prod(shape)}.")
    array = np.empty(len(values), dtype=object)
    array[:] = values
    return array.reshape(shape)


def json_of(array: np.ndarray) -> list[Any]:
    """Return an array's values, flat, as JSON knows them."""
    flat = array.reshape(-1)
    if array.dtype == object:
        return [value.decode("utf-8", "replace") for value in flat]
    return flat.astype(np.float32).tolist() if array.dtype == np.float16 else flat.tolist()


def parameter(parameters: Mapping[str, Any] | None, name: str, default: Any = None) -> Any:
    """Return a parameter of a request, or the default."""
    return (parameters or {}).get(name, default)
