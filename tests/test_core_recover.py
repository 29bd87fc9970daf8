"""Recovery: what the loss is, that training follows it, and that a run can be stopped at any point."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models_tiny import FAMILIES, HEADS, heads_of, padded_inputs, random_masks, tiny_inputs, tiny_model, tiny_rows
from torch import Tensor, nn

from deploy_prune import recover as recovery
from deploy_prune.archs import arch_of
from deploy_prune.checkpoint import load_sliced, save_sliced
from deploy_prune.distil import Distillation, Feed, Weights, moved, unexplained
from deploy_prune.errors import InputError
from deploy_prune.fidelity import fidelity
from deploy_prune.heads import Head
from deploy_prune.masking import mask_model, scatter
from deploy_prune.predict import predict
from deploy_prune.recover import Recovery, hold_out, recover
from deploy_prune.slicing import slice_model
from deploy_prune.surgery import surgery_of
from deploy_prune.units import SlicePlan
from deploy_prune.variants import make_variants

BRIEF = Recovery(epochs=5, lr=3e-3)


def pair(head: str = "classification", family: str = "bert", seed: int = 1) -> tuple[Any, Any, SlicePlan]:
    """Return a dense model, a sliced one (some sub-layers empty, some whole), and the plan."""
    teacher = tiny_model(family, head)
    groups = arch_of(teacher).groups(teacher)
    plan = SlicePlan.from_masks(groups, random_masks(groups, seed))
    return teacher, slice_model(teacher, groups, plan), plan


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("head", HEADS)
def test_the_student_comes_closer_and_the_teacher_stays(head: Any) -> None:
    teacher, student, _ = pair(head)
    before, started = weights_of(teacher), weights_of(student)
    fresh = tiny_rows(60, head, seed=9)
    wanted = predict(teacher, Head(head), fresh)
    distance = [fidelity(head, wanted, predict(student, Head(head), fresh))]
    record = recover(student, teacher, Head(head), tiny_rows(320, head), BRIEF)
    distance.append(fidelity(head, wanted, predict(student, Head(head), fresh)))
    assert record["kept"]
    assert record["loss_after"] < 0.6 * record["loss_before"]
    name = {"regression": "rmse", "embedding": "cosine"}.get(head, "kl")
    better = distance[1][name] > distance[0][name] if name == "cosine" else distance[1][name] < 0.7 * distance[0][name]  # type: ignore[operator]
    assert better, distance
    assert same(weights_of(teacher), before)
    assert all(p.requires_grad and p.grad is None for p in teacher.parameters())
    assert not student.training
    changed = {name for name, tensor in student.state_dict().items() if not torch.equal(tensor, started[name])}
    assert {n for n, _ in student.named_parameters()} - changed <= {n for n in started if "position" in n}
    assert (record["rows"], record["held_out"], record["planned_steps"]) == (288, 32, 45)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("seed", range(3))
def test_virtual_equals_sliced_whatever_was_trained(family: str, head: Any, seed: int) -> None:
    if head not in heads_of(family):
        pytest.skip(f"{family} models have no such head here")
    teacher, student, plan = pair(head, family, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in student.parameters():
            p += 0.1 * torch.randn(p.shape, generator=generator)
    untouched = weights_of(teacher)
    made = make_variants(surgery_of(teacher), plan, recovered=student)
    with torch.inference_mode():
        outputs = {name: Head(head).outputs(m, tiny_inputs(family, seed)) for name, m in made.items().items()}
    for name, expected in outputs["sliced"].items():
        assert (outputs["virtual"][name] - expected).abs().max() <= 1e-5 * max(1.0, float(expected.abs().max()))
        assert (outputs["dense"][name] - expected).abs().max() > 1e-3
    assert same(weights_of(teacher), untouched)
    assert made.recovered
    assert made.plan.hash == plan.hash
    assert {s for g in made.plan.groups for s in g.scales} <= {1.0}
    assert sum(p.numel() for p in made.virtual.parameters()) == sum(p.numel() for p in teacher.parameters())


def test_a_recovered_model_is_reloaded_bit_for_bit(tmp_path: Path) -> None:
    class NoTokenizer:
        def save_pretrained(self, folder: Path) -> None:
            pass

    teacher, student, plan = pair()
    recover(student, teacher, Head("classification"), tiny_rows(96), BRIEF)
    save_sliced(copy.copy(student), NoTokenizer(), tmp_path)
    again = load_sliced(tmp_path)
    assert same(weights_of(again), weights_of(student))
    groups = arch_of(teacher).groups(teacher)
    virtual = mask_model(scatter(teacher, groups, plan, again.state_dict()), groups, plan.folded())
    with torch.inference_mode():
        found, expected = (m(**padded_inputs()).logits for m in (virtual, student))
    assert (found - expected).abs().max() <= 1e-5


class Killed(Exception):
    pass


def killer(share: float) -> Any:
    def progress(done: float) -> None:
        if done >= share:
            raise Killed

    return progress


@pytest.mark.parametrize("share", [0.05, 0.5, 0.8])
def test_a_killed_recovery_ends_as_an_uninterrupted_one(share: float, tmp_path: Path) -> None:
    teacher, whole, _ = pair()
    cut = copy.deepcopy(whole)
    start = weights_of(cut)
    head, rows = Head("classification"), tiny_rows(320, seed=1)  # on which it runs to the end
    expected = recover(whole, teacher, head, rows, BRIEF)
    assert expected["steps"] == expected["planned_steps"]
    with pytest.raises(Killed):
        recover(cut, teacher, head, rows, BRIEF, folder=tmp_path, progress=killer(share))
    half_written = tmp_path / "checkpoint-44"
    half_written.mkdir()
    (half_written / "model.safetensors").write_bytes(b"half")
    cut.load_state_dict(start)  # as the next process has it
    seen: list[float] = []
    found = recover(cut, teacher, head, rows, BRIEF, folder=tmp_path, progress=seen.append)
    assert found["resumed"] is (share >= 0.2)
    assert seen[0] > share - 0.1 if found["resumed"] else seen[0] < 0.03
    assert same(weights_of(cut), weights_of(whole))
    assert {**found, "resumed": False} == expected
    assert sorted(p.name for p in tmp_path.iterdir()) == [recovery.RESULT, recovery.STATE]


def test_what_is_finished_is_not_done_again_and_another_run_starts_anew(tmp_path: Path) -> None:
    teacher, student, _ = pair()
    first, second, third = (copy.deepcopy(student) for _ in range(3))
    head, rows = Head("classification"), tiny_rows(96)
    done = recover(first, teacher, head, rows, BRIEF, folder=tmp_path)
    again = recover(second, teacher, head, rows, BRIEF, folder=tmp_path, progress=killer(0))
    assert again == {**done, "reused": True}
    assert same(weights_of(first), weights_of(second))
    other = recover(third, teacher, head, rows, replace(BRIEF, seed=1), folder=tmp_path)
    assert "reused" not in other
    assert not same(weights_of(first), weights_of(third))
    fourth = copy.deepcopy(student)
    recover(fourth, teacher, head, rows, BRIEF)
    assert same(weights_of(first), weights_of(fourth))


@pytest.fixture
def judged(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Let the held-out losses be those of a script; keep the weights at each judgement."""

    def script(*losses: float) -> list[dict[str, Tensor]]:
        kept: list[dict[str, Tensor]] = []

        def judge(self: Distillation, batches: Any, targets: Any) -> float:
            kept.append(weights_of(self.student))
            return losses[min(len(kept), len(losses)) - 1]

        monkeypatch.setattr(Distillation, "judge", judge)
        return kept

    return script


