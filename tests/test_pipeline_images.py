"""The whole way on tiny vision transformers: prune, export every format, verify, bench, probe, reload."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from runs_tiny import image_checkpoint, image_data, verified_files
from safetensors.torch import load_file

import deploy_prune
from deploy_prune.archs import arch_of, check_config
from deploy_prune.bundle import VARIANTS, Bundle
from deploy_prune.checkpoint import load_dense, load_variant
from deploy_prune.config import ALLOW_CODE, PROGRAMS, BenchSettings, load_recipe
from deploy_prune.errors import InputError, UnsupportedModelError
from deploy_prune.experiments import Setting, run_experiment
from deploy_prune.export import Options, export_bundle
from deploy_prune.pipeline import run, slice_given
from deploy_prune.probing import probe
from deploy_prune.runtime_bench.bench import bench_bundle
from deploy_prune.runtime_bench.flops import count_onnx
from deploy_prune.runtimes import open_runner
from deploy_prune.signature import Signature
from deploy_prune.units import MaskSet

FAMILIES = {"vit": {}, "deit": {}, "dinov2": {"image_size": 16}}  # DINOv2's processors make other sizes than its config


def settings(folder: Path, family: str, **changes: Any) -> dict[str, Any]:
    model = image_checkpoint(folder / "model", family, **FAMILIES[family])
    given = {"model": str(model), "task": "image-classification", "data": str(image_data(folder / "data.npz"))}
    return given | {"out": str(folder / "b"), "keep_flops": 0.6, "formats": ("onnx",), **changes}


@pytest.fixture(scope="module", params=FAMILIES)
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("run")
    formats = ("onnx", "openvino", "pt2")
    given = settings(folder, request.param, formats=formats, precisions=("fp32", "fp16", "int8"))
    return run(load_recipe(**given, runtimes=("ort-cpu", "openvino"), bench_seconds=0.2))


def test_images_are_what_the_processor_makes(bundle: Bundle) -> None:
    signature = Signature.of_manifest(bundle.manifest.model)
    assert signature.inputs == ("pixel_values",)
    assert signature.image == (3, 8, 8)
    special = 2 if bundle.manifest.model["architecture"].startswith("DeiT") else 1
    assert signature.tokens == bundle.manifest.budget["seq_len"] == 16 + special
    assert all(case.inputs["pixel_values"].dtype == np.float32 for case in bundle.golden())


def test_every_file_matches_its_model(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ALLOW_CODE, PROGRAMS)
    made = verified_files(bundle)
    assert ("sliced", "onnx", "int8", "dynamic") in made
    assert ("sliced", "onnx", "int8", "qdq") in made
    assert ("sliced", "openvino", "int8", "qdq") in made


def test_flops_of_plan_model_and_graph_are_equal(bundle: Bundle) -> None:
    signature, counts = Signature.of_manifest(bundle.manifest.model), bundle.manifest.counts
    assert counts["virtual"] == counts["dense"]
    assert counts["sliced"]["encoder_flops"] <= 0.6 * counts["dense"]["encoder_flops"]
    for artifact in bundle.manifest.artifacts:
        if (artifact.format, artifact.precision) == ("onnx", "fp32"):
            path, one = bundle.path(artifact.path), counts[artifact.variant]["flops"]
            assert count_onnx(path, signature.shapes(1, signature.tokens or 0)) == one
            assert count_onnx(path, signature.shapes(5, signature.tokens or 0)) == 5 * one


def test_reload_is_bit_equal_and_equals_the_file(bundle: Bundle) -> None:
    again = deploy_prune.load(bundle)
    stored = load_file(bundle.path("sliced/model.safetensors"))
    assert all(torch.equal(tensor, stored[name]) for name, tensor in again.state_dict().items())
    pixels = np.random.default_rng(1).normal(size=(7, 3, 8, 8)).astype(np.float32)
    with torch.inference_mode():
        expected = {v: load_variant(bundle, v)(pixel_values=torch.from_numpy(pixels)).logits.numpy() for v in VARIANTS}
    assert np.abs(expected["virtual"] - expected["sliced"]).max() <= 1e-5 * max(1, np.abs(expected["sliced"]).max())
    with open_runner(bundle, "ort-cpu", "sliced") as runner:
        assert np.abs(runner.infer({"pixel_values": pixels})["logits"] - expected["sliced"]).max() <= 1e-4


def test_bench_feeds_images(bundle: Bundle) -> None:
    found = bench_bundle(bundle, BenchSettings(runtimes=("ort-cpu",), batches=(1, 3), seconds=0.2))
    assert {(m["batch"], m["model"]) for m in found["measurements"]} >= {(b, v) for b in (1, 3) for v in VARIANTS}
    other = bench_bundle(bundle, BenchSettings(runtimes=("ort-cpu",), batches=(1,), seqs=(9,), seconds=0.1))
    assert not other["measurements"]
    assert all("tokens of every image" in failure["reason"] for failure in other["failures"])


def test_a_fixed_shape_fixes_the_batch(tmp_path: Path) -> None:
    given = settings(tmp_path, "vit")
    made = run(load_recipe(**given), export=False, bench=False)
    tokens = int(made.manifest.model["tokens"])
    export_bundle(made, formats=("onnx",), variants=("sliced",), options=replace(Options(), shape=(2, tokens))).check()
    (artifact,) = made.manifest.artifacts
    assert artifact.shape == (2, tokens)
    assert artifact.parity.status == "passed"
    with pytest.raises(InputError, match="tokens of every image"):
        export_bundle(made, formats=("onnx",), options=replace(Options(), shape=(2, tokens + 1)))


def test_given_masks_and_the_probe(tmp_path: Path) -> None:
    model = image_checkpoint(tmp_path / "model")
    dense = load_dense(str(model), "classification").model
    masks = MaskSet.ones(arch_of(dense).groups(dense))
    masks["L01.heads"][1:] = 0
    np.savez(tmp_path / "masks.npz", **masks)
    made = slice_given(str(model), [tmp_path / "masks.npz"], tmp_path / "given")
    assert made.manifest.budget["seq_len"] == 17
    table = probe(str(model), widths=2, seconds=0.1)
    assert (table.seq, table.layers) == (17, 3)


def test_a_length_is_no_choice(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="17 tokens of every image, not 64"):
        run(load_recipe(**settings(tmp_path, "vit", seq_len=64)), export=False, bench=False)


def test_sizes_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    model = image_checkpoint(tmp_path / "model", size=12)
    given = {"model": str(model), "task": "image-classification", "data": str(image_data(tmp_path / "d.npz"))}
    with pytest.raises(InputError, match="12 x 12, but the model takes 8 x 8"):
        run(load_recipe(**given, out=str(tmp_path / "b")))


def test_text_tasks_are_not_for_image_models(tmp_path: Path) -> None:
    with pytest.raises(InputError):
        run(load_recipe(**settings(tmp_path, "vit") | {"task": "text-classification"}))
    assert not (tmp_path / "b").exists()


def test_other_image_models_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="swin"):
        check_config(transformers.SwinConfig())


def test_flops_of_an_image_model_are_counted_at_its_own_length(tmp_path: Path) -> None:
    given = settings(tmp_path, "vit")
    setting = Setting(given["model"], given["task"], given["data"], (0.6,), (0,), samples=64)
    document, _ = run_experiment("flops", setting, tmp_path / "out")
    (row,) = document["rows"]
    assert row["length"] == row["budget_length"] == 17
    assert 0 <= row["encoder_reduction"] - 0.4 < 0.03  # one unit of a tiny model


@pytest.mark.parametrize("name", ["vit", "recover"])
def test_experiments_of_image_models(name: str, tmp_path: Path) -> None:
    given = settings(tmp_path, "vit")
    setting = Setting(given["model"], given["task"], given["data"], (0.6,), (0,), samples=64, recover_epochs=1)
    document, files = run_experiment(name, setting, tmp_path / "out")
    methods = {row["method"] for row in document["rows"]}
    assert methods == {"pruned", "recovered"} if name == "recover" else {"paper", "default"} <= methods
    assert all(0 <= row["value"] <= 1 for row in document["rows"])
    assert {f.suffix for f in files} >= {".json", ".md", ".csv"}


def test_widths_recovery_depth_and_recovery_as_an_experiment(tmp_path: Path) -> None:
    given = settings(tmp_path, "vit")
    changed = {"recover_epochs": 1, "recover_depth": 1}
    setting = Setting(given["model"], given["task"], given["data"], (0.6,), (0,), samples=64, **changed)
    document, _ = run_experiment("recover", setting, tmp_path / "out")
    pruned, recovered, shorter, again = document["rows"]
    methods = [row["method"] for row in document["rows"]]
    assert methods == ["pruned", "recovered", "depth", "recovered again"]
    assert pruned["kept_params"] == recovered["kept_params"] > shorter["kept_params"] == again["kept_params"]
    assert pruned["kept_flops"] > again["kept_flops"]
    assert 0 in {n for counts in again["layers"] for n in counts.values()}
