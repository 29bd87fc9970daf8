"""The edge loader needs neither torch nor transformers, and little time and space."""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
from tools.wheel import ROOT, build_wheel

from deploy_prune.serve import load

PREDICT = """
import sys
from deploy_prune.serve import load
with load(sys.argv[1], threads=1) as predictor:
    (answer,) = predictor("a fine film")
assert set(answer["scores"]) == {"no", "yes"}, answer
assert "torch" not in sys.modules and "transformers" not in sys.modules
print(answer["label"], f"{answer['score']:.4f}")
"""


def test_neither_torch_nor_transformers_is_imported(root: Path) -> None:
    command = [sys.executable, "-c", PREDICT, str(root)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


def without(*names: str) -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in names}


def cpu_seconds(program: str, bytecode: Path) -> float:
    """Return the processor time of a Python process: unlike the clock, it does not count other processes' work."""
    environment = without("PYTHONDONTWRITEBYTECODE") | {"PYTHONPYCACHEPREFIX": str(bytecode), "OMP_NUM_THREADS": "1"}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", program], check=True, env=environment)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_the_import_is_cheap(tmp_path: Path) -> None:
    programs = (
        "import numpy, onnxruntime, tokenizers",
        "from deploy_prune.serve import load",
        "from deploy_prune.serve import load; import deploy_prune.bundle, onnxruntime, tokenizers",
    )
    for program in programs:
        cpu_seconds(program, tmp_path)  # compile what is imported
    times = [[cpu_seconds(program, tmp_path) for program in programs] for _ in range(7)]
    needed, loader, whole = (statistics.median(column) for column in zip(*times, strict=True))
    print(f"of what it needs: {needed:.3f} s; the loader: {loader / needed:.2f} of it, with all: {whole / needed:.2f}")
    assert loader <= 1.5 * needed


def test_an_edge_installation_is_small_and_predicts(root: Path, tmp_path: Path) -> None:
    environment = without("PYTHONPATH", "PYTHONHOME", "PYTHONDONTWRITEBYTECODE")
    environment |= {"PIP_CONSTRAINT": str(ROOT / "constraints.txt"), "PIP_DISABLE_PIP_VERSION_CHECK": "1"}

    def run(*command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)

    wheel = build_wheel(tmp_path)
    made_venv = run(sys.executable, "-m", "venv", "edge")
    assert made_venv.returncode == 0, made_venv.stderr
    python = str(tmp_path / "edge" / "bin" / "python")
    probe = run(python, "-m", "pip", "install", "--quiet", "--retries", "1", "--dry-run", "--no-deps", "numpy")
    if probe.returncode != 0:
        pytest.skip(f"pip reaches no registry: {probe.stderr.strip().splitlines()[-1]}")
    install = run(python, "-m", "pip", "install", "--quiet", f"{wheel}[edge]")
    assert install.returncode == 0, install.stderr

    predicted = run(python, "-c", PREDICT, str(root))
    assert predicted.returncode == 0, predicted.stderr
    with load(root, threads=1) as predictor:
        (answer,) = predictor("a fine film")
    assert predicted.stdout.split() == [answer["label"], f"{answer['score']:.4f}"]

    command = run(str(tmp_path / "edge" / "bin" / "deploy-prune"), "doctor")
    assert command.returncode == 3
    assert "deploy-prune[cpu]" in command.stderr

    listing = run(python, "-m", "pip", "list", "--format=json")
    packages = {package["name"].lower() for package in json.loads(listing.stdout)}
    assert {"deploy-prune", "onnxruntime", "tokenizers"} <= packages
    assert not {"torch", "transformers"} & packages
    (site,) = (tmp_path / "edge" / "lib").glob("python*/site-packages")
    size = sum(p.stat().st_size for p in site.rglob("*") if p.is_file() and not is_tool(p.relative_to(site)))
    print(f"installed: {size / 2**20:.0f} MiB in {len(packages)} packages")
    assert size < 200 * 2**20


def is_tool(path: Path) -> bool:
    """Say whether a file of site-packages belongs to pip or setuptools."""
    return path.parts[0].startswith(("pip", "setuptools", "pkg_resources", "_distutils_hack", "distutils-precedence"))
