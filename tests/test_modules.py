"""Modules that are none of transformers, and image models of it: what their folders may lack, and how that is said."""

from __future__ import annotations

import json
import os
import sys
import types
from pathlib import Path
from runpy import run_path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from conv_tiny import configured, perceptron, same, seen_data, tiny_cnn, tiny_images
from models_tiny import tiny_model, tiny_rows
from runs_tiny import channel_checkpoint, image_data
from safetensors.torch import save_file
from torch import nn

import deploy_prune
from deploy_prune.bundle import Bundle
from deploy_prune.channel_pruner import ChannelPruner
from deploy_prune.checkpoint import load_dense, load_variant
from deploy_prune.cli import invoke
from deploy_prune.config import ALLOW_CODE, PROGRAMS, load_recipe
from deploy_prune.errors import BundleError, InfeasibleBudgetError, InputError, UnsupportedModelError
from deploy_prune.module_checkpoint import save_module
from deploy_prune.pipeline import run
from deploy_prune.pruner import pruner_of
from deploy_prune.stages import Options
from deploy_prune.tasks.base import Row

PROCESSOR = {"image_processor_type": "BitImageProcessor", "size": 16, "crop_size": 16}
OWN = """
from torch import nn


def net(classes=3):
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(4), nn.Conv2d(8, 6, 3), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, classes))
"""


@pytest.fixture(autouse=True)
def trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ALLOW_CODE, "conv_tiny")


def settings(folder: Path, model: Path, **changes: Any) -> dict[str, Any]:
    data = image_data(folder / "data.npz", size=16)
    given = {"model": str(model), "task": "image-classification", "data": str(data), "out": str(folder / "b")}
    return given | {"keep_flops": 0.6, **changes}


def rows(count: int) -> list[Row]:
    images = tiny_images("basic", count).numpy()
    return [Row({"pixel_values": x}, i % 4, tokens=1) for i, x in enumerate(images)]


def save(model: nn.Module, folder: Path, factory: str, processor: Any = PROCESSOR) -> Path:
    labels = ("cat", "dog", "eel")
    save_module(model, folder, factory, {"classes": 3}, image=(3, 16, 16), labels=labels, processor=processor)
    return folder


def test_a_module_saved_without_its_processor_says_what_is_missing(tmp_path: Path) -> None:
    model = save(tiny_cnn("basic", classes=3), tmp_path / "model", "conv_tiny.basic", processor=None)
    with pytest.raises(InputError, match=r"There is no .*preprocessor_config\.json") as caught:
        run(load_recipe(**settings(tmp_path, model)))
    assert "save_module(..., processor=...)" in caught.value.hint
    assert not (tmp_path / "b").exists()


def test_a_processor_of_another_size_than_the_module_is_refused(tmp_path: Path) -> None:
    wide = {**PROCESSOR, "size": 32, "crop_size": 32}
    with pytest.raises(InputError, match="makes images of 32 x 32, but the model takes 16 x 16"):
        save(tiny_cnn("basic", classes=3), tmp_path / "model", "conv_tiny.basic", processor=wide)
    model = save(tiny_cnn("basic", classes=3), tmp_path / "model", "conv_tiny.basic")
    (model / "preprocessor_config.json").write_text(json.dumps(wide))
    with pytest.raises(InputError, match="makes images of 32 x 32, but the model takes 16 x 16"):
        run(load_recipe(**settings(tmp_path, model)))


def test_an_image_model_without_its_processor_says_what_is_missing(tmp_path: Path) -> None:
    model = channel_checkpoint(tmp_path / "model", "resnet")
    (model / "preprocessor_config.json").unlink()
    with pytest.raises(InputError, match=r"There is no .*preprocessor_config\.json"):
        load_dense(str(model), "classification")


def test_an_architecture_that_the_installed_timm_lacks_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def create_model(model_name: str, **options: Any) -> nn.Module:
        raise RuntimeError(f"Unknown model ({model_name})")

    fake = types.ModuleType("timm")
    fake.create_model = create_model  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "timm", fake)
    cfg = {"input_size": [3, 16, 16], "mean": [0.5] * 3, "std": [0.5] * 3, "num_classes": 2}
    entry = {"architecture": "resnet999", "num_classes": 2, "pretrained_cfg": cfg}
    (tmp_path / "config.json").write_text(json.dumps(entry))
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(BundleError, match=r"timm\.create_model\(.*resnet999.*\) fails: RuntimeError: Unknown model"):
        load_dense(str(tmp_path), "classification")


