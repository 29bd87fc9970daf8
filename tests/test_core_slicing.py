"""masked == sliced, save -> reload bit-equal, costs exact: for every architecture, head, padding and ragged plan."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conv_tiny import seen_data
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models_tiny import FAMILIES, HEADS, heads_of, random_masks, tiny_config, tiny_inputs, tiny_model

from deploy_prune.archs import arch_of, check_config
from deploy_prune.archs.conv import trace_channels
from deploy_prune.channel_slicing import slice_channels
from deploy_prune.checkpoint import load_sliced, save_sliced
from deploy_prune.costs import encoder_flops, removed_params
from deploy_prune.errors import UnsupportedModelError
from deploy_prune.heads import Head
from deploy_prune.masking import OutputWeights, mask_model
from deploy_prune.slicing import slice_model
from deploy_prune.units import MaskSet, SlicePlan


class ArchitectureContract:
    """What every adapter must hold; a subclass names its family."""

    family: str

    def outputs(self, model: Any, head: str, **shape: int) -> dict[str, torch.Tensor]:
        with torch.inference_mode():
            return Head(head).outputs(model, tiny_inputs(self.family, **shape))  # type: ignore[arg-type]

    @pytest.mark.parametrize("head", HEADS)
    @pytest.mark.parametrize("seed", range(5))
    def test_sliced_equals_masked(self, head: str, seed: int) -> None:
        if head not in heads_of(self.family):
            pytest.skip(f"{self.family} models have no such head here")
        model = tiny_model(self.family, head, seed=seed)
        arch = arch_of(model)
        groups = arch.groups(model)
        plan = SlicePlan.from_masks(groups, random_masks(groups, seed))
        dense = self.outputs(model, head, seed=seed)
        virtual = self.outputs(mask_model(model, groups, plan), head, seed=seed)
        sliced_model = slice_model(model, groups, plan)
        sliced = self.outputs(sliced_model, head, seed=seed)
        assert type(sliced_model) is type(model)
        for name, expected in virtual.items():
            assert (sliced[name] - expected).abs().max() <= arch.tolerance * max(1.0, float(expected.abs().max()))
            assert torch.equal(sliced[name].argmax(-1), expected.argmax(-1))
            assert (expected - dense[name]).abs().max() > 1e-3, "the masks changed nothing"

    def test_refitted_sliced_equals_masked(self) -> None:
        model = tiny_model(self.family)
        groups = arch_of(model).groups(model)
        plan = SlicePlan.from_masks(groups, random_masks(groups, 1, scales=False))
        generator = torch.Generator().manual_seed(0)
        updates = {
            g.name: OutputWeights(
                torch.randn(g.hidden, plan[g.name].count * g.width, generator=generator) / 6,
                torch.randn(g.hidden, generator=generator),
            )
            for g in groups
        }
        virtual = self.outputs(mask_model(model, groups, plan, updates), "classification")["logits"]
        sliced = self.outputs(slice_model(model, groups, plan, updates), "classification")["logits"]
        assert (virtual - sliced).abs().max() <= 1e-5

    def test_whole_plan_changes_nothing(self) -> None:
        model = tiny_model(self.family)
        groups = arch_of(model).groups(model)
        whole = slice_model(model, groups, SlicePlan.from_masks(groups, MaskSet.ones(groups)))
        assert torch.equal(
            self.outputs(whole, "classification")["logits"], self.outputs(model, "classification")["logits"]
        )

    @pytest.mark.parametrize("seed", range(3))
    def test_parameters_are_those_of_the_plan(self, seed: int) -> None:
        model = tiny_model(self.family)
        groups = arch_of(model).groups(model)
        plan = SlicePlan.from_masks(groups, random_masks(groups, seed))
        sliced = slice_model(model, groups, plan)
        before, after = (sum(p.numel() for p in m.parameters()) for m in (model, sliced))
        assert before - after == removed_params(groups, plan)

    @pytest.mark.parametrize("seed", range(5))
    def test_reload_is_bit_equal(self, seed: int, tmp_path: Path) -> None:
        model = tiny_model(self.family, seed=seed)
        groups = arch_of(model).groups(model)
        sliced = slice_model(model, groups, SlicePlan.from_masks(groups, random_masks(groups, seed)))
        save_sliced(sliced, _NoTokenizer(), tmp_path)
        again = load_sliced(tmp_path)
        assert type(again) is type(model)
        expected, found = sliced.state_dict(), again.state_dict()
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[k], found[k]) for k in expected)
        assert torch.equal(
            self.outputs(sliced, "classification")["logits"], self.outputs(again, "classification")["logits"]
        )

    def test_size_attributes_follow(self) -> None:
        model = tiny_model(self.family)
        arch = arch_of(model)
        groups = arch.groups(model)
        masks = MaskSet.ones(groups)
        masks[groups[0].name][1:] = 0
        core: Any = slice_model(model, groups, SlicePlan.from_masks(groups, masks)).get_submodule(groups[0].core)
        names = ("num_attention_heads", "n_heads", "all_head_size", "dim")
        sizes = {n: getattr(core, n) for n in names if hasattr(core, n)}
        assert sizes
        assert all(v == (1 if "head" in n and n != "all_head_size" else 8) for n, v in sizes.items())


class _NoTokenizer:
    def save_pretrained(self, folder: Path) -> None:
        pass


for _family in FAMILIES:
    _name = f"Test{_family.title().replace('-', '')}"
    globals()[_name] = type(_name, (ArchitectureContract,), {"family": _family})


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(seed=st.integers(0, 2**16), family=st.sampled_from(FAMILIES), length=st.integers(6, 20), batch=st.integers(1, 3))
def test_sliced_equals_masked_for_any_plan(seed: int, family: str, length: int, batch: int) -> None:
    model = tiny_model(family, seed=seed % 7)
    groups = arch_of(model).groups(model)
    plan = SlicePlan.from_masks(groups, random_masks(groups, seed))
    inputs = tiny_inputs(family, seed, batch, length)
    with torch.inference_mode():
        virtual = mask_model(model, groups, plan)(**inputs).logits
        sliced = slice_model(model, groups, plan)(**inputs).logits
    assert (virtual - sliced).abs().max() <= 1e-5 * max(1.0, float(virtual.abs().max()))


FRESH = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "deploy_prune":
            raise ImportError("this environment has no " + name)
sys.meta_path.insert(0, Block())
import torch
import transformers
model, info = getattr(transformers, sys.argv[2]).from_pretrained(
    sys.argv[1] + "/sliced", trust_remote_code=True, output_loading_info=True)
assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], info
case = torch.load(sys.argv[1] + "/case.pt", weights_only=True)
expected = case.pop("logits")
with torch.inference_mode():
    assert torch.equal(model.eval()(**case).logits, expected)
print("bit-equal")
"""


