"""Write files whole or not at all, by one run at a time, with errors that say what is wrong with the disk. No torch."""

from __future__ import annotations

import errno
import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import DeployPruneError, InputError, SystemStateError

PACKAGE = Path(__file__).resolve().parent
ELSEWHERE = ("export", "runtime_bench")  # lie in PACKAGE only where a wheel was installed


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file's bytes."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def code_hash(package: Path = PACKAGE) -> str:
    """Return the SHA-256 of the sources that prune, the same however they are installed."""
    sources = {path.relative_to(package): path for path in package.rglob("*.py")}
    hashes = [sha256_file(path) for name, path in sorted(sources.items()) if name.parts[0] not in ELSEWHERE]
    return hashlib.sha256(" ".join(hashes).encode()).hexdigest()


def make_room(*paths: Path | None) -> None:
    """Make the folders of files that are to be written, before the work whose results they take.

    Raises InputError for a path that is a folder, or lies in a file.
    """
    for path in (p for p in paths if p is not None):
        try:
            with disk_errors(path):
                path.parent.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise InputError(f"{path} cannot be written: {error.filename} is a file.", hint="Name another.") from error
        if path.is_dir():
            raise InputError(f"{path} is a folder.", hint="Name a file in it.")


def write_atomically(path: Path, text: str) -> None:
    """Write a text file so that readers see the old or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with disk_errors(path):
        try:
            with open(temporary, "w", encoding="utf-8") as f:
                f.write(text)
                f.flush()
                os.fsync(f.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        fsync(path.parent)


def share(path: Path) -> None:
    """Let those read and write a file who may do so in its folder: safetensors makes files for their owner alone."""
    with suppress(PermissionError):  # a file system without modes
        path.chmod(path.parent.stat().st_mode & 0o666)


def fsync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def real_path(destination: str | Path) -> Path:
    """Return the path of a folder that may not be there yet, links followed: each has one lock, and one name beside."""
    return Path(os.path.realpath(destination))


@contextmanager
def locked(destination: str | Path) -> Iterator[None]:
    """Hold the lock of a bundle folder; raises SystemStateError when another run holds it."""
    from filelock import FileLock, Timeout  # readers need no lock, and start faster without it

    destination = real_path(destination)
    lock = FileLock(destination.parent / f".{destination.name}.lock")
    with disk_errors(destination):
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise SystemStateError(
                f"Another run is writing {destination}.", hint="Wait for it, or choose another --out."
            ) from error
    try:
        yield
    finally:
        lock.release()


@contextmanager
def disk_errors(where: Path) -> Iterator[None]:
    """Turn a full disk or a read-only folder into an error that says so."""
    try:
        yield
    except DeployPruneError:
        raise
    except Exception as error:
        number = _errno(error)
        if number in (errno.ENOSPC, errno.EDQUOT):
            raise SystemStateError(
                f"The disk is full: could not write {where}.", hint="Free some space, then run it again."
            ) from error
        if number in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise SystemStateError(
                f"No permission to write {where}: {os.strerror(number)}.",
                hint="Get the permission, or write elsewhere.",
            ) from error
        raise


def _errno(error: Exception) -> int | None:
    """Return the system's number of an error; safetensors and tokenizers, in Rust, have it in their text alone."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found else None
