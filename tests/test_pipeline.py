"""The whole way on tiny models: every head, the manifest's contract, the bundle's reload, determinism."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from runs_tiny import checkpoint, data
from safetensors.torch import save_file

import deploy_prune
from deploy_prune.bundle import VARIANTS, Bundle
from deploy_prune.checkpoint import head_of, load_dense, load_variant
from deploy_prune.config import ALLOW_PICKLE, load_recipe
from deploy_prune.errors import InputError, VerdictError
from deploy_prune.export import evaluation_of
from deploy_prune.pipeline import run, slice_given
from deploy_prune.resolving import check_offload
from deploy_prune.runtime_bench.flops import count_onnx
from deploy_prune.runtimes import open_runner

TASKS = {
    "text-classification": "classification",
    "text-pair": "pair",
    "regression": "regression",
    "token-classification": "token",
    "question-answering": "qa",
    "embedding": "embedding",
}


def prepare(folder: Path, task: str, **changes: Any) -> dict[str, Any]:
    kind = TASKS[task]
    model = checkpoint(folder / "model", "classification" if kind == "pair" else kind)
    settings = {"model": str(model), "task": task, "data": str(data(folder / "data", kind)), "out": str(folder / "b")}
    settings["formats"] = ("onnx",)
    return {**settings, "text_column": "text_a,text_b" if kind == "pair" else None, "keep_flops": 0.6, **changes}


@pytest.fixture(scope="module", params=TASKS)
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    settings = prepare(tmp_path_factory.mktemp("run"), request.param, bench_seconds=0.2, runtimes=("ort-cpu",))
    return run(load_recipe(**settings))


def test_manifest_holds_the_contract(bundle: Bundle) -> None:
    m = json.loads((bundle.root / "manifest.json").read_text())
    assert m["schema_version"] == "1.0"
    assert m["budget"]["kind"] == "flops"
    assert m["budget"]["keep"] == 0.6
    assert m["budget"]["seq_len"] >= 1
    assert [s["name"] for s in m["stages"]] == [
        *("calibrate", "score", "search", "rearrange", "compensate", "slice", "evaluate", "export", "bench"),
    ]
    assert all(s["seconds"] >= 0 for s in m["stages"])
    assert m["plan"]["hash"] == bundle.plan().hash
    assert len(m["plan"]["layers"]) == 3
    assert all(set(layer) == {"heads", "neurons"} for layer in m["plan"]["layers"])
    counts = m["counts"]
    assert counts["virtual"] == counts["dense"]
    assert counts["sliced"]["encoder_flops"] <= 0.6 * counts["dense"]["encoder_flops"]
    assert counts["sliced"]["params"] < counts["dense"]["params"]
    for variant in VARIANTS:
        quality = m["quality"][variant]
        assert quality["metric"]
        assert -1 <= quality["value"] <= 1
        assert quality["n"] == 24
    fidelity = m["fidelity"]
    if m["task"]["head"] in ("regression", "embedding"):
        assert fidelity["kl"] is None
    else:
        assert fidelity["kl"] >= 0
        assert 0 <= fidelity["agreement"] <= 1
    assert fidelity["sliced_to_virtual"]["max_abs"] <= 1e-4
    assert {a["variant"] for a in m["artifacts"]} == set(VARIANTS)
    for a in m["artifacts"]:
        assert (a["format"], a["dialect"], a["precision"], a["scheme"]) == ("onnx", "opset23", "fp32", None)
        assert a["parity"]["status"] == "passed"
        assert a["parity"]["max_abs"] <= 1e-4
    assert (bundle.root / "report.html").is_file()
    results = [json.loads(p.read_text()) for p in (bundle.root / "bench").glob("*.json")]
    measured = [row for r in results for row in r["measurements"]]
    assert {row["variant"] for row in measured} == set(VARIANTS)
    for row in measured:
        assert row["latency_ms"]["median"] > 0
        assert row["ratio"]["low"] <= row["ratio"]["value"] <= row["ratio"]["high"]
        assert row["peak_rss_bytes"] > 1e6


def test_reload_is_bit_equal_and_matches_golden(bundle: Bundle) -> None:
    head = head_of(bundle)
    for variant in VARIANTS:
        model = load_variant(bundle, variant)
        for case in bundle.golden():
            with torch.inference_mode():
                found = head.outputs(model, {k: torch.from_numpy(v) for k, v in case.inputs.items()})
            for name, expected in case.outputs[variant].items():
                assert np.abs(found[name].numpy() - expected).max() <= (0 if variant == "sliced" else 1e-6)


def test_flops_of_the_graph_are_the_manifests(bundle: Bundle) -> None:
    seq_len = bundle.manifest.budget["seq_len"]
    for artifact in bundle.manifest.artifacts:
        path = bundle.path(artifact.path)
        shapes = {i.name: (1, seq_len) for i in onnx.load(path, load_external_data=False).graph.input}
        assert count_onnx(path, shapes) == bundle.manifest.counts[artifact.variant]["flops"]


@pytest.mark.parametrize("family", ["distilbert", "mpnet"])
def test_token_types_that_a_model_does_not_take_are_none_of_its_inputs(family: str, tmp_path: Path) -> None:
    """A tokenizer of BERT's kind makes them; a file once had an input for them, and its check ended in KeyError."""
    settings = prepare(tmp_path, "text-classification", bench_seconds=0.2, runtimes=("ort-cpu",))
    settings["model"] = str(checkpoint(tmp_path / family, family=family))
    bundle = run(load_recipe(**settings))
    assert bundle.manifest.model["inputs"] == ["input_ids", "attention_mask"]
    with open_runner(bundle, "ort-cpu", "sliced") as runner:
        assert runner.input_names == ("input_ids", "attention_mask")


