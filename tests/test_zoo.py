"""Networks as torchvision, timm and transformers make them: units, masked == sliced, costs, files, the command line.

`make test-zoo` runs this where torchvision and timm are; elsewhere it is skipped.
"""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
import zoo
from PIL import Image
from safetensors.torch import load_file
from test_core_conv import ragged
from torch import nn

import deploy_prune
from deploy_prune.archs import of_transformers
from deploy_prune.archs.conv import ChannelGraph
from deploy_prune.bundle import VARIANTS, Bundle
from deploy_prune.channel_costs import channel_flops, channel_params, counts_of
from deploy_prune.channel_masking import mask_channels
from deploy_prune.channel_pruner import ChannelPruner
from deploy_prune.channel_slicing import logits, slice_channels
from deploy_prune.checkpoint import load_dense, load_sliced, load_variant, save_sliced
from deploy_prune.cli import invoke
from deploy_prune.costs import Budget
from deploy_prune.errors import InfeasibleBudgetError
from deploy_prune.export.onnx import onnx_from_torch
from deploy_prune.heads import Head
from deploy_prune.module_checkpoint import save_module
from deploy_prune.runtime_bench.flops import count_onnx, count_torch
from deploy_prune.signature import Signature
from deploy_prune.stages import Options
from deploy_prune.tasks.base import Row
from deploy_prune.units import SlicePlan

if zoo.MISSING:
    pytest.skip(f"{' and '.join(zoo.MISSING)} not installed: make test-zoo", allow_module_level=True)
zoo.import_torchvision()

HEAD = Head("classification")
RANDOM = Options(criterion="random", compensate="none", rearrange="none", label_free=True)
LABELS = tuple(f"n{number}" for number in range(zoo.CLASSES))
SPLITS = {"train": 80, "test": 20}
SHORT = ("--batches", "1", "--bench-seconds", "0.2")
TESTS = Path(__file__).parent
SPLIT, GROUPED = "they are concatenated or split", "is a grouped convolution"


@dataclass(frozen=True)
class Case:
    """Say what is expected of a network: its groups, and one reason why other channels stay."""

    groups: int
    why: str = ""
    keep: float = 0.6
    residual: bool = False


CASES = {
    "torchvision/vgg11_bn": Case(10),
    "torchvision/resnet18": Case(12, residual=True),
    "torchvision/resnet34": Case(16),
    "torchvision/resnet50": Case(33),
    "torchvision/mobilenet_v2": Case(20),
    "torchvision/mobilenet_v3_small": Case(23),
    "torchvision/efficientnet_b0": Case(35),
    "torchvision/densenet121": Case(58, SPLIT),
    "torchvision/googlenet": Case(21, SPLIT),
    "torchvision/resnext50_32x4d": Case(1, GROUPED, keep=0.97),
    "torchvision/regnet_y_400mf": Case(17, GROUPED, keep=0.95),
    "timm/resnet18": Case(8),
    "timm/resnet50": Case(33),
    "timm/vgg11_bn": Case(10),
    "timm/mobilenetv2_100": Case(20),
    "timm/efficientnet_b0": Case(35),
    "timm/vit_tiny_patch16_224": Case(12, "they pass through a reshaping"),  # MLPs alone: heads stay
    "transformers/resnet-basic": Case(4),
    "transformers/resnet-bottleneck": Case(7),
    "transformers/mobilenet-v2": Case(20),
}


@dataclass(frozen=True)
class Net:
    """Hold a network, traced and pruned by drawn scores."""

    name: str
    case: Case
    pruner: ChannelPruner
    plan: SlicePlan

    @property
    def model(self) -> nn.Module:
        return self.pruner.model

    @property
    def graph(self) -> ChannelGraph:
        return self.pruner.graph

    def sliced(self) -> nn.Module:
        return slice_channels(self.model, self.graph, self.plan)

    def flops_of(self, model: nn.Module) -> int:
        return count_torch(model, {next(iter(inspect.signature(model.forward).parameters)): zoo.images(1)})


def rows(count: int = 16) -> list[Row]:
    return [Row({"pixel_values": x}, i % zoo.CLASSES, tokens=1) for i, x in enumerate(zoo.images(count).numpy())]


@pytest.fixture(scope="module", params=CASES)
def net(request: pytest.FixtureRequest) -> Net:
    case = CASES[request.param]
    pruner = ChannelPruner(zoo.network(request.param), HEAD, rows(), residual=case.residual)
    return Net(request.param, case, pruner, pruner.prune(Budget(case.keep), RANDOM).plan)