def test_a_torchvision_that_was_built_for_another_torch_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "torchvision").mkdir()
    said = "operator torchvision::nms does not exist"
    (tmp_path / "torchvision" / "__init__.py").write_text(f"raise RuntimeError({said!r})")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    monkeypatch.delitem(sys.modules, "torchvision.models", raising=False)
    folder = save(tiny_cnn("basic", classes=3), tmp_path / "model", "torchvision.models.resnet18")
    with pytest.raises(InputError, match=rf"torchvision\.models cannot be imported: {said}") as caught:
        load_dense(str(folder), "classification")
    assert "for this torch" in caught.value.hint


def test_convolutions_of_own_classes_are_cut() -> None:
    torch.manual_seed(0)
    model = seen_data(same())
    assert pruner_of(model) is ChannelPruner
    found = deploy_prune.prune(model, rows(64), 0.5)
    assert found.limits[0]["reached"] <= found.limits[0]["limit"]
    small = deploy_prune.slice_model(model, found)
    x = tiny_images("basic", 3, seed=1)
    with torch.inference_mode():
        virtual = found.surgery.mask(found.plan, found.updates)(x)
        assert float((small(x) - virtual).abs().max()) <= 1e-5 * max(1.0, float(virtual.abs().max()))


def test_the_api_cuts_residual_streams_where_it_is_asked_to() -> None:
    model = tiny_cnn("basic")
    data, options = rows(64), Options(criterion="fisher", compensate="none", rearrange="none", label_free=True)
    with pytest.raises(InfeasibleBudgetError, match="cut_residual=True"):
        deploy_prune.prune(model, data, 0.3, options=options)
    found = deploy_prune.prune(model, data, 0.3, cut_residual=True, options=options)
    assert any(g.coupled and found.plan[g.name].count < g.size for g in found.groups)
    small = deploy_prune.slice_model(model, found)
    x = tiny_images("basic", 3, seed=1)
    with torch.inference_mode():
        virtual = found.surgery.mask(found.plan)(x)
        assert float((small(x) - virtual).abs().max()) <= 1e-5 * max(1.0, float(virtual.abs().max()))
    with pytest.raises(InputError, match="cut_residual is for convolutional networks"):
        deploy_prune.prune(tiny_model("vit"), tiny_rows(64, family="vit"), 0.5, cut_residual=True)


def test_a_network_without_convolutions_is_refused(tmp_path: Path) -> None:
    model = perceptron(classes=3).eval()
    with pytest.raises(UnsupportedModelError, match="has no convolution") as caught:
        deploy_prune.prune(model, rows(64), 0.5)
    assert "bert" in caught.value.hint
    folder = save(model, tmp_path / "model", "conv_tiny.perceptron")
    with pytest.raises(UnsupportedModelError, match="has no convolution"):
        run(load_recipe(**settings(tmp_path, folder)))
    assert not (tmp_path / "b").exists()