def test_early_stop_brings_the_best_weights_back(judged: Any) -> None:
    """A loss that rises in the schedule's first half ends nothing; two rises in a row in the second do."""
    teacher, student, _ = pair()
    kept = judged(1.0, 1.1, 1.2, 1.3, 0.9, 0.8, 0.5, 0.6, 0.55, 0.6, 0.7, 0.1)
    record = recover(student, teacher, Head("classification"), tiny_rows(320), BRIEF)
    every = record["planned_steps"] // 10
    assert len(kept) == 1 + 10 + 1  # before, at the tenth the second rise in a row, after
    assert (record["best_step"], record["steps"]) == (6 * every, 10 * every)
    assert record["steps"] < record["planned_steps"]
    assert same(weights_of(student), kept[6])
    assert not same(kept[6], kept[-2])


@pytest.mark.parametrize("loss", [1.0, 1.5, float("nan")])
def test_what_does_not_help_is_not_kept(judged: Any, loss: float) -> None:
    teacher, student, _ = pair()
    kept = judged(1.0, loss)
    record = recover(student, teacher, Head("classification"), tiny_rows(96), BRIEF)
    assert record["kept"] is False
    assert record["loss_after"] == (None if loss != loss else loss)
    assert same(weights_of(student), kept[0])
    if loss == loss:
        assert not same(weights_of(student), kept[-2])
    else:
        assert record["steps"] == 1  # no number: it ends at once


