"""Every command of the README is run: on tiny checkpoints, in an empty folder."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from runs_tiny import channel_checkpoint, checkpoint, data, image_data, linear_costs

from deploy_prune import demo
from deploy_prune.cli import invoke
from deploy_prune.config import ALLOW_CODE

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text("utf-8")
BASH = [line for block in re.findall(r"```bash\n(.*?)```", README, re.S) for line in block.strip().splitlines()]
PYTHON = re.findall(r"```python\n(.*?)```", README, re.S)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as the README's reader has it, and a demo that is already in the cache."""
    folder = tmp_path_factory.mktemp("reader")
    checkpoint(folder / "my-model")
    data(folder / "my-data", train=160)
    shutil.copytree(ROOT / "recipes", folder / "recipes")
    shutil.copy(ROOT / "tests" / "conv_tiny.py", folder / "my_nets.py")
    made = channel_checkpoint(folder / "my-cnn") / "module.json"
    made.write_text(made.read_text().replace("conv_tiny.", "my_nets."))
    image_data(folder / "my-images.npz", size=16)
    rng = np.random.default_rng(0)
    masks = {"head_mask": rng.random((3, 4)) < 0.5, "neuron_mask": rng.random((3, 24)) < 0.5}
    np.savez(folder / "masks.npz", **{k: v.astype(np.float32) for k, v in masks.items()})
    cached = folder / "cache" / demo.demo_folder().name
    checkpoint(cached / "model")
    data(cached / "data")
    (cached / "demo.json").write_text("{}")
    return folder


def test_commands_are_all_known() -> None:
    assert BASH[:2] == ["make export", "make test"]
    assert all(line.startswith(("make ", "deploy-prune ", "torchrun ")) for line in BASH)


def test_commands_in_order(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("DEPLOY_PRUNE_CACHE", str(folder / "cache"))
    monkeypatch.setenv(ALLOW_CODE, "")  # is set by a command, and taken back here
    monkeypatch.setattr(sys, "path", list(sys.path))
    for line in BASH:
        if line.startswith("deploy-prune serve"):
            assert_serves(line)
        elif line.startswith("deploy-prune"):
            assert invoke(shlex.split(line)[1:]) == 0, line
        elif line.startswith("torchrun"):
            subprocess.run([sys.executable, "-m", "torch.distributed.run", *shlex.split(line)[1:]], check=True)
        if line.startswith("deploy-prune probe"):
            linear_costs(folder / "lut.json")


def assert_serves(line: str) -> None:
    """Start a server, on free ports, ask it, and end it as an operator does."""
    command = [sys.executable, "-m", "deploy_prune", *shlex.split(line)[1:], "--port", "0", "--grpc-port", "0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        said = next(s for s in map(json.loads, process.stderr) if s["message"] == "ready")
        name = Path(shlex.split(line)[2]).name
        body = {"inputs": [{"name": "text", "datatype": "BYTES", "shape": [1], "data": ["a fine film"]}]}
        url = f"http://127.0.0.1:{said['port']}/v2/models/{name}.answers/infer"
        with urllib.request.urlopen(url, json.dumps(body).encode(), timeout=30) as response:
            assert json.loads(response.read())["model_name"] == f"{name}.answers"
        process.terminate()
        process.communicate(timeout=60)
        assert process.returncode == 0
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("line", [b for b in BASH if b.startswith("make export")])
def test_make_export(line: str, folder: Path) -> None:
    ready = ROOT / ".venv" / ".installed"
    if not ready.exists() or Path(sys.prefix) != ROOT / ".venv":
        pytest.skip("not run from the environment that make set up")
    words = shlex.split(line)
    variables = [w.replace("my-", f"{folder}/my-") for w in words[2:]]
    out = folder / "bundles" / ("own" if variables else "demo")
    done = subprocess.run(
        ["make", "export", *variables, f"OUT={out}"],
        cwd=ROOT,
        env={**os.environ, "DEPLOY_PRUNE_CACHE": str(folder / "cache")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Installing" not in done.stdout, "set-up is done once"
    assert (out / "report.html").is_file()
    assert str(out) in done.stdout


@pytest.mark.parametrize("code", PYTHON)
def test_python(code: str, folder: Path) -> None:
    if not (folder / "bundles" / "mine").exists():
        os.chdir(folder)
        assert invoke(shlex.split(next(b for b in BASH if "--out bundles/mine" in b))[1:]) == 0
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
