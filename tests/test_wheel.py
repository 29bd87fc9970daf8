"""The built wheel holds all three folders under one name."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tools.wheel import ROOT, install


def run_python(program: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, **environment}
    return subprocess.run(
        [sys.executable, "-c", program], cwd=cwd, env=env, capture_output=True, text=True, check=False
    )


def test_wheel_holds_all_rooms(tmp_path: Path) -> None:
    target, empty = tmp_path / "site", tmp_path / "empty"
    empty.mkdir()
    install(target, tmp_path)
    program = (
        "import deploy_prune, deploy_prune.export, deploy_prune.runtime_bench as bench\n"
        "print(deploy_prune.__file__, deploy_prune.export.__file__, bench.__file__, sep='\\n')"
    )
    run = run_python(program, empty, PYTHONPATH=str(target))
    assert run.returncode == 0, run.stderr
    assert all(line.startswith(str(target)) for line in run.stdout.splitlines())
    assert (target / "deploy_prune" / "py.typed").is_file()
    assert not (target / "export").exists()


@pytest.mark.parametrize("name", ["export", "runtime_bench"])
def test_bare_name_is_refused(name: str) -> None:
    run = run_python(f"import {name}", ROOT)
    assert run.returncode != 0
    assert f"Import this package as deploy_prune.{name}" in run.stderr
