"""Type-check a plain installed copy of the package from outside the repository.

In an editable install mypy cannot follow the mapping of export/ and runtime_bench/ into deploy_prune, and
from the repository's root it silently checks deploy_prune/ alone.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from .wheel import ROOMS, ROOT, install


def main() -> int:
    """Run mypy; fail on an error of its own or where a file of the three folders was not checked."""
    with tempfile.TemporaryDirectory() as temporary:
        scratch = Path(temporary)
        install(scratch / "site", scratch)
        command = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml"), "-p", "deploy_prune"]
        command += ["--cache-dir", str(ROOT / ".mypy_cache"), "--linecount-report", str(scratch / "report")]
        environment = {**os.environ, "MYPYPATH": str(scratch / "site")}
        run = subprocess.run(command, cwd=scratch, env=environment, capture_output=True, text=True, check=False)
        print(run.stdout.replace("site/", "") + run.stderr, end="")
        report = (scratch / "report" / "linecount.txt").read_text().splitlines()
    checked = {line.split()[-1] for line in report if line.strip()}
    missing = sorted(expected_modules() - checked)
    if missing:
        print(f"mypy did not check: {', '.join(missing)}")
    return run.returncode or bool(missing)


def expected_modules() -> set[str]:
    """Return the installed names of all modules of the three folders."""
    names = set()
    for room, installed in ROOMS.items():
        for path in (ROOT / room).rglob("*.py"):
            parts = [*installed.split("/"), *path.relative_to(ROOT / room).with_suffix("").parts]
            names.add(".".join(part for part in parts if part != "__init__"))
    return names


if __name__ == "__main__":
    sys.exit(main())
