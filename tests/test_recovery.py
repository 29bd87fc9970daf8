"""Recovery inside a whole run: its record, the three variants after it, a killed run, and its flags."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from runs_tiny import checkpoint, data, image_checkpoint, image_data

from deploy_prune import recover as recovery
from deploy_prune.bundle import VARIANTS, Bundle
from deploy_prune.checkpoint import head_of, load_variant
from deploy_prune.cli import invoke
from deploy_prune.config import load_recipe
from deploy_prune.errors import InputError
from deploy_prune.pipeline import run


def prepare(folder: Path, head: str = "classification", task: str = "text-classification", **changes: Any) -> Any:
    model, rows = checkpoint(folder / "model", head), data(folder / "data", head, train=480)
    settings = {"model": str(model), "task": task, "data": str(rows), "out": str(folder / "b")}
    return {**settings, "keep_flops": 0.4, "samples": 64, "recover_epochs": 3, "recover_lr": 2e-3, **changes}


def pruned(settings: dict[str, Any], **changes: Any) -> Bundle:
    return run(load_recipe(**{**settings, **changes}), export=False, bench=False)


def record_of(bundle: Bundle) -> dict[str, Any]:
    return next(s for s in bundle.manifest.stages if s.name == "recover").model_dump()


@pytest.mark.parametrize("compensate", ["refit", "mask-tuning", "none"])
@pytest.mark.parametrize(
    ("head", "task"), [("classification", "text-classification"), ("token", "token-classification")]
)
def test_a_recovered_bundle(head: str, task: str, compensate: str, tmp_path: Path) -> None:
    settings = prepare(tmp_path, head, task, compensate=compensate)
    before = pruned({k: v for k, v in settings.items() if not k.startswith("recover")})
    made = pruned(settings)
    record = record_of(made)
    assert [s.name for s in made.manifest.stages][4:] == ["compensate", "recover", "slice", "evaluate"]
    assert record["kept"]
    assert record["loss_after"] < record["loss_before"]
    assert (record["rows"], record["held_out"]) == (432, 48)
    assert record["seconds"] > 0
    assert made.manifest.plan["recovered"] is True
    assert before.manifest.plan["recovered"] is False
    assert made.manifest.plan["hash"] == before.manifest.plan["hash"] == made.plan().hash
    assert made.manifest.counts == before.manifest.counts
    assert made.manifest.fidelity["kl"] < before.manifest.fidelity["kl"]
    assert made.manifest.fidelity["sliced_to_virtual"]["max_abs"] <= 1e-5
    assert all(s == 1.0 for g in made.plan().groups for s in g.scales)
    for variant in VARIANTS:
        model = load_variant(made, variant)
        for case in made.golden():
            with torch.inference_mode():
                found = head_of(made).outputs(model, {k: torch.from_numpy(v) for k, v in case.inputs.items()})
            for name, expected in case.outputs[variant].items():
                assert np.abs(found[name].numpy() - expected).max() <= (0 if variant == "sliced" else 1e-6)
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith(".")) == [".b.lock"]


def test_the_same_seed_gives_the_same_weights(tmp_path: Path) -> None:
    settings = prepare(tmp_path)
    hashes = [
        pruned(settings, out=str(tmp_path / name), seed=seed).manifest.files["sliced/model.safetensors"]
        for name, seed in (("b1", 3), ("b2", 3), ("b3", 4))
    ]
    assert hashes[0] == hashes[1] != hashes[2]


def test_a_killed_run_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = prepare(tmp_path)
    whole = pruned(settings, out=str(tmp_path / "whole"))
    report = recovery.DistilTrainer.evaluate
    seen = []

    def evaluate(self: Any, *args: Any, **kwargs: Any) -> dict[str, float]:
        seen.append(self.state.global_step)
        if len(seen) == 5:
            raise KeyboardInterrupt
        return report(self, *args, **kwargs)

    monkeypatch.setattr(recovery.DistilTrainer, "evaluate", evaluate)
    with pytest.raises(KeyboardInterrupt):
        pruned(settings)
    assert not (tmp_path / "b").exists()
    made = pruned(settings)
    assert seen[5] == seen[4]  # what was lost is the evaluation that was interrupted
    assert record_of(made)["resumed"] is True
    sliced = "sliced/model.safetensors"
    assert made.manifest.files[sliced] == whole.manifest.files[sliced]
    assert not (tmp_path / ".b.recovery").exists()


def test_what_does_not_help_leaves_the_pruned_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = prepare(tmp_path)
    plain = pruned({k: v for k, v in settings.items() if not k.startswith("recover")})
    sliced = plain.manifest.files["sliced/model.safetensors"]
    monkeypatch.setattr("deploy_prune.distil.Distillation.judge", lambda self, batches, targets: 1.0)
    made = pruned(settings)
    assert record_of(made)["kept"] is False
    assert made.manifest.plan["recovered"] is False
    assert made.manifest.files["sliced/model.safetensors"] == sliced


def test_evaluation_rows_are_never_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = prepare(tmp_path)
    used: list[Any] = []
    original = recovery.recover

    def spy(student: Any, teacher: Any, head: Any, rows: Any, *args: Any, **kwargs: Any) -> Any:
        used.extend(rows)
        return original(student, teacher, head, rows, *args, **kwargs)

    monkeypatch.setattr("deploy_prune.late.recover", spy)
    pruned(settings, recover_samples=100)
    assert len(used) == 100
    lines = (tmp_path / "data" / "train.jsonl").read_text().splitlines()
    tokenizer = transformers.AutoTokenizer.from_pretrained(settings["model"])
    texts = {tuple(tokenizer(json.loads(line)["text"])["input_ids"]) for line in lines}
    assert {tuple(row.features["input_ids"].tolist()) for row in used} <= texts


def test_unlabelled_rows_and_the_share_of_labels(tmp_path: Path) -> None:
    settings = prepare(tmp_path)
    data(tmp_path / "bare", train=480, label=False)
    made = pruned(settings, data=str(tmp_path / "bare"))
    assert record_of(made)["kept"]
    with pytest.raises(InputError, match="Recovery was to use labels"):
        pruned(settings, data=str(tmp_path / "bare"), recover_label_share=0.5)
    assert record_of(pruned(settings, recover_label_share=0.5))["weights"]["labels"] == 0.5


def test_flags(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = prepare(tmp_path)
    words = ["prune", settings["model"], "--task", settings["task"], "--data", settings["data"]]
    words += ["--samples", "64", "--out", settings["out"]]
    assert invoke([*words, "--recover-minutes", "0.02", "--recover-lr", "1e-3", "--recover-samples", "120"]) == 0
    assert invoke(["inspect", settings["out"]]) == 0
    assert "loss_before" in capsys.readouterr().out
    assert record_of(Bundle.open(settings["out"]))["lr"] == 1e-3
    assert invoke([*words, "--recover-lr", "1e-3"]) == 2
    assert "neither recover_epochs nor recover_minutes" in " ".join(capsys.readouterr().err.split())
    assert invoke([*words, "--recover-epochs", "0"]) == 2


@pytest.mark.parametrize(("family", "order"), [("bert", "before"), ("bert", "after"), ("vit", "after")])
def test_depth_in_a_whole_run(family: str, order: str, tmp_path: Path) -> None:
    settings = prepare(tmp_path, keep_flops=0.5, drop_layers=1, drop_sublayers=1, depth_order=order, depth_rows=40)
    if family == "vit":
        images = image_data(tmp_path / "data.npz", train=480)
        settings |= {"model": str(image_checkpoint(tmp_path / "vit")), "data": str(images)}
        settings |= {"task": "image-classification"}
    made = pruned(settings)
    depth = next(s for s in made.manifest.stages if s.name == "depth").model_dump()
    gone = {name for removal in depth["removals"] for name in removal["groups"]}
    assert len(gone) == 3
    assert depth["rows"] == 40
    assert {g.name for g in made.plan().groups if not g.count} == gone
    names = [s.name for s in made.manifest.stages]
    widths = ["search", "rearrange", "compensate", "recover"]
    expected = ["depth", *widths] if order == "before" else [*widths, "depth", "recover again"]
    assert names == ["calibrate", "score", *expected, "slice", "evaluate"]
    counts = made.manifest.counts
    assert counts["sliced"]["encoder_flops"] == made.manifest.budget["limits"][0]["reached"]
    assert counts["sliced"]["encoder_flops"] <= 0.5 * counts["dense"]["encoder_flops"]
    assert made.manifest.plan["recovered"] is (order == "after" or record_of(made)["kept"])
    assert made.manifest.fidelity["sliced_to_virtual"]["max_abs"] <= 1e-5
    for variant in VARIANTS:
        model = load_variant(made, variant)
        for case in made.golden():
            with torch.inference_mode():
                found = model(**{k: torch.from_numpy(v) for k, v in case.inputs.items()}).logits.numpy()
            expected_logits = case.outputs[variant]["logits"]
            assert np.abs(found - expected_logits).max() <= (0 if variant == "sliced" else 1e-6)


def test_depth_last_without_recovery(tmp_path: Path) -> None:
    settings = {k: v for k, v in prepare(tmp_path).items() if not k.startswith("recover")}
    made = pruned(settings, drop_sublayers=2, depth_order="after")
    assert [s.name for s in made.manifest.stages][-3:] == ["depth", "slice", "evaluate"]
    assert sum(g.count == 0 for g in made.plan().groups) == 2
    assert made.manifest.fidelity["sliced_to_virtual"]["max_abs"] <= 1e-5


def test_a_run_killed_after_its_depth_keeps_the_first_recovery(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = prepare(tmp_path, drop_layers=1, depth_order="after")
    whole = pruned(settings, out=str(tmp_path / "whole"))
    train = recovery.DistilTrainer.train
    runs = []

    def killed(self: Any, *args: Any, **kwargs: Any) -> Any:
        runs.append(self.args.output_dir)
        if len(runs) == 2:
            raise KeyboardInterrupt
        return train(self, *args, **kwargs)

    monkeypatch.setattr(recovery.DistilTrainer, "train", killed)
    with pytest.raises(KeyboardInterrupt):
        pruned(settings)
    made = pruned(settings)
    assert [Path(r).name for r in runs] == ["recover", "recover-again", "recover-again"]
    assert record_of(made)["reused"] is True
    sliced = "sliced/model.safetensors"
    assert made.manifest.files[sliced] == whole.manifest.files[sliced]
