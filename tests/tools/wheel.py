"""Build the package as users get it, without touching the working tree."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ROOMS = {"deploy_prune": "deploy_prune", "export": "deploy_prune/export", "runtime_bench": "deploy_prune/runtime_bench"}
FILES = ("pyproject.toml", "README.md", "LICENSE")


def pip(*arguments: str, cwd: Path) -> None:
    """Run pip without the network; its output is shown where it fails."""
    command = [sys.executable, "-m", "pip", *arguments, "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    run = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    if run.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed:\n{run.stdout}{run.stderr}")


def copy_sources(folder: Path) -> Path:
    """Copy what the build reads to `folder`: a build in the tree would pick up its own old output."""
    for room in ROOMS:
        shutil.copytree(ROOT / room, folder / room, ignore=shutil.ignore_patterns("__pycache__"))
    for name in FILES:
        shutil.copy(ROOT / name, folder / name)
    return folder


def build_wheel(scratch: Path) -> Path:
    """Build the wheel in `scratch` and return its path."""
    source = copy_sources(scratch / "source")
    pip("wheel", str(source), "--wheel-dir", str(scratch / "wheels"), cwd=scratch)
    (wheel,) = (scratch / "wheels").glob("*.whl")
    return wheel


def install(target: Path, scratch: Path) -> None:
    """Install the built wheel plainly (not editable) into `target`."""
    pip("install", str(build_wheel(scratch)), "--target", str(target), cwd=scratch)
