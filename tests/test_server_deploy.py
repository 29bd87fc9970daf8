"""Triton model repositories and KServe manifests, read back by what reads them."""

from __future__ import annotations

import configparser
import json
import shutil
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
import yaml
from bundles_tiny import make_bundle, make_exported
from typer.testing import CliRunner

pytest.importorskip("tritonclient", reason="the extra 'serve' is not installed")
from tritonclient.grpc import model_config_pb2 as pb

from deploy_prune.bundle import Artifact, Bundle, Parity
from deploy_prune.cli import app
from deploy_prune.config import ServeSettings
from deploy_prune.errors import InputError
from deploy_prune.export.serving.kserve import inference_service
from deploy_prune.export.serving.triton import settings_of, tokenizer_settings, write_triton
from deploy_prune.runtimes.ort import OrtRunner
from deploy_prune.serve import load

UNIT = Path(__file__).resolve().parents[1] / "recipes" / "serving" / "deploy-prune.service"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make_exported(tmp_path_factory.mktemp("deploy") / "tiny", variants=("sliced",))


def test_the_repository_is_what_triton_reads(bundle: Bundle, tmp_path: Path) -> None:
    folders = write_triton(bundle, tmp_path, name="m")
    assert [f.name for f in folders] == ["m", "m-tokenizer", "m-texts"]
    configs = {f.name: settings_of(f / "config.pbtxt") for f in folders}
    model = configs["m"]
    assert (model.backend, model.max_batch_size, model.default_model_filename) == ("onnxruntime", 32, "model.onnx")
    assert {(t.name, t.data_type, tuple(t.dims)) for t in model.input} == {
        (n, pb.TYPE_INT64, (-1,)) for n in ("input_ids", "attention_mask", "token_type_ids")
    }
    assert [(t.name, tuple(t.dims)) for t in model.output] == [("logits", (2,))]
    assert model.HasField("dynamic_batching")
    assert model.model_warmup[0].inputs["input_ids"].dims == [16]
    assert [(g.count, g.kind) for g in model.instance_group] == [(1, pb.ModelInstanceGroup.KIND_AUTO)]
    assert [(g.count, g.kind) for g in configs["m-tokenizer"].instance_group] == [(1, pb.ModelInstanceGroup.KIND_CPU)]
    assert [configs[n].version_policy.latest.num_versions for n in ("m", "m-tokenizer")] == [2, 2]
    steps = configs["m-texts"].ensemble_scheduling.step
    assert [s.model_name for s in steps] == ["m-tokenizer", "m"]
    assert set(steps[0].output_map.values()) == set(steps[1].input_map.values())
    with OrtRunner(tmp_path / "m" / "1" / "model.onnx") as runner:
        assert {i.name for i in runner.inputs} == {t.name for t in model.input}


@pytest.mark.parametrize("status", ["passed", "not_run"])
def test_an_engine_stands_beside_the_model_once_it_was_compared(bundle: Bundle, tmp_path: Path, status: Any) -> None:
    shutil.copytree(bundle.root, tmp_path / "b")
    made = Bundle.open(tmp_path / "b")
    (made.root / "engine.plan").write_bytes(b"an engine")
    kind: Any = {"variant": "sliced", "format": "tensorrt", "dialect": "engine", "precision": "fp32", "shape": (4, 24)}
    artifact = Artifact(**kind, path="engine.plan", sha256="", parity=Parity(status=status))
    made.manifest.artifacts.append(artifact)
    folders = write_triton(made, tmp_path / "r", name="m", instances=2)
    assert ("m-tensorrt" in [f.name for f in folders]) == (status == "passed")
    if status == "passed":
        engine, model = (settings_of(tmp_path / "r" / name / "config.pbtxt") for name in ("m-tensorrt", "m"))
        assert (tmp_path / "r" / "m-tensorrt" / "1" / "model.plan").read_bytes() == b"an engine"
        assert (engine.backend, engine.default_model_filename, engine.max_batch_size) == ("tensorrt", "model.plan", 4)
        assert [(g.count, g.kind) for g in engine.instance_group] == [(2, pb.ModelInstanceGroup.KIND_GPU)]
        assert [(g.count, g.kind) for g in model.instance_group] == [(2, pb.ModelInstanceGroup.KIND_AUTO)]
        assert {(t.name, tuple(t.dims)) for t in engine.input} == {(t.name, (24,)) for t in model.input}
        assert engine.model_warmup[0].inputs["input_ids"].dims == [24]
        assert engine.version_policy.latest.num_versions == 2
        assert engine.HasField("dynamic_batching")


def test_an_onnx_file_of_one_shape_is_not_put_behind_a_tokenizer(bundle: Bundle, tmp_path: Path) -> None:
    shutil.copytree(bundle.root, tmp_path / "b")
    made = Bundle.open(tmp_path / "b")
    fixed = {"shape": (4, 24), "key": "of one shape"}
    made.manifest.artifacts = [a.model_copy(update=fixed) for a in made.manifest.artifacts]
    made.commit()
    with pytest.raises(InputError, match=r"ONNX of the one shape \(4, 24\) only"):
        write_triton(made, tmp_path / "r", name="m")
    assert not (tmp_path / "r").exists()
    command = ["export", str(made.root), "--format", "triton", "--out", str(tmp_path / "r"), "--name", "m"]
    done = CliRunner().invoke(app, command)  # which makes the file that Triton needs
    assert done.exit_code == 0, done.output
    model, texts = (settings_of(tmp_path / "r" / name / "config.pbtxt") for name in ("m", "m-texts"))
    assert {tuple(t.dims) for t in model.input} == {(-1,)}
    assert (model.max_batch_size, texts.max_batch_size) == (32, 32)
    with OrtRunner(tmp_path / "r" / "m" / "1" / "model.onnx") as runner:
        assert all(isinstance(axis, str) for i in runner.inputs for axis in i.shape)


