"""The whole way on tiny convolutional networks: prune, export every format, verify, bench, reload, serve, distil."""

from __future__ import annotations

import html
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conv_tiny import tiny_cnn
from onnxruntime import InferenceSession
from runs_tiny import channel_checkpoint, image_checkpoint, image_data, verified_files
from safetensors.torch import load_file
from typer.testing import CliRunner

import deploy_prune
from deploy_prune.bundle import VARIANTS, Bundle
from deploy_prune.channel_costs import channel_flops, channel_latency
from deploy_prune.channel_slicing import logits
from deploy_prune.checkpoint import load_dense, load_variant
from deploy_prune.cli import app
from deploy_prune.config import ALLOW_CODE, BenchSettings, load_recipe
from deploy_prune.errors import BundleError, DeployPruneError, InputError, UnsupportedModelError
from deploy_prune.experiments import Setting, run_experiment
from deploy_prune.experiments.methods import CHANNEL_STAGES, CHANNEL_TRADEOFF
from deploy_prune.latency_table import ChannelLatency, read_latency_table
from deploy_prune.module_checkpoint import FILE, read_module_config
from deploy_prune.pipeline import run, slice_given
from deploy_prune.probing import fit_rates, probe
from deploy_prune.runtime_bench.bench import bench_bundle
from deploy_prune.runtime_bench.flops import count_onnx
from deploy_prune.runtimes import open_runner
from deploy_prune.screen import print_latency_table
from deploy_prune.serve import load as serve
from deploy_prune.signature import Signature
from deploy_prune.surgery import ChannelSurgery, surgery_of
from deploy_prune.units import MaskSet

FAMILIES = ("basic", "mobilenet", "vgg", "resnet")  # the last one is of transformers
EVERY_FORMAT = ("basic", "resnet")
TESTS = Path(__file__).parent