def assert_loads_alone(sliced: Any, inputs: dict[str, torch.Tensor], folder: Path) -> None:
    """Save a sliced model and load it in a process that lacks this package."""
    save_sliced(sliced, _NoTokenizer(), folder / "sliced")
    with torch.inference_mode():
        torch.save({**inputs, "logits": sliced(**inputs).logits}, folder / "case.pt")
    auto = "AutoModelForImageClassification" if "pixel_values" in inputs else "AutoModelForSequenceClassification"
    words = [sys.executable, "-c", FRESH, str(folder), auto]
    done = subprocess.run(words, capture_output=True, text=True, cwd=folder, check=False)
    assert "bit-equal" in done.stdout, done.stderr


@pytest.mark.parametrize("family", FAMILIES)
def test_loads_with_trust_remote_code_without_this_package(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    groups = arch_of(model).groups(model)
    sliced = slice_model(model, groups, SlicePlan.from_masks(groups, random_masks(groups, 3)))
    assert_loads_alone(sliced, tiny_inputs(family), tmp_path)


@pytest.mark.parametrize("family", ["resnet", "mobilenet_v2"])
def test_convolutional_networks_load_without_this_package(family: str, tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"depth_multiplier": 0.05, "depth_divisible_by": 2, "min_depth": 4}
    if family == "resnet":
        sizes = {"embedding_size": 8, "hidden_sizes": [8, 12], "depths": [2, 1], "layer_type": "basic"}
    config = transformers.CONFIG_MAPPING[family](**sizes, num_labels=3)
    torch.manual_seed(0)
    model = seen_data(transformers.AutoModelForImageClassification.from_config(config))
    x = torch.randn(2, 3, 32, 32)
    graph = trace_channels(model, x)
    masks = random_masks(graph.groups, 3)
    masks[graph.groups[0].name][:] = 0  # its layers are stood for by others
    sliced = slice_channels(model, graph, SlicePlan.from_masks(graph.groups, masks))
    assert_loads_alone(sliced, {"pixel_values": x}, tmp_path)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (transformers.AlbertConfig(), "shares"),
        (transformers.DebertaV2Config(), "relative positions"),
        (transformers.T5Config(), "encoder-decoder"),
        (transformers.LlamaConfig(num_attention_heads=8, num_key_value_heads=2), "grouped-query"),
        (transformers.GPT2Config(), "No adapter"),
        (tiny_config("bert", is_decoder=True), "decoder"),
        (tiny_config("bert", deploy_prune={"groups": []}), "sliced already"),
    ],
    ids=["albert", "deberta-v2", "t5", "gqa", "gpt2", "decoder", "sliced"],
)
def test_refuses_with_the_reason(config: Any, reason: str) -> None:
    with pytest.raises(UnsupportedModelError, match=reason):
        check_config(config)


def test_flops_formula_of_the_report_is_wrong() -> None:
    """BERT-base at 128 tokens: 22.35 G exact, 32.6 G by the report's 4L(2 d dff + d^2)T."""
    config = transformers.BertConfig(num_hidden_layers=12)
    with torch.device("meta"):
        model = transformers.BertModel(config)
    layers, d, dff, t = 12, 768, 3072, 128
    exact = 2 * layers * t * (4 * d * d + 2 * d * dff + 2 * t * d)
    assert encoder_flops(check_config(config).groups(model), t) == exact
    assert round(exact / 1e9, 2) == 22.35
    assert round(4 * layers * (2 * d * dff + d * d) * t / 1e9, 1) == 32.6