def test_a_second_time_is_a_new_version(bundle: Bundle, tmp_path: Path) -> None:
    write_triton(bundle, tmp_path, name="m")
    write_triton(bundle, tmp_path, name="m")
    for name in ("m", "m-tokenizer", "m-texts"):
        assert sorted(p.name for p in (tmp_path / name).iterdir()) == ["1", "2", "config.pbtxt"]


def test_the_tokenizer_model_makes_what_the_edge_loader_makes(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_triton(bundle, tmp_path, name="m")
    backend: Any = types.ModuleType("triton_python_backend_utils")
    backend.Tensor = lambda name, array: (name, array)
    backend.TritonError = lambda text: text
    backend.InferenceResponse = lambda output_tensors=None, error=None: error or dict(output_tensors)
    backend.get_input_tensor_by_name = lambda request, name: types.SimpleNamespace(as_numpy=lambda: request[name])
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", backend)
    code = compile((tmp_path / "m-tokenizer" / "1" / "model.py").read_text(), "model.py", "exec")
    space: dict[str, Any] = {}
    exec(code, space)
    model = space["TritonPythonModel"]()
    outputs = [{"name": n} for n in ("input_ids", "attention_mask", "token_type_ids")]
    config = json.dumps({"output": outputs})
    repository = str(tmp_path / "m-tokenizer")
    model.initialize({"model_repository": repository, "model_version": "1", "model_config": config})
    texts = ["a fine film", "dull, dull plot! " * 40]
    (found,) = model.execute([{"TEXT": np.array([[t.encode()] for t in texts], dtype=object)}])
    with load(bundle.root, threads=1) as predictor:
        _, wanted = predictor.prepare(texts)
    assert all(np.array_equal(found[name], wanted[name]) for name in wanted)
    (refused,) = model.execute([{"TEXT": np.array([[b"\xff"]], dtype=object)}])
    assert "UTF-8" in refused
    assert tokenizer_settings(tmp_path / "m-tokenizer" / "1")["truncation"] is not None


def test_kserve(bundle: Bundle, tmp_path: Path) -> None:
    out = tmp_path / "m.yaml"
    flags = ["--format", "kserve", "--out", str(out), "--name", "My_Model", "--storage", "s3://models/tiny"]
    done = CliRunner().invoke(app, ["export", str(bundle.root), *flags])
    assert done.exit_code == 0, done.output
    manifest = yaml.safe_load(out.read_text())
    assert manifest["metadata"]["name"] == "my-model"
    (container,) = manifest["spec"]["predictor"]["containers"]
    assert container["args"][0] == "my-model=/mnt/models"
    assert container["readinessProbe"]["httpGet"]["path"] == "/v2/health/ready"
    with pytest.raises(InputError, match="no name for Kubernetes"):
        inference_service(bundle, image="x", storage="s3://y", name="-")


def test_what_is_not_exported_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no int8 onnx file"):
        write_triton(bundle, tmp_path / "r", precision="int8")
    assert not (tmp_path / "r").exists()
    with pytest.raises(InputError, match="no name"):
        write_triton(bundle, tmp_path / "r", name="a/b")


def test_the_command_exports_what_a_server_needs(tmp_path: Path) -> None:
    made, _ = make_bundle(tmp_path / "tiny", kind="classification")
    made.commit()
    command = ["export", str(made.root), "--format", "triton", "--out", str(tmp_path / "repository")]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    assert [a.variant for a in Bundle.open(made.root).manifest.artifacts] == ["sliced"]
    assert (tmp_path / "repository" / "tiny" / "1" / "model.onnx").is_file()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--format", "triton"], "Say where triton goes"),
        (["--format", "kserve", "--out", "x.yaml"], "where the cluster finds"),
        (["--format", "triton,onnx", "--out", "x"], "written alone"),
        (["--format", "kserve", "--out", "x.yaml", "--storage", "models"], "'models' is no URI"),
        (["--format", "foo"], "No format 'foo'(.|\n)*kserve, .*triton"),
    ],
)
def test_what_a_server_lacks_is_said(bundle: Bundle, flags: list[str], said: str) -> None:
    with pytest.raises(InputError, match=said):
        CliRunner().invoke(app, ["export", str(bundle.root), *flags], catch_exceptions=False)


def test_the_systemd_unit_is_one(tmp_path: Path) -> None:
    """Let systemd read it, and the command line its command, which has time to end before it is killed."""
    unit = configparser.RawConfigParser(strict=False)
    unit.optionxform = str  # type: ignore[assignment, method-assign]
    unit.read_string(UNIT.read_text("utf-8"))
    program, command, *arguments = unit["Service"]["ExecStart"].split()
    assert (Path(program).name, command) == ("deploy-prune", "serve")
    parsed = typer.main.get_command(app).commands[command].make_context(command, arguments)  # type: ignore[attr-defined]
    assert parsed.params["bundles"] == ["default=/var/lib/deploy-prune/models/default"]
    assert parsed.params["poll"] is True
    drain = ServeSettings().drain_seconds
    assert float(unit["Service"]["TimeoutStopSec"]) >= drain + 5  # a run of the model, and what is closed behind it
    if (systemd := shutil.which("systemd-analyze")) is None:
        pytest.skip("no systemd-analyze on this machine: the unit was read as a file of settings alone")
    path = tmp_path / UNIT.name
    path.write_text(UNIT.read_text("utf-8").replace(program, sys.executable), "utf-8")
    done = subprocess.run([systemd, "verify", str(path)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