def test_runs_in_onnx_runtime_at_other_shapes(bundle: Bundle) -> None:
    inputs = bundle.manifest.model["inputs"]
    head = head_of(bundle)
    for batch, length in ((1, 3), (5, 17)):
        feeds = {n: np.ones((batch, length), dtype=np.int64) for n in inputs}
        feeds["input_ids"] = np.random.default_rng(0).integers(4, 20, (batch, length))
        feeds["attention_mask"][-1, 2:] = 0
        if "token_type_ids" in feeds:
            feeds["token_type_ids"] *= 0
        with open_runner(bundle, "ort-cpu", "sliced") as runner, torch.inference_mode():
            found = runner.infer(feeds)
            expected = head.outputs(load_variant(bundle), {k: torch.from_numpy(v) for k, v in feeds.items()})
        for name in head.output_names:
            valid = feeds["attention_mask"].astype(bool) if expected[name].shape[:2] == (batch, length) else ...
            assert np.abs(found[name][valid] - expected[name].numpy()[valid]).max() <= 1e-4


def test_same_seed_same_plan_other_seed_other_sample(tmp_path: Path) -> None:
    settings = prepare(tmp_path, "text-classification", samples=64)
    first, second, third = (
        run(load_recipe(**{**settings, "out": str(tmp_path / name), "seed": seed}), export=False, bench=False)
        for name, seed in (("b1", 5), ("b2", 5), ("b3", 6))
    )
    assert first.manifest.plan["hash"] == second.manifest.plan["hash"]
    hashes = [b.manifest.stages[0].model_dump()["sample_hash"] for b in (first, second, third)]
    assert hashes[0] == hashes[1] != hashes[2]


def test_unlabelled_data_run_label_free_and_report_fidelity(tmp_path: Path) -> None:
    settings = prepare(tmp_path, "text-classification")
    data(tmp_path / "bare", label=False)
    made = run(load_recipe(**{**settings, "data": str(tmp_path / "bare")}), export=False, bench=False)
    assert made.manifest.quality["sliced"]["value"] is None
    assert made.manifest.fidelity["kl"] >= 0
    assert made.manifest.stages[0].model_dump()["label_free"] is True


def test_stages_can_be_swapped(tmp_path: Path) -> None:
    settings = prepare(tmp_path, "text-classification", rearrange="none", compensate="mask-tuning")
    made = run(load_recipe(**settings), export=False, bench=False)
    skipped = {s.name for s in made.manifest.stages if s.model_dump().get("skipped")}
    assert skipped == {"rearrange"}
    record = next(s for s in made.manifest.stages if s.name == "compensate").model_dump()
    assert record["method"] == "mask-tuning"
    assert record["residual_after"] <= record["residual_before"]
    assert any(s != 1.0 for g in made.plan().groups for s in g.scales)


def test_quality_guards_fail_and_leave_the_old_bundle(tmp_path: Path) -> None:
    settings = prepare(tmp_path, "text-classification")
    old = run(load_recipe(**settings), export=False, bench=False)
    before = (old.root / "manifest.json").read_bytes()
    with pytest.raises(VerdictError, match="agrees"):
        run(load_recipe(**{**settings, "keep_flops": 0.25, "min_agreement": 1.0, "compensate": "none"}))
    assert (old.root / "manifest.json").read_bytes() == before
    Bundle.open(old.root)
    assert sorted(p.name for p in tmp_path.iterdir() if "staging" in p.name) == []