def test_rows_without_labels_are_enough_and_labels_count_when_asked() -> None:
    teacher, student, _ = pair()
    labelled = tiny_rows(96)
    bare = [replace(row, label=None) for row in labelled]
    head = Head("classification")
    found = []
    for rows, share in ((labelled, 0.0), (bare, 0.0), (labelled, 0.5)):
        copied = copy.deepcopy(student)
        recover(copied, teacher, head, rows, replace(BRIEF, weights=Weights(labels=share)))
        found.append(weights_of(copied))
    assert same(found[0], found[1])
    assert not same(found[0], found[2])
    with pytest.raises(InputError, match="have none"):
        recover(student, teacher, head, bare, replace(BRIEF, weights=Weights(labels=0.5)))


def test_minutes_are_turned_into_steps_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    teacher, student, _ = pair()
    head, rows = Head("classification"), tiny_rows(96)
    monkeypatch.setattr(recovery, "_seconds_per_step", lambda model, feed: 0.1)
    timed, ended = Recovery(minutes=0.1, lr=1e-3), Recovery(minutes=0.1, epochs=1, lr=1e-3)
    cut = copy.deepcopy(student)
    with pytest.raises(Killed):
        recover(cut, teacher, head, rows, timed, folder=tmp_path, progress=killer(0.5))
    monkeypatch.setattr(recovery, "_seconds_per_step", lambda model, feed: 0.01)  # a faster hour of the day
    record = recover(copy.deepcopy(student), teacher, head, rows, timed, folder=tmp_path)
    assert record["planned_steps"] == int(60 * 0.1 * recovery.BUSY / 0.1 - 13 / 3) == 52
    assert recover(copy.deepcopy(student), teacher, head, rows, ended)["planned_steps"] == 3
    by_epochs = copy.deepcopy(student)
    recover(by_epochs, teacher, head, rows, Recovery(epochs=52 / 3, lr=1e-3))
    by_minutes = copy.deepcopy(student)
    monkeypatch.setattr(recovery, "_seconds_per_step", lambda model, feed: 0.1)
    recover(by_minutes, teacher, head, rows, timed)
    assert same(weights_of(by_epochs), weights_of(by_minutes))


def test_a_step_is_timed_without_changing_the_student() -> None:
    teacher, student, _ = pair()
    before = weights_of(student)
    model = Distillation(student, teacher, Head("classification"), Weights())
    seconds = recovery._seconds_per_step(model, Feed(tiny_rows(96), Head("classification"), 1, 32, 0))
    assert 1e-4 < seconds < 60
    assert same(weights_of(student), before)
    assert all(p.grad is None for p in student.parameters())


