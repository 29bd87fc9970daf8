"""Look for known weaknesses in the pinned packages: python -m tools.audit, which is pip-audit over constraints.txt.

A weakness, and a package that could not be looked up, is a failure. Where the service does not even know a package that
has been there for years, it is not reached, and nothing was audited: that is said, and in CI it is a failure too.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

PINS = Path(__file__).resolve().parents[2] / "constraints.txt"
KNOWN = "idna==3.10"


def audit(pins: Path) -> subprocess.CompletedProcess[str]:
    """Run pip-audit over a list of pins, all of them or none."""
    command = [sys.executable, "-m", "pip_audit", "--strict", "--progress-spinner", "off"]
    command += ["--disable-pip", "--no-deps", "-r", str(pins)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def reached() -> bool:
    """Say whether the service of advisories answers."""
    with tempfile.TemporaryDirectory() as folder:
        pins = Path(folder) / "known.txt"
        pins.write_text(f"{KNOWN}\n", "utf-8")
        found = audit(pins)
    # Whatever it says of the package, it said something of it.
    return found.returncode == 0 or "Found " in found.stderr


def main() -> int:
    """Audit, and return the exit code."""
    if not reached():
        print("audit: not run: the service that knows of weaknesses cannot be reached from here")
        return 1 if os.environ.get("CI") else 0
    found = audit(PINS)
    print(found.stdout + found.stderr)
    return found.returncode


if __name__ == "__main__":
    sys.exit(main())
