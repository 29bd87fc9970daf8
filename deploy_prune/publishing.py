"""Put a new bundle in place as a whole: built in a staging folder beside its destination, then swapped in. No torch."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .bundle import Bundle, Manifest
from .disk import disk_errors, fsync, locked, real_path
from .errors import BundleError, DeployPruneError, InputError


@contextmanager
def staging(destination: str | Path, aside: Path | None = None) -> Iterator[Bundle]:
    """Build a new bundle in a hidden folder beside `destination`; removed if the block raises.

    The caller fills it and calls `publish`. Holds a lock, so that two runs cannot write one bundle. What was committed
    before a kill, Ctrl-C or a crash is moved to the folder `aside`, where its artifacts can be taken over from.
    """
    destination = real_path(destination)
    if destination.exists() and not (destination / "manifest.json").is_file():
        if not destination.is_dir():
            raise InputError(
                f"{destination} exists and is not a folder.", hint="Get the permission, or write elsewhere."
            )
        if any(destination.iterdir()):
            raise InputError(
                f"{destination} is not empty and is not a bundle.",
                hint="Choose another --out, or empty the folder: nothing in it was touched.",
            )
    with disk_errors(destination):
        try:
            destination.parent.mkdir(parents=True, exist_ok=True)
        except (FileNotFoundError, NotADirectoryError, FileExistsError) as error:
            raise InputError(f"Cannot make the folder {destination.parent}: {error.strerror}.") from error
    with locked(destination):
        root = destination.parent / f".{destination.name}.staging"
        with disk_errors(root):
            _finish_exchange(destination)
            _set_aside(root, aside)
            shutil.rmtree(root, ignore_errors=True)
            root.mkdir()
        try:
            with disk_errors(destination):
                yield Bundle(root, Manifest())
        except DeployPruneError:
            raise
        except BaseException:
            _set_aside(root, aside)
            raise
        finally:
            shutil.rmtree(root, ignore_errors=True)


def _set_aside(root: Path, aside: Path | None) -> None:
    """Move a half-built bundle in place of an older one, unless it has no artifacts yet."""
    if aside is None:
        return
    with suppress(BundleError):
        if Bundle.open(root, verify=False).manifest.artifacts:
            shutil.rmtree(aside, ignore_errors=True)
            aside.parent.mkdir(parents=True, exist_ok=True)
            os.rename(root, aside)


def publish(bundle: Bundle, destination: str | Path) -> Bundle:
    """Swap a finished staging bundle into place as a whole and return it opened there."""
    destination = real_path(destination)
    bundle.commit()
    with disk_errors(destination):
        for path in bundle.root.rglob("*"):
            fsync(path)
        if destination.exists():
            _exchange(bundle.root, destination)
        else:
            os.rename(bundle.root, destination)
        fsync(destination.parent)
    return Bundle.open(destination)


def _exchange(a: Path, b: Path) -> None:
    """Exchange two folders atomically (Linux renameat2); elsewhere by two renames."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        at_fdcwd, exchange = -100, 2
        if libc.renameat2(at_fdcwd, os.fsencode(a), at_fdcwd, os.fsencode(b), exchange) == 0:
            return
        if ctypes.get_errno() not in (errno.ENOSYS, errno.EINVAL):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(b))
    old = _moved_away(b)
    os.rename(b, old)
    try:
        os.rename(a, b)
    except OSError:
        os.rename(old, b)
        raise
    os.rename(old, a)


def _finish_exchange(b: Path) -> None:
    """Put back, or remove, the old folder that a kill between the renames of `_exchange` has left."""
    old = _moved_away(b)
    if (b / "manifest.json").is_file():
        shutil.rmtree(old, ignore_errors=True)
    elif old.is_dir():
        os.rename(old, b)


def _moved_away(b: Path) -> Path:
    return b.with_name(f".{b.name}.old")