def test_units_are_found_and_what_stays_is_said(net: Net) -> None:
    assert len(net.graph.groups) == net.case.groups
    assert not any("does not work" in why for why in net.graph.refused.values())
    staying = net.graph.staying()
    assert not net.case.why or net.case.why in " ".join(staying)
    if net.case.keep > 0.6:
        with pytest.raises(InfeasibleBudgetError, match=rf"What stays: .*{net.case.why}"):
            net.pruner.prune(Budget(0.6), RANDOM)


@pytest.mark.parametrize("kind", ["random", "ragged"])
def test_sliced_equals_masked(net: Net, kind: str) -> None:
    plan = net.plan if kind == "random" else ragged(net.graph, 1)
    x = zoo.images(3)
    with torch.inference_mode():
        dense = logits(net.model(x))
        virtual = logits(mask_channels(net.model, net.graph, plan)(x))
        sliced_model = slice_channels(net.model, net.graph, plan)
        sliced = logits(sliced_model(x))
    assert type(sliced_model) is type(net.model)
    assert (sliced - virtual).abs().max() <= 1e-5 * virtual.abs().max()
    assert torch.equal(sliced.argmax(1), virtual.argmax(1))
    assert (dense - virtual).abs().max() > 1e-3 * dense.abs().max(), "the masks changed nothing"


def test_costs_are_those_of_the_sliced_network(net: Net) -> None:
    params = sum(p.numel() for p in net.model.parameters())
    flops, sizes = channel_flops(net.graph), channel_params(net.graph, params)
    assert (flops.dense, sizes.dense) == (net.flops_of(net.model), params)
    counts, sliced = counts_of(net.graph.groups, net.plan), net.sliced()
    assert flops.cost(counts) == net.flops_of(sliced) <= net.case.keep * flops.dense
    assert sizes.cost(counts) == sum(p.numel() for p in sliced.parameters())


def test_reload_is_bit_equal(net: Net, tmp_path: Path) -> None:
    sliced = net.sliced()
    save(net, sliced, tmp_path)
    again = load_sliced(tmp_path)
    expected, found = sliced.state_dict(), again.state_dict()
    assert type(again) is type(sliced)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[k], found[k]) for k in expected)
    x = zoo.images(2)
    with torch.inference_mode():
        assert torch.equal(logits(sliced(x)), logits(again(x)))


def save(net: Net, model: nn.Module, folder: Path) -> None:
    if of_transformers(model):
        save_sliced(model, _NoProcessor(), folder)
        return
    package, _, architecture = net.name.partition("/")
    kwargs = zoo.options(net.name)
    if package == "torchvision":
        factory = f"torchvision.models.{architecture}"
    else:
        factory, kwargs = "timm.create_model", {"model_name": architecture, **kwargs}
    save_module(model, folder, factory, kwargs, image=zoo.IMAGE, labels=LABELS)


class _NoProcessor:
    def save_pretrained(self, folder: Path) -> None:
        pass


@pytest.mark.parametrize("net", ["torchvision/resnet18"], indirect=True)
def test_a_fresh_process_reloads_the_sliced_network(net: Net, tmp_path: Path) -> None:
    sliced, x = net.sliced(), zoo.images(2)
    save(net, sliced, tmp_path / "sliced")
    np.save(tmp_path / "x.npy", x.numpy())
    done = subprocess.run(
        [sys.executable, "-c", RELOAD],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    with torch.inference_mode():
        assert np.array_equal(np.load(tmp_path / "y.npy"), sliced(x).numpy())


RELOAD = """
import numpy as np, torch, zoo
from deploy_prune.module_checkpoint import load_module

zoo.import_torchvision()
with torch.inference_mode():
    np.save("y.npy", load_module("sliced")(torch.from_numpy(np.load("x.npy"))).numpy())
"""


@pytest.mark.parametrize(
    "net", ["torchvision/resnet18", "torchvision/mobilenet_v2", "timm/efficientnet_b0"], indirect=True
)
def test_onnx_gives_what_the_sliced_network_gives(net: Net, tmp_path: Path) -> None:
    sliced, x = net.sliced(), zoo.images(3, seed=2)
    path = tmp_path / "sliced.onnx"
    onnx_from_torch(sliced, HEAD, path, input_names=Signature(("pixel_values",), zoo.IMAGE, 1))
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (found,) = session.run(["logits"], {"pixel_values": x.numpy()})
    with torch.inference_mode():
        expected = sliced(x).numpy()
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()
    assert count_onnx(path, {"pixel_values": (1, *zoo.IMAGE)}) == net.flops_of(sliced)


def timm_folder(folder: Path, architecture: str = "resnet18") -> nn.Module:
    """Save a network as timm saves it for the hub."""
    from timm.models import save_for_hf

    model = zoo.network(f"timm/{architecture}")
    settings = {"input_size": zoo.IMAGE, "crop_pct": 0.9}
    save_for_hf(model, str(folder), {"label_names": list(LABELS)}, safe_serialization=True, data_config=settings)
    return model


def test_a_folder_of_timm_is_read_as_timm_reads_it(tmp_path: Path) -> None:
    import timm

    model = timm_folder(tmp_path / "model")
    dense = load_dense(str(tmp_path / "model"), "classification")
    theirs = timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True).eval()
    assert dense.config.labels == LABELS
    x = zoo.images(2)
    with torch.inference_mode():
        assert torch.equal(dense.model(x), model(x))
        assert torch.equal(theirs(x), model(x))
    prepare = timm.data.create_transform(**timm.data.resolve_model_data_config(theirs), is_training=False)
    for size in ((80, 97), (71, 71), (64, 64), (120, 66)):
        picture = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
        wanted = prepare(Image.fromarray(picture))[None]
        np.testing.assert_allclose(dense.processor([picture]), wanted, atol=1e-6, err_msg=str(size))