def test_slice_by_given_masks_folds_tuned_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ALLOW_PICKLE, "1")
    model = checkpoint(tmp_path / "model")
    generator = torch.Generator().manual_seed(0)
    head_mask = (torch.rand(3, 4, generator=generator) < 0.5) * torch.rand(3, 4, generator=generator)
    neuron_mask = (torch.rand(3, 24, generator=generator) < 0.5) * (0.5 + torch.rand(3, 24, generator=generator))
    folder = tmp_path / "masks"
    folder.mkdir()
    torch.save(head_mask, folder / "head_mask.pt")
    torch.save(neuron_mask, folder / "neuron_mask.pt")
    save_file({"head_mask": head_mask, "neuron_mask": neuron_mask}, tmp_path / "masks.safetensors")
    np.savez(tmp_path / "masks.npz", head_mask=head_mask.numpy(), neuron_mask=neuron_mask.numpy())
    hashes = set()
    for number, masks in enumerate((folder, tmp_path / "masks.safetensors", tmp_path / "masks.npz")):
        made = slice_given(str(model), [masks], tmp_path / f"b{number}")
        hashes.add(made.manifest.plan["hash"])
        plan = made.plan()
        assert [g.count for g in plan.groups if g.kind == "head"] == (head_mask != 0).sum(1).tolist()
        assert plan["L01.neurons"].scales == pytest.approx(neuron_mask[1][neuron_mask[1] != 0].tolist())
        for case in made.golden():
            difference = np.abs(case.outputs["virtual"]["logits"] - case.outputs["sliced"]["logits"]).max()
            assert difference <= 1e-5
    assert len(hashes) == 1
    np.savez(tmp_path / "short.npz", head_mask=head_mask[:2].numpy())
    with pytest.raises(InputError, match="has 2 layers"):
        slice_given(str(model), [tmp_path / "short.npz"], tmp_path / "b9")
    assert not (tmp_path / "b9").exists()


def test_a_bundle_of_given_masks_remembers_its_data(tmp_path: Path) -> None:
    """Static int8 was once refused for such a bundle: it did not say what it was evaluated on."""
    model, rows = checkpoint(tmp_path / "model"), data(tmp_path / "data")
    np.savez(tmp_path / "masks.npz", neuron_mask=np.eye(3, 24))
    made = slice_given(str(model), [tmp_path / "masks.npz"], tmp_path / "b", task="text-classification", data=str(rows))
    found = evaluation_of(Bundle.open(made.root))
    assert found is not None
    assert len(found.data.evaluation) == 24


def test_python_api_on_a_loaded_module(tmp_path: Path) -> None:
    settings = prepare(tmp_path, "text-classification")
    from deploy_prune.checkpoint import load_dense

    dense = load_dense(settings["model"], "classification")
    task = deploy_prune.load_task(
        "text-classification", tokenizer=dense.processor, config=dense.model.config, data=settings["data"]
    )
    plan = deploy_prune.prune(dense.model, task, 0.5)
    small = deploy_prune.slice_model(dense.model, plan)
    path = deploy_prune.export_onnx(small, tmp_path / "small.onnx")
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in dense.model.parameters())
    onnx.checker.check_model(str(path))
    with pytest.raises(InputError, match=r"\(0, 1\]"):
        deploy_prune.prune(dense.model, task, 1.5)


def test_offload_needs_a_gpu(tmp_path: Path) -> None:
    checkpoint(tmp_path / "model", num_hidden_layers=1)
    where = {"data": str(data(tmp_path / "data")), "out": str(tmp_path / "b")}
    recipe = load_recipe(None, model=str(tmp_path / "model"), task="text-classification", offload=True, **where)
    with pytest.raises(InputError, match="--offload is for GPUs"):
        run(recipe.model_copy(update={"device": "cpu"}))
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("asked", [{"recover_epochs": 1.0}, {"drop_layers": 1}])
def test_offload_refuses_what_runs_whole_models(asked: dict[str, Any], tmp_path: Path) -> None:
    dense = load_dense(str(checkpoint(tmp_path / "model", num_hidden_layers=1)), "classification")
    with pytest.raises(InputError, match="Recovery and depth run whole models"):
        check_offload(load_recipe(None, offload=True, **asked), dense, torch.device("cuda"))
