"""Read arrays of .npz files: no pickles, every array measured before it is loaded, bombs refused. No torch here."""

from __future__ import annotations

import lzma
import math
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np

from .documents import one_line
from .errors import DataError

MAX_BYTES = 8 * 2**30  # of all arrays; more should lie in files that are read piece by piece
MAX_RATIO = 200  # of an array's size to what it takes in the file, beyond SMALL: numpy's own files stay far below
SMALL = 1 << 26
_FAULTS = (
    *(OSError, EOFError, ValueError, RuntimeError, OverflowError, MemoryError, SyntaxError, TypeError),
    *(NotImplementedError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error, tokenize.TokenError),
)  # what zipfile, its decompressors and numpy's header raise for broken files


class Npz:
    """Give the arrays of an open .npz file; made by `open_npz`."""

    def __init__(self, path: Path, archive: zipfile.ZipFile) -> None:
        self.path, self.archive = path, archive
        self.members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
        self.loaded_bytes = 0

    def file(self, name: str) -> str:
        """Return the name of an array's file in the archive."""
        return self.members[name].filename

    def load(self, name: str) -> np.ndarray:
        """Load one array after its header was compared with its size. Raises DataError."""
        info = self.members[name]
        where = f"{self.path}: '{info.filename}'"
        with self.archive.open(info) as file:
            shape, dtype = _header(file)
            header = file.tell()
        if dtype.hasobject:
            raise DataError(
                f"{where} holds Python objects, which are pickled.", hint="Store numbers, or text as numpy str."
            )
        size = math.prod(shape) * dtype.itemsize
        if size != info.file_size - header or dtype.itemsize == 0 or min(shape, default=0) < 0:
            raise DataError(f"{where} is broken: {shape} of {dtype} does not fill it.", hint="Write the file again.")
        self.loaded_bytes += size
        if self.loaded_bytes > MAX_BYTES:
            raise DataError(
                f"{where} takes {size / 2**30:.0f} GiB of memory.", hint="Give folders of images, or parquet files."
            )
        if size > SMALL and size > MAX_RATIO * info.compress_size:
            raise DataError(
                f"{where} has {size:,} bytes in {info.compress_size:,}: it looks like a decompression bomb.",
                hint="If it is none, store it uncompressed, by numpy.savez.",
            )
        with self.archive.open(info) as file:
            return np.lib.format.read_array(file, allow_pickle=False)


@contextmanager
def open_npz(path: Path) -> Iterator[Npz]:
    """Open a .npz file. Raises DataError for what is none or is damaged, here and when arrays are loaded."""
    try:
        with zipfile.ZipFile(path) as archive:
            yield Npz(path, archive)
    except _FAULTS as error:
        raise DataError(
            f"{path} is not a readable .npz file: {one_line(error)}", hint="Write it with numpy.savez."
        ) from error


def read_npz(path: Path, names: Sequence[str] | None = None) -> dict[str, np.ndarray]:
    """Return the arrays of these names (None: all). Raises DataError, also for a name that is not there."""
    with open_npz(path) as npz:
        if missing := set(names or ()) - set(npz.members):
            raise DataError(f"{path} has no array '{min(missing)}'.")
        return {name: npz.load(name) for name in (npz.members if names is None else names)}


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype]:
    version = np.lib.format.read_magic(file)
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in read:
        raise ValueError(f"unknown version {version} of the array format")
    shape, _, dtype = read[version](file)
    return shape, dtype