@pytest.fixture(scope="module", autouse=True)
def trusted() -> Iterator[None]:
    """Let this process and those that measure call the factories of conv_tiny."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(ALLOW_CODE, "conv_tiny,pt2")
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (str(TESTS), os.environ.get("PYTHONPATH")))))
        yield


def settings(folder: Path, family: str = "basic", **changes: Any) -> dict[str, Any]:
    model = channel_checkpoint(folder / "model", family)
    data = image_data(folder / "data.npz", size=16)
    given = {"model": str(model), "task": "image-classification", "data": str(data), "out": str(folder / "b")}
    return given | {"keep_flops": 0.6, "formats": ("onnx",), **changes}


@pytest.fixture(scope="module", params=FAMILIES)
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    given = settings(tmp_path_factory.mktemp("run"), request.param, cut_residual=request.param == "resnet")
    whole = request.param in EVERY_FORMAT
    given["formats"] = ("onnx", "openvino")
    if whole:
        given |= {"formats": ("onnx", "openvino", "pt2"), "precisions": ("fp32", "fp16", "int8")}
    return run(load_recipe(**given, runtimes=("ort-cpu", "torch"), bench_seconds=0.2), bench=whole)


every_format = pytest.mark.parametrize("bundle", EVERY_FORMAT, indirect=True)


def pixels(count: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, 3, 16, 16)).astype(np.float32)


def test_every_file_matches_its_model(bundle: Bundle) -> None:
    formats = {a.format for a in bundle.manifest.artifacts}
    assert formats >= {"onnx", "openvino"}
    made = verified_files(bundle, sorted(formats))
    if any(precision == "int8" for _, _, precision, _ in made):
        assert {("sliced", "onnx", "fp16", None), ("sliced", "onnx", "int8", "qdq")} <= made


def test_flops_of_plan_model_and_graph_are_equal(bundle: Bundle) -> None:
    signature, counts = Signature.of_manifest(bundle.manifest.model), bundle.manifest.counts
    assert (signature.image, signature.tokens) == ((3, 16, 16), 1)
    assert counts["virtual"] == counts["dense"]
    assert counts["dense"]["encoder_flops"] == counts["dense"]["flops"]
    assert counts["sliced"]["flops"] <= 0.6 * counts["dense"]["flops"]
    for artifact in bundle.manifest.artifacts:
        if (artifact.format, artifact.precision) == ("onnx", "fp32"):
            one = counts[artifact.variant]["flops"]
            assert count_onnx(bundle.path(artifact.path), signature.shapes(5, 1)) == 5 * one


@pytest.mark.parametrize("family", FAMILIES)
def test_engines_of_convolutional_networks(family: str, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    made = run(load_recipe(**settings(tmp_path, family, keep_flops=0.8, formats=("rtx",))), bench=False)
    assert {(a.variant, a.format) for a in made.manifest.artifacts} >= {(v, "rtx") for v in VARIANTS}


def test_labels_are_drawn_unless_true_ones_are_asked_for(bundle: Bundle, tmp_path: Path) -> None:
    record = next(s for s in bundle.manifest.stages if s.name == "calibrate").model_dump()
    assert record["label_free"]
    if bundle.manifest.model["architecture"] == "ResNet":
        made = run(load_recipe(**settings(tmp_path, label_free=False)), export=False, bench=False)
        assert not next(s for s in made.manifest.stages if s.name == "calibrate").model_dump()["label_free"]


def test_the_whole_split_was_compared(bundle: Bundle) -> None:
    quality = bundle.manifest.quality
    assert quality["virtual"]["value"] == quality["sliced"]["value"]
    assert quality["sliced"]["n"] == 24


def test_reload_is_bit_equal_and_every_variant_agrees(bundle: Bundle) -> None:
    again = deploy_prune.load(bundle)
    stored = load_file(bundle.path("sliced/model.safetensors"))
    assert all(torch.equal(tensor, stored[name]) for name, tensor in again.state_dict().items())
    x, outputs = torch.from_numpy(pixels(7)), {}
    with torch.inference_mode():
        for variant in VARIANTS:
            out = load_variant(bundle, variant)(x)
            outputs[variant] = (out if isinstance(out, torch.Tensor) else out.logits).numpy()
    scale = max(1.0, float(np.abs(outputs["sliced"]).max()))
    assert np.abs(outputs["virtual"] - outputs["sliced"]).max() <= 1e-5 * scale
    assert np.abs(outputs["dense"] - outputs["sliced"]).max() > 1e-5 * scale
    with open_runner(bundle, "ort-cpu", "sliced") as runner:
        assert np.abs(runner.infer({"pixel_values": x.numpy()})["logits"] - outputs["sliced"]).max() <= 1e-5 * scale


@every_format
def test_bench_and_report_know_channels(bundle: Bundle) -> None:
    found = bench_bundle(bundle, BenchSettings(runtimes=("ort-cpu",), batches=(1, 3), seconds=0.2))
    assert not found["failures"]
    assert {(m["batch"], m["model"]) for m in found["measurements"]} >= {(b, v) for b in (1, 3) for v in VARIANTS}
    page = html.unescape((bundle.root / "report.html").read_text("utf-8"))
    assert "of the network's FLOPs at 16 x 16 pixels" in page
    assert "channels" in page
    assert "1 tokens" not in page
    assert "cut channels multiplied by zero" in page
    assert "with embeddings and head" not in page
    assert all(g.name in page for g in bundle.plan().groups)
    shown = CliRunner().invoke(app, ["inspect", str(bundle.root)])
    assert "channels" in shown.stdout
    assert "network FLOPs" in shown.stdout


def test_the_edge_loader_takes_pictures(bundle: Bundle) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    with serve(bundle.root) as predictor:
        (answer,) = predictor(picture)
    assert set(answer) == {"label", "score", "scores"}
    assert len(answer["scores"]) == 3


def test_recovery_follows_outputs_and_blocks(tmp_path: Path) -> None:
    given = settings(tmp_path, compensate="none", recover_epochs=6, recover_lr=1e-3)
    made = run(load_recipe(**given), bench=False)
    record = next(s for s in made.manifest.stages if s.name == "recover").model_dump()
    assert record["states"]
    assert record["loss_after"] < record["loss_before"]
    assert record["kept"]
    assert made.manifest.plan["recovered"]
    x = torch.from_numpy(pixels(4))
    with torch.inference_mode():
        virtual, sliced = (load_variant(made, v)(x) for v in ("virtual", "sliced"))
    assert float((virtual - sliced).abs().max()) <= 1e-5 * max(1.0, float(sliced.abs().max()))


def test_given_masks_cut_channels(tmp_path: Path) -> None:
    model = channel_checkpoint(tmp_path / "model")
    surgery = surgery_of(load_dense(str(model), "classification").model, (3, 16, 16), residual=True)
    masks = MaskSet.ones(surgery.groups)
    first = surgery.groups[0].name
    masks[first][1:] = 0
    np.savez(tmp_path / "masks.npz", **masks)
    made = slice_given(str(model), [tmp_path / "masks.npz"], tmp_path / "given")
    assert made.plan()[first].count == 1
    assert made.manifest.budget["keep"] < 1


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"drop_layers": 1}, "blocks of a convolutional network"),
        ({"seq_len": 7}, "1 tokens of every image"),
        ({"compensate": "fuse"}, "fuse"),
    ],
)
def test_what_channels_do_not_have_is_refused(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(DeployPruneError, match=said):
        run(load_recipe(**settings(tmp_path, **changes)))
    assert not (tmp_path / "b").exists()


def test_residual_streams_are_only_of_convolutions(tmp_path: Path) -> None:
    given = settings(tmp_path) | {"model": str(image_checkpoint(tmp_path / "vit"))}
    given["data"] = str(image_data(tmp_path / "eight.npz"))
    with pytest.raises(InputError, match="convolutional"):
        run(load_recipe(**given, cut_residual=True))


def test_a_latency_budget_goes_by_a_measured_table(tmp_path: Path) -> None:
    given = settings(tmp_path)
    table = probe(given["model"], widths=2, seconds=0.1)
    assert isinstance(table, ChannelLatency)
    assert len(table.points) == 1 + 1 + 4
    assert table.points[0].flops == 1.0
    surgery = surgery_of(load_dense(given["model"], "classification").model, (3, 16, 16), residual=True)
    assert isinstance(surgery, ChannelSurgery)
    costs = channel_latency(surgery.graph, table)
    assert costs.dense == pytest.approx(table.points[0].fitted_ms)
    inner = surgery_of(surgery.model, (3, 16, 16))
    assert isinstance(inner, ChannelSurgery)
    assert channel_latency(inner.graph, table).dense == pytest.approx(costs.dense)
    print_latency_table(table)
    flops = channel_flops(surgery.graph)  # what so small a network really takes is noise
    table.base_ms, table.single = 1e-6 * flops.base, {n: 1e-6 * v for n, v in flops.single.items()}
    table.double = [(*pair, 1e-6 * v) for pair, v in flops.double.items()]
    (tmp_path / "lut.json").write_text(table.model_dump_json())
    assert read_latency_table(tmp_path / "lut.json") == table
    recipe = load_recipe(**given | {"keep_flops": None}, keep_latency=0.7, lut=str(tmp_path / "lut.json"))
    made = run(recipe, export=False, bench=False)
    (limit,) = made.manifest.budget["limits"]
    assert limit["kind"] == "latency"
    assert limit["reached"] <= limit["limit"]
    setting = Setting(given["model"], given["task"], given["data"], (0.7,), (0,), samples=64, lut=recipe.lut)
    (row,) = run_experiment("prediction", setting, tmp_path / "out")[0]["rows"]
    assert row["predicted"] <= 0.7
    assert row["relative_error"] == row["predicted"] / row["ratio_to_dense"] - 1
    other = channel_checkpoint(tmp_path / "other", "vgg")
    with pytest.raises(InputError, match="measured on another network"):
        run(load_recipe(**given | {"keep_flops": None, "model": str(other)}, keep_latency=0.9, lut=recipe.lut))


def test_rates_are_found_again() -> None:
    rng = np.random.default_rng(0)
    features, rates = rng.uniform(1, 1e6, (20, 5)), np.array([1e-3, 2e-9, 0.0, 5e-8, 1e-9])
    assert fit_rates(features, features @ rates) == pytest.approx(rates, rel=1e-6, abs=1e-12)


def test_code_is_run_only_where_it_is_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = settings(tmp_path)
    monkeypatch.delenv(ALLOW_CODE)
    with pytest.raises(InputError, match="would run that module's code") as raised:
        run(load_recipe(**given))
    assert "--allow-code conv_tiny" in (raised.value.hint or "")
    flags = ["run", given["model"], "--task", given["task"], "--data", given["data"], "--out", given["out"]]
    allowed = CliRunner().invoke(app, ["--allow-code", "conv_tiny", *flags, "--formats", "onnx", "--json"])
    assert allowed.exit_code == 0, allowed.output
    monkeypatch.delenv(ALLOW_CODE, raising=False)
    with pytest.raises(InputError, match="would run that module's code"):
        deploy_prune.load(given["out"])


def test_a_sliced_module_is_no_dense_checkpoint(bundle: Bundle) -> None:
    with pytest.raises(UnsupportedModelError, match="sliced already"):
        load_dense(str(bundle.path("sliced")), "classification")


def test_damaged_module_files_are_named(tmp_path: Path) -> None:
    model = channel_checkpoint(tmp_path / "model")
    entry = json.loads((model / FILE).read_text())
    for change, said in (({"image": [3, 16]}, "damaged"), ({"version": 9}, "newer"), ({"format": "x"}, "does not")):
        (model / FILE).write_text(json.dumps(entry | change))
        with pytest.raises(BundleError, match=said):
            load_dense(str(model), "classification")
    (model / FILE).write_text(json.dumps(entry))
    (model / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"no model\.safetensors"):
        load_dense(str(model), "classification")


def test_folders_of_timm_are_read(tmp_path: Path) -> None:
    cfg = {"input_size": [3, 224, 224], "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.2, 0.2], "crop_pct": 0.95}
    cfg |= {"interpolation": "bicubic", "num_classes": 2, "label_names": ["cat", "dog"]}
    entry = {"architecture": "resnet18", "num_classes": 2, "pretrained_cfg": cfg}
    (tmp_path / "config.json").write_text(json.dumps(entry))
    config = read_module_config(tmp_path)
    assert config is not None
    assert (config.factory, config.model_type, config.labels) == ("timm.create_model", "resnet18", ("cat", "dog"))
    assert config.processor is not None
    assert config.processor["size"] == {"shortest_edge": 235}
    (tmp_path / "config.json").write_text(json.dumps(entry | {"pretrained_cfg": {**cfg, "crop_mode": "border"}}))
    with pytest.raises(UnsupportedModelError, match="border"):
        read_module_config(tmp_path)


def test_classes_of_a_timm_folder_win_over_those_of_its_first_training(tmp_path: Path) -> None:
    first = {"num_classes": 4, "label_names": ["of", "the", "first", "training"], "mean": [0.5] * 3, "std": [0.5] * 3}
    names: Any
    for names in (["cat", "dog", "eel"], {"0": "cat", "2": "eel"}):
        entry = {"architecture": "resnet18", "num_classes": 3, "label_names": names, "pretrained_cfg": first}
        (tmp_path / "config.json").write_text(json.dumps(entry))
        config = read_module_config(tmp_path)
        assert config is not None
        assert config.kwargs["num_classes"] == 3
        assert config.labels == ("cat", "dog" if isinstance(names, list) else "LABEL_1", "eel")


def test_the_experiment_of_channels(tmp_path: Path) -> None:
    given = settings(tmp_path)
    setting = Setting(given["model"], given["task"], given["data"], (0.7, 0.5), (0,), samples=64)
    document, files = run_experiment("cnn", setting, tmp_path / "out")
    methods = {keep: [r["method"] for r in document["rows"] if r["keep"] == keep] for keep in (0.7, 0.5)}
    assert methods == {0.7: list(CHANNEL_TRADEOFF), 0.5: list(CHANNEL_STAGES)}
    assert all(row["kept_flops"] <= row["keep"] and row["kept_params"] < 1 for row in document["rows"])
    assert {f.suffix for f in files} >= {".json", ".md", ".csv"}


@pytest.mark.parametrize(
    ("name", "instead"),
    [
        ("recover", "--recover-epochs"),
        ("latency", "--keep-latency"),
        ("rival", "deploy-prune bench"),
        ("tradeoff", "The experiments of channels are prediction, cnn"),
    ],
)
def test_an_experiment_of_heads_says_what_there_is_for_channels(name: str, instead: str, tmp_path: Path) -> None:
    given = settings(tmp_path)
    setting = Setting(given["model"], given["task"], given["data"], (0.7,), (0,), samples=64)
    with pytest.raises(InputError, match=f"{name} is of heads and neurons.*convolutional network") as caught:
        run_experiment(name, setting, tmp_path / "out")
    assert instead in caught.value.hint
    assert "The experiments of channels are prediction, cnn" in caught.value.hint


def test_the_api_exports_modules_and_image_models(tmp_path: Path) -> None:
    image = (3, 16, 16)
    plain = tiny_cnn("basic", classes=3)
    with pytest.raises(InputError, match="not known which images this ResNet takes"):
        deploy_prune.export_onnx(plain, tmp_path / "none.onnx")
    loaded = load_dense(str(channel_checkpoint(tmp_path / "model")), "classification").model
    vit = load_dense(str(image_checkpoint(tmp_path / "vit")), "classification").model
    for model, given, size in ((plain, image, image), (loaded, None, image), (vit, None, (3, 8, 8))):
        path = deploy_prune.export_onnx(model, tmp_path / "model.onnx", image=given)
        x = np.random.default_rng(1).normal(size=(2, *size)).astype(np.float32)
        (found,) = InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"pixel_values": x})
        with torch.inference_mode():
            expected = model(torch.from_numpy(x))
        assert np.abs(found - logits(expected).numpy()).max() <= 1e-4