def test_the_command_line_takes_a_network_of_torchvision(tmp_path: Path) -> None:
    model = zoo.network("torchvision/resnet18")
    processor = {"image_processor_type": "BitImageProcessor", "size": 64, "crop_size": 64}
    save_module(
        model,
        tmp_path / "model",
        "torchvision.models.resnet18",
        {"num_classes": zoo.CLASSES},
        image=zoo.IMAGE,
        labels=LABELS,
        processor=processor,
    )
    rng = np.random.default_rng(0)
    data = {f"x_{name}": rng.integers(0, 256, (n, 64, 64, 3), dtype=np.uint8) for name, n in SPLITS.items()}
    data |= {f"y_{name}": rng.integers(0, zoo.CLASSES, n) for name, n in SPLITS.items()}
    np.savez(tmp_path / "images.npz", **data)
    bundle = commanded("run", tmp_path, "images.npz", "--formats", "onnx", "--runtimes", "ort-cpu", *SHORT)
    assert bundle.manifest.model["architecture"] == "ResNet"
    artifacts = {(a.variant, a.format): a.parity.status for a in bundle.manifest.artifacts}
    assert artifacts == {(variant, "onnx"): "passed" for variant in VARIANTS}
    (cell,) = (bundle.root / "bench").glob("*.json")
    measured = json.loads(cell.read_text())
    assert {m["model"] for m in measured["measurements"]} >= set(VARIANTS)
    assert not measured["failures"]


def test_the_command_line_takes_a_folder_of_timm(tmp_path: Path) -> None:
    timm_folder(tmp_path / "model")
    rng = np.random.default_rng(0)
    for name, count in {"train": 80, "validation": 20}.items():
        for number in range(count):
            folder = tmp_path / "images" / name / LABELS[number % zoo.CLASSES]
            folder.mkdir(parents=True, exist_ok=True)
            picture = rng.integers(0, 256, (70, 90, 3), dtype=np.uint8)
            Image.fromarray(picture).save(folder / f"{number}.png")
    bundle = commanded("prune", tmp_path, "images", "--cut-residual")
    assert bundle.manifest.model["architecture"] == "ResNet"
    assert len(bundle.plan().groups) == CASES["torchvision/resnet18"].groups


def commanded(command: str, folder: Path, data: str, *flags: str) -> Bundle:
    """Prune folder/model by the command line, and check the bundle's model and its reload."""
    given = ["--task", "image-classification", "--data", str(folder / data), "--out", str(folder / "bundle")]
    words = [command, str(folder / "model"), *given, "--samples", "64", "--keep-flops", "0.6"]
    words += ["--criterion", "fisher", *flags]  # the default inverts matrices of 4,608 columns: minutes
    assert invoke(words) == 0
    bundle = Bundle.open(folder / "bundle")
    counts, quality = bundle.manifest.counts, bundle.manifest.quality
    assert counts["sliced"]["flops"] <= 0.6 * counts["dense"]["flops"]
    assert quality["virtual"]["value"] == quality["sliced"]["value"]
    again, x = deploy_prune.load(bundle), zoo.images(2)
    stored = load_file(bundle.path("sliced/model.safetensors"))
    assert all(torch.equal(tensor, stored[name]) for name, tensor in again.state_dict().items())
    assert counts["sliced"]["flops"] == count_torch(again, {"x": x[:1]})
    with torch.inference_mode():
        virtual, sliced = load_variant(bundle, "virtual")(x), again(x)
    assert (virtual - sliced).abs().max() <= 1e-5 * sliced.abs().max()
    return bundle