def test_a_module_may_call_anything_its_config(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = save(seen_data(configured(classes=3)), tmp_path / "model", "conv_tiny.configured")
    made = run(load_recipe(**settings(tmp_path, model, formats=("onnx",), samples=64)), bench=False)
    assert {a.parity.status for a in made.manifest.artifacts} == {"passed"}
    again = deploy_prune.load(made)
    assert again.config == {"classes": 3}
    x = tiny_images("basic", 2)
    with torch.inference_mode():
        virtual = load_variant(made, "virtual")(x)
        assert float((again(x) - virtual).abs().max()) <= 1e-5 * max(1.0, float(virtual.abs().max()))
    found = deploy_prune.prune(configured(), rows(64), 0.6)
    deploy_prune.export_onnx(found.slice(), tmp_path / "own.onnx", image=(3, 16, 16))


@pytest.mark.parametrize("by", ["flag", "environment"])
def test_a_module_in_the_working_folder_is_found_however_it_is_allowed(
    by: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_nets.py").write_text(OWN)
    model = save(run_path(str(tmp_path / "own_nets.py"))["net"](), tmp_path / "model", "own_nets.net")
    given = settings(tmp_path, model)
    monkeypatch.chdir(tmp_path)
    elsewhere = [path for path in sys.path if path not in ("", str(tmp_path), os.getcwd())]
    monkeypatch.setattr(sys, "path", elsewhere)  # as a console script has it
    monkeypatch.delitem(sys.modules, "own_nets", raising=False)
    monkeypatch.setenv(ALLOW_CODE, "own_nets" if by == "environment" else PROGRAMS)
    flags = ["--allow-code", "own_nets"] if by == "flag" else []
    words = ["prune", given["model"], "--task", given["task"], "--data", given["data"], "--out", given["out"]]
    assert invoke([*flags, *words, "--samples", "64"]) == 0
    assert Bundle.open(given["out"]).manifest.model["architecture"] == "Sequential"
    monkeypatch.delitem(sys.modules, "own_nets", raising=False)


def test_programs_alone_let_no_module_of_the_working_folder_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(ALLOW_CODE, "")
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in ("", str(tmp_path))])
    assert invoke(["--allow-code", PROGRAMS, "--version"]) == 0
    assert os.getcwd() not in sys.path


def mobile(folder: Path) -> Path:
    """Save a tiny MobileNetV2 of transformers with its own processor."""
    config = transformers.MobileNetV2Config(
        depth_multiplier=0.05, depth_divisible_by=2, min_depth=4, finegrained_output=False, image_size=32, num_labels=3
    )
    crop = {"height": 32, "width": 32}
    processor = transformers.MobileNetV2ImageProcessorPil(size={"shortest_edge": 36}, crop_size=crop)
    return _saved(transformers.MobileNetV2ForImageClassification(config), processor, folder)


def efficient(folder: Path) -> Path:
    """Save a tiny EfficientNet of transformers with its own processor."""
    stages: dict[str, Any] = {"kernel_sizes": [3, 5], "in_channels": [32, 16], "out_channels": [16, 24]}
    stages |= {"strides": [1, 2], "num_block_repeats": [1, 2], "expand_ratios": [1, 4], "depthwise_padding": []}
    config = transformers.EfficientNetConfig(
        width_coefficient=0.05, depth_coefficient=1.0, hidden_dim=64, image_size=16, num_labels=3, **stages
    )
    processor = transformers.EfficientNetImageProcessorPil(size={"height": 16, "width": 16}, rescale_offset=True)
    return _saved(transformers.EfficientNetForImageClassification(config), processor, folder)


def _saved(model: Any, processor: Any, folder: Path) -> Path:
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.kaiming_normal_(parameter)
    seen_data(model).save_pretrained(folder)  # type: ignore[operator]
    processor.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("make", "export"), [(mobile, False), (efficient, True)])
def test_mobilenets_and_efficientnets_of_transformers_are_pruned(make: Any, export: bool, tmp_path: Path) -> None:
    model = make(tmp_path / "model")
    made = run(load_recipe(**settings(tmp_path, model, formats=("onnx",), samples=64)), export=export, bench=False)
    counts = made.manifest.counts
    assert counts["sliced"]["flops"] <= 0.6 * counts["dense"]["flops"]
    assert made.manifest.quality["virtual"]["value"] == made.manifest.quality["sliced"]["value"]
    assert {a.parity.status for a in made.manifest.artifacts} == ({"passed"} if export else set())
    again = deploy_prune.load(made)
    assert type(again).__name__ == type(load_dense(str(model), "classification").model).__name__
    picture = np.random.default_rng(0).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    kind = {mobile: transformers.MobileNetV2ImageProcessorPil, efficient: transformers.EfficientNetImageProcessorPil}
    theirs: Any = kind[make].from_pretrained(model)
    wanted = np.asarray(theirs(picture, return_tensors="np", input_data_format="channels_last")["pixel_values"])
    np.testing.assert_array_equal(load_dense(str(model), "classification").processor([picture]), wanted)
