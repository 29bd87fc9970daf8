"""Tools that nobody here wrote load and run what a bundle holds."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import pytest
from bundles_tiny import exported_bundle
from exports_tiny import made, source

from deploy_prune.bundle import Bundle
from deploy_prune.export.registry import Kind

BIN = Path(sys.executable).parent
ORT_WEB = "onnxruntime-web@1.30.0"
KINDS = [
    Kind("onnx", "opset18", "fp32"),
    Kind("onnx", "opset23", "fp32"),
    Kind("onnx", "mha", "fp32"),
    Kind("onnx", "opset18", "int8", "qdq"),
]
NODE = """
const ort = require('onnxruntime-web'), fs = require('fs');
(async () => {
  const given = JSON.parse(fs.readFileSync(process.argv[3]));
  const session = await ort.InferenceSession.create(fs.readFileSync(process.argv[2]));
  const feeds = {};
  for (const [name, rows] of Object.entries(given))
    feeds[name] = new ort.Tensor('int64', BigInt64Array.from(rows.flat().map(BigInt)), [rows.length, rows[0].length]);
  const out = await session.run(feeds);
  console.log(JSON.stringify(Object.fromEntries(Object.entries(out).map(([k, v]) => [k, Array.from(v.data)]))));
})();
"""


def run(*command: str | Path, cwd: Path | None = None) -> str:
    done = subprocess.run([str(c) for c in command], cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def tool(name: str) -> Path:
    path = BIN / name
    if not path.exists():
        pytest.skip(f"{name} is not installed")
    return path


def sliced(bundle: Bundle) -> Path:
    return bundle.path(next(a.path for a in bundle.manifest.artifacts if a.variant == "sliced"))


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.label)
def test_onnx_checker(kind: Kind) -> None:
    path, _ = made("bert", kind)
    onnx.checker.check_model(str(path), full_check=True)
    proto = onnx.load(path)
    assert {p.key for p in proto.metadata_props} == {"deploy_prune.variant"}
    assert all(0 not in t.dims for t in proto.graph.initializer if t.data_type == onnx.TensorProto.FLOAT)


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.label)
def test_polygraphy_inspects_and_runs_it(kind: Kind) -> None:
    path, _ = made("bert", kind)
    shown = run(tool("polygraphy"), "inspect", "model", path)
    assert "input_ids [dtype=int64, shape=('batch', 'sequence')]" in shown
    shapes = [f"{name}:[2,9]" for name in source("bert").input_names]
    ranges = [f"{name}:[0,1]" for name in source("bert").input_names]
    out = run(tool("polygraphy"), "run", path, "--onnxrt", "--input-shapes", *shapes, "--val-range", *ranges)
    assert "logits [dtype=float32, shape=(2, 2)]" in out
    assert "PASSED" in out


def test_openvinos_benchmark_app_runs_an_ir() -> None:
    pytest.importorskip("openvino", reason="openvino is not installed")
    path, _ = made("bert", Kind("openvino", "ir", "fp32"))
    shapes = ",".join(f"{name}[1,16]" for name in source("bert").input_names)
    shown = run(tool("benchmark_app"), "-m", path, "-d", "CPU", "-t", "1", "-data_shape", shapes, "-hint", "latency")
    assert "Throughput:" in shown


@cache
def node_modules() -> Path:
    """Install onnxruntime-web once, into a folder of the session's; skip where that cannot be."""
    if not (shutil.which("npm") and shutil.which("node")):
        pytest.skip("node and npm are not installed")
    folder = made("bert", KINDS[0])[0].parent.parent / "node"
    folder.mkdir(exist_ok=True)
    done = subprocess.run(
        ["npm", "install", "--no-audit", "--no-fund", "--ignore-scripts", ORT_WEB],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "npm_config_fetch_retries": "1"},
    )
    if done.returncode != 0:
        pytest.skip(f"npm reaches no registry: {done.stderr.strip().splitlines()[-1]}")
    return folder


@pytest.mark.parametrize("kind", [k for k in KINDS if k.dialect != "mha"], ids=lambda k: k.label)
def test_onnxruntime_web_in_node_runs_it(kind: Kind, tmp_path: Path) -> None:
    folder = node_modules()
    path, _ = made("bert", kind)
    bundle = exported_bundle(tmp_path)
    case = bundle.golden()[2]
    (tmp_path / "feeds.json").write_text(json.dumps({name: array.tolist() for name, array in case.inputs.items()}))
    (folder / "run.js").write_text(NODE)
    found = json.loads(run("node", "run.js", path, tmp_path / "feeds.json", cwd=folder))
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    expected = session.run(None, case.inputs)[0]
    tolerance = 1e-5 if kind.precision == "fp32" else 0.05
    np.testing.assert_allclose(np.array(found["logits"]).reshape(expected.shape), expected, atol=tolerance)


def test_a_bundles_file_needs_onnxruntime_alone(tmp_path: Path) -> None:
    bundle = exported_bundle(tmp_path)
    case = bundle.golden()[3]
    np.savez(tmp_path / "case.npz", **case.inputs)
    program = (
        "import sys, numpy, onnxruntime\n"
        "feeds = dict(numpy.load(sys.argv[2]))\n"
        "out = onnxruntime.InferenceSession(sys.argv[1], providers=['CPUExecutionProvider']).run(None, feeds)[0]\n"
        "assert 'deploy_prune' not in sys.modules and 'torch' not in sys.modules\n"
        "print(out.tolist())\n"
    )
    found = json.loads(run(sys.executable, "-c", program, sliced(bundle), tmp_path / "case.npz"))
    np.testing.assert_allclose(found, case.outputs["sliced"]["logits"], atol=1e-5)