def test_every_epoch_takes_every_row_once_with_like_lengths_together() -> None:
    rows = tiny_rows(330, longest=40)
    feed = Feed(rows, Head("classification"), 1, 32, seed=3)
    steps = feed.steps(2 * feed.per_epoch + 5)
    assert feed.per_epoch == 11
    for epoch in range(2):
        part = steps[epoch * 11 : (epoch + 1) * 11]
        assert sorted(i for step in part for i in step) == list(range(330))
        padded = sum(len(step) * max(rows[i].length for i in step) for step in part)
        assert padded <= 1.1 * sum(row.length for row in rows)
    assert steps[:11] != steps[11:22]
    assert steps == Feed(rows, Head("classification"), 1, 32, seed=3).steps(27)
    assert steps != Feed(rows, Head("classification"), 1, 32, seed=4).steps(27)


def test_images_are_moved_the_same_way_whatever_the_team(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, head = tiny_rows(12, family="vit"), Head("classification")
    step = [[3, 1, 4, 11, 5]]
    plain, shifted, mirrored = (
        Feed(rows, head, 1, 5, 0, augment).collate(step)["inputs"]["pixel_values"]
        for augment in ("none", "shift", "flip")
    )
    again = Feed(rows, head, 1, 5, 0, "flip")
    assert torch.equal(again.collate(step)["inputs"]["pixel_values"], mirrored)
    assert not torch.equal(again.collate([[3, 1, 4, 5, 11]])["inputs"]["pixel_values"][:3], mirrored[:3])
    sides = [torch.equal(m, s.flip(-1)) for m, s in zip(mirrored, shifted, strict=True)]
    assert {*sides} == {True, False}
    assert all(side or torch.equal(m, s) for side, m, s in zip(sides, mirrored, shifted, strict=True))
    assert not torch.equal(shifted, plain)
    parts = []
    for rank in range(2):
        monkeypatch.setattr("deploy_prune.parallel.rank", lambda rank=rank: rank)
        monkeypatch.setattr("deploy_prune.parallel.size", lambda: 2)
        parts.append(again.collate(step)["inputs"]["pixel_values"])
    assert torch.equal(parts[0], mirrored[0::2])
    assert torch.equal(parts[1], mirrored[1::2])


def test_an_image_is_moved_by_up_to_an_eighth() -> None:
    image = torch.arange(16.0 * 24).reshape(1, 1, 16, 24)
    still, far = np.array([[0.5, 0.5, 0.9]]), np.array([[0.0, 0.999, 0.0]])
    assert torch.equal(moved(image, still, flip=True), image)
    cut = moved(image, far, flip=False)
    assert torch.equal(cut[0, 0, 2:, :-3], image[0, 0, :-2, 3:])  # two down, three to the left
    assert torch.equal(cut[0, 0, :, -1], cut[0, 0, :, -4])  # the edge is repeated
    assert torch.equal(moved(image, far, flip=True), cut.flip(-1))


def test_held_out_rows_are_never_trained_on() -> None:
    rows = tiny_rows(200)
    train, held = hold_out(rows, 0)
    assert len(held) == 20
    assert sorted(map(id, train + held)) == sorted(map(id, rows))
    assert [id(r) for r in hold_out(rows, 1)[1]] != [id(r) for r in held]


@pytest.mark.parametrize("head", ["classification", "token", "qa"])
def test_distance_is_the_kl_that_fidelity_reports(head: Any) -> None:
    teacher, student, _ = pair(head)
    rows = tiny_rows(8, head)
    batch = Feed(rows, Head(head), 1, 8, 0).collate([list(range(8))])
    with torch.inference_mode():
        outputs, targets = (Head(head).outputs(m, batch["inputs"]) for m in (student, teacher))
    found = Head(head).distance(outputs, targets, batch["mask"])
    expected = fidelity(head, *(predict(m, Head(head), rows) for m in (teacher, student)))["kl"]
    assert float(found.mean()) == pytest.approx(expected, rel=1e-4)
    assert Head(head).distance(targets, targets, batch["mask"]).abs().max() <= 1e-6
    soft = Head(head).distance(outputs, targets, batch["mask"], temperature=50.0)
    assert torch.isfinite(soft).all()
    if head == "classification":  # high temperatures: half the variance of the logits' difference
        gap = outputs["logits"] - targets["logits"]
        assert torch.allclose(soft, 0.5 * gap.var(-1, unbiased=False), rtol=0.1)


def test_squared_errors_are_halved() -> None:
    a, b = {"logits": torch.tensor([[1.0], [3.0]])}, {"logits": torch.tensor([[2.0], [1.0]])}
    assert Head("regression").distance(a, b, torch.ones(2, 1)).tolist() == [0.5, 2.0]
    a, b = {"embedding": torch.ones(2, 4)}, {"embedding": torch.zeros(2, 4)}
    assert Head("embedding").distance(a, b, torch.ones(2, 1)).tolist() == [2.0, 2.0]


def test_the_unexplained_share_of_hidden_states() -> None:
    generator = torch.Generator().manual_seed(0)
    wanted, noise = torch.randn(2, 3, 6, 5, generator=generator)
    mask = torch.ones(3, 6, dtype=torch.int64)
    mask[1, 4:] = 0
    valid = mask.bool()
    share = (noise[valid] ** 2).sum() / ((wanted[valid] - wanted[valid].mean(0)) ** 2).sum()
    found = wanted + noise
    assert float(unexplained(found, wanted, mask)) == pytest.approx(float(share), rel=1e-5)
    found[~valid] = 1e6
    assert float(unexplained(found, wanted, mask)) == pytest.approx(float(share), rel=1e-5)
    mean = wanted[valid].mean(0).expand_as(wanted)
    assert float(unexplained(mean, wanted, mask)) == pytest.approx(1.0, rel=1e-5)
    maps = torch.randn(2, 4, 3, 3, generator=generator)  # of an image: channels before places
    assert float(unexplained(maps.mean().expand_as(maps), maps, mask)) == pytest.approx(1.0, rel=1e-5)


def test_bad_settings_are_refused() -> None:
    for wrong in ({}, {"epochs": 0}, {"minutes": -1.0}, {"epochs": 1, "lr": 0.0}, {"epochs": 1, "batch_rows": 0}):
        with pytest.raises(InputError):
            Recovery(**wrong)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="share"):
        Recovery(epochs=1, weights=Weights(labels=1.5))
    teacher, student, _ = pair()
    with pytest.raises(InputError, match="too few"):
        recover(student, teacher, Head("classification"), tiny_rows(10), BRIEF)


def test_dropout_stays_off() -> None:
    """With it, the hidden states that are compared would be noise."""
    teacher, student, _ = pair()
    model = Distillation(student, teacher, Head("classification"), Weights()).train()
    assert not any(module.training for module in model.modules())
    inputs = padded_inputs()
    losses = [model(inputs, inputs["attention_mask"])["loss"].detach() for _ in range(2)]
    assert torch.equal(*losses)
    again = Distillation(teacher, teacher, Head("classification"), Weights())(inputs, inputs["attention_mask"])
    assert float(again["loss"].detach()) == pytest.approx(0.0, abs=1e-6)
    assert "_teacher" not in dict(model.named_children())


def test_a_scratch_folder_of_another_kind_is_left_alone(tmp_path: Path) -> None:
    """Only what recovery itself writes is ever removed."""
    (tmp_path / "mine.txt").write_text("mine")
    teacher, student, _ = pair()
    recover(student, teacher, Head("classification"), tiny_rows(96), BRIEF, folder=tmp_path)
    assert (tmp_path / "mine.txt").read_text() == "mine"
