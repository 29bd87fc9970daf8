"""Files of strangers: nothing in them is run, followed out of its folder, or given more memory than it fills."""

from __future__ import annotations

import io
import json
import pickle
import shutil
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from bundles_tiny import exported_bundle, tiny_model
from onnx import TensorProto, helper
from runs_tiny import channel_checkpoint
from tasks_tiny import tiny_tokenizer

from deploy_prune import bounds, npz
from deploy_prune.bundle import Bundle
from deploy_prune.checkpoint import load_dense, load_sliced
from deploy_prune.config import ALLOW_CODE, ALLOW_PICKLE, PROGRAMS
from deploy_prune.errors import BundleError, DataError, DeployPruneError, InputError
from deploy_prune.export import verify_bundle
from deploy_prune.given_masks import read_masks
from deploy_prune.latency_table import read_latency_table
from deploy_prune.npz import read_npz
from deploy_prune.runtimes import open_runner
from deploy_prune.runtimes.ort import OrtRunner
from deploy_prune.serve import load
from deploy_prune.tasks import table
from deploy_prune.tasks.squad import read_questions
from deploy_prune.tasks.table import read_table
from deploy_prune.units import UnitGroup


class Touch:
    """Touch a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    tiny_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def test_pickled_weights_are_refused_unless_they_are_asked_for(
    source: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    torch.save(tiny_model().state_dict(), source / "pytorch_model.bin")
    (source / "model.safetensors").unlink()
    with pytest.raises(InputError, match="pickles") as raised:
        load_dense(str(source), "classification")
    assert "--allow-pickle" in raised.value.hint
    monkeypatch.setenv(ALLOW_PICKLE, "1")
    assert load_dense(str(source), "classification").sha256
    torch.save({"x": Touch(tmp_path / "touched")}, source / "pytorch_model.bin")
    with pytest.raises((DeployPruneError, pickle.UnpicklingError)):
        load_dense(str(source), "classification")
    assert not (tmp_path / "touched").exists()


def test_pickled_masks_are_refused_unless_they_are_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    group = UnitGroup("L00.heads", "head", 0, 4, 8, 32, 1, ("q",), "o", "r")
    torch.save(torch.ones(1, 4), tmp_path / "head_mask.pt")
    with pytest.raises(InputError, match="which are pickles"):
        read_masks([tmp_path / "head_mask.pt"], [group])
    monkeypatch.setenv(ALLOW_PICKLE, "1")
    assert read_masks([tmp_path / "head_mask.pt"], [group])["L00.heads"].tolist() == [1, 1, 1, 1]
    torch.save(Touch(tmp_path / "touched"), tmp_path / "head_mask.pt")
    with pytest.raises(InputError, match="Could not read masks"):
        read_masks([tmp_path / "head_mask.pt"], [group])
    assert not (tmp_path / "touched").exists()


def test_code_beside_a_checkpoint_is_not_run(source: Path, tmp_path: Path) -> None:
    (source / "evil.py").write_text(f"open({str(tmp_path / 'touched')!r}, 'w')\nclass C: pass\n")
    config = json.loads((source / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.C", "AutoModel": "evil.C"}}
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(DeployPruneError):
        load_dense(str(source), "classification")
    assert not (tmp_path / "touched").exists()


def test_programs_of_a_bundle_are_opened_only_where_that_is_allowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = exported_bundle(tmp_path, "pt2")
    monkeypatch.delenv(ALLOW_CODE, raising=False)
    with pytest.raises(InputError, match="can run any code"):
        open_runner(bundle, "pt2", "sliced")
    found = verify_bundle(bundle)
    assert not found.artifacts
    assert "allow it: deploy-prune --allow-code pt2" in found.unchecked[0][1]
    monkeypatch.setenv(ALLOW_CODE, PROGRAMS)
    assert not verify_bundle(bundle).unchecked


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"intermediate_size": 10**9}, "a dense model of"),  # 256 GB of weights
        ({"vocab_size": 10**9}, "a dense model of"),
        ({"hidden_size": 36}, "in the description"),
        ({"num_hidden_layers": 10**9}, "layers"),
        ({"architectures": ["pipeline"]}, "does not describe a sliced model"),  # a function of transformers
        ({"architectures": ["nothing"]}, "does not describe a sliced model"),
        ({"deploy_prune": {"groups": [{"kept": []}]}}, "does not hold"),
    ],
)
def test_a_description_larger_than_its_weights_is_refused(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    folder = exported_bundle(tmp_path).path("sliced")
    assert load_sliced(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(BundleError, match=words):
        load_sliced(folder)


def described(folder: Path, name: str = "config.json", **changes: Any) -> str:
    """Change what a checkpoint says of itself, and return its folder."""
    entry = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(entry | changes))
    return str(folder)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"intermediate_size": 10**7}, "more than 67,108,864 weights"),
        ({"vocab_size": 10**7}, "more than 67,108,864 weights"),
        ({"num_hidden_layers": 50}, "more than 100 tensors"),
        ({"num_hidden_layers": 10**12}, "num_hidden_layers"),
        ({"num_labels": 10**12, "id2label": None}, "num_labels"),
        ({"text_config": {"depths": [3, 10**12]}}, "depths"),
    ],
)
def test_a_dense_checkpoint_asks_for_no_more_than_its_files_hold(
    source: Path, changes: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bounds, "MOST_TENSORS", 100)
    assert load_dense(str(source), "classification")
    with pytest.raises(BundleError, match=words):
        load_dense(described(source, **changes), "classification")
    torch.nn.Linear(10**4, 10**4, device="meta")  # what is built later is nobody's concern


def test_a_factory_makes_no_more_than_its_files_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ALLOW_CODE, "conv_tiny")
    folder = channel_checkpoint(tmp_path / "model")
    assert load_dense(str(folder), "classification")
    described(folder, "module.json", kwargs={"classes": 2 * 10**7})
    with pytest.raises(BundleError, match="its files do not hold"):
        load_dense(str(folder), "classification")
    with pytest.raises(BundleError, match="its files do not hold"):
        load_sliced(folder)


def test_weights_of_other_shapes_than_the_config_are_bad_input(source: Path) -> None:
    with pytest.raises(InputError, match="Could not load") as raised:
        load_dense(described(source, intermediate_size=48), "classification")
    assert "belong together" in raised.value.hint


def test_links_out_of_a_bundle_are_not_followed(tmp_path: Path) -> None:
    bundle = exported_bundle(tmp_path)
    (tmp_path / "secret").write_text("{}")
    (bundle.root / "plan.json").unlink()
    (bundle.root / "plan.json").symlink_to(tmp_path / "secret")
    with pytest.raises(BundleError, match="outside the bundle"):
        Bundle.open(bundle.root)
    (bundle.root / "loop").symlink_to(bundle.root / "loop")
    with pytest.raises(BundleError):
        bundle.path("loop/x")
    for name in ("/etc/passwd", "../secret", "artifacts/../../secret", "\0", "a" * 5000):
        with pytest.raises(BundleError):
            bundle.path(name)


def onnx_with_data(folder: Path, location: str) -> Path:
    """Write an ONNX file whose one weight lies at a location."""
    weight = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4], data_location=TensorProto.EXTERNAL)
    weight.external_data.add(key="location", value=location)
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, [4]) for n in "xy")
    graph = helper.make_graph([helper.make_node("Add", ["x", "w"], ["y"])], "g", [x], [y], [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    return folder / "model.onnx"


@pytest.mark.parametrize("location", ["../weights", "ABSOLUTE", "link"])
def test_weights_of_an_onnx_file_stay_beside_it(tmp_path: Path, location: str) -> None:
    folder = tmp_path / "inside"
    folder.mkdir()
    (tmp_path / "weights").write_bytes(np.ones(4, np.float32).tobytes())
    (folder / "link").symlink_to(tmp_path / "weights")
    path = onnx_with_data(folder, location.replace("ABSOLUTE", str(tmp_path / "weights")))
    with pytest.raises(InputError), OrtRunner(path):
        pass
    with pytest.raises((onnx.checker.ValidationError, ValueError)):
        onnx.load(path)


def npz_of(path: Path, shape: tuple[int, ...], descr: str, content: bytes) -> Path:
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": descr, "fortran_order": False, "shape": shape})
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.npy", buffer.getvalue() + content)
    return path


@pytest.mark.parametrize(
    ("shape", "descr", "content", "words"),
    [
        ((10**12,), "<U0", b"", "does not fill it"),  # elements of no size fit into any file
        ((10**12,), "<f4", b"few", "does not fill it"),
        ((-1, -4), "<f4", bytes(16), "does not fill it"),
        ((1 << 20,), "|u1", bytes(1 << 20), "decompression bomb"),
    ],
)
def test_arrays_that_are_none_are_not_loaded(
    tmp_path: Path, shape: tuple[int, ...], descr: str, content: bytes, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(npz, "SMALL", 1 << 16)
    with pytest.raises(DataError, match=words):
        read_npz(npz_of(tmp_path / "a.npz", shape, descr, content))


def test_arrays_together_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.savez(tmp_path / "a.npz", a=np.arange(100), b=np.arange(100))
    monkeypatch.setattr(npz, "MAX_BYTES", 1500)
    assert read_npz(tmp_path / "a.npz", ["a"])["a"].sum() == 4950
    with pytest.raises(DataError, match="of memory"):
        read_npz(tmp_path / "a.npz")
    with pytest.raises(DataError, match="no array 'c'"):
        read_npz(tmp_path / "a.npz", ["c"])


def test_parquet_that_decodes_to_more_than_is_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pq.write_table(pa.table({"a": ["x" * 1000] * 100_000}), tmp_path / "a.parquet", compression="zstd")
    assert (tmp_path / "a.parquet").stat().st_size < 20_000
    monkeypatch.setattr(table, "MOST_PARQUET_BYTES", 1 << 24)
    with pytest.raises(DataError, match="GiB of memory"):
        read_table(tmp_path / "a.parquet")


def test_an_answer_is_found_in_linear_time(tmp_path: Path) -> None:
    context, answer = "a" * 400_000, "a" * 200_000
    row = {"question": "q", "context": context, "answers": {"text": [answer], "answer_start": [300_000]}}
    (tmp_path / "a.json").write_text(json.dumps([row]))
    started = time.process_time()
    (found,) = read_questions(tmp_path / "a.json")
    assert found.answers == ((answer, 200_000),)  # the nearest place at which all of it stands
    assert time.process_time() - started < 5  # at every place once, it took minutes


@pytest.mark.parametrize(
    ("model", "task"),
    [
        ({}, {"head": "classification"}),
        ({"inputs": 3}, {"head": "classification"}),
        ({"inputs": ["pixel_values"], "image": [3, 10**9, 1]}, {"head": "classification"}),
        ({"inputs": ["input_ids"], "pad_id": "x"}, {"head": "classification"}),
        ({"inputs": ["input_ids"]}, {}),
        ({"inputs": ["input_ids"]}, {"head": "classification", "labels": 3}),
    ],
)
def test_manifests_that_say_nothing_useful_are_refused(
    tmp_path: Path, model: dict[str, Any], task: dict[str, Any]
) -> None:
    bundle = exported_bundle(tmp_path)
    bundle.manifest.model, bundle.manifest.task = model, task
    bundle.commit()
    with pytest.raises(BundleError):
        load(bundle.root)


def test_golden_cases_that_are_none_are_refused(tmp_path: Path) -> None:
    bundle = exported_bundle(tmp_path)
    for raw in (b"\xff" * 8, (10**9).to_bytes(8, "little") + b"{}", b""):
        bundle.path(bundle.manifest.golden[0]["path"]).write_bytes(raw)
        with pytest.raises(BundleError, match="golden"):
            bundle.golden()
    bundle.manifest.golden = [{"file": "x"}]
    with pytest.raises(BundleError, match="golden"):
        bundle.golden()


def test_large_descriptions_are_not_read(tmp_path: Path) -> None:
    for name in ("manifest.json", "lut.json"):
        with (tmp_path / name).open("wb") as file:
            file.truncate(1 << 33)  # 8 GiB of nothing, which takes no disk
    with pytest.raises(BundleError, match="larger than"):
        Bundle.open(tmp_path)
    with pytest.raises(InputError, match="larger than"):
        read_latency_table(tmp_path / "lut.json")
    shutil.rmtree(tmp_path)
