"""The teacher and the hidden states: run once, kept where there is room, computed anew where there is none."""

from __future__ import annotations

import errno
from typing import Any

import pytest
import torch
from models_tiny import FAMILIES, tiny_model, tiny_rows
from sweeps_tiny import ragged_plan, teacher

from deploy_prune.archs import arch_of
from deploy_prune.batches import Batches
from deploy_prune.compensate import Refit, sweep
from deploy_prune.compensate.layers import Student
from deploy_prune.costs import Budget
from deploy_prune.errors import SystemStateError
from deploy_prune.heads import Head
from deploy_prune.layer_calibration import calibrate_by_layers
from deploy_prune.layerwise import LayerRunner, StateCache
from deploy_prune.pruner import Pruner, prune_rows
from deploy_prune.slicing import slice_model


@pytest.mark.parametrize(("share", "whole"), [(0.0, False), (0.4, False), (1.0, True)])
def test_states_that_are_not_kept_are_computed_anew(share: float, whole: bool) -> None:
    model, head, rows = tiny_model("bert"), Head("classification"), tiny_rows(96)
    groups, plan = ragged_plan(model)
    feeds = list(Batches(rows, head, 0).shared())
    needed = StateCache(feeds, 32, len(groups) + 3, torch.device("cpu")).needed_bytes
    found = []
    for settings in ({"used_again": False}, {"most_bytes": int(share * needed)}):
        student, dense = slice_model(model, groups, plan), teacher(model, groups, rows, **settings)
        swept = sweep(student, dense, groups, plan, head, Batches(rows, head, 0), Refit())
        found.append((swept, student.state_dict()))
    assert dense.whole == whole
    (swept, state), (other, other_state) = found
    assert other.state_bytes <= share * needed
    assert [e.residual_after for e in swept.log] == pytest.approx([e.residual_after for e in other.log], rel=1e-6)
    assert all(torch.allclose(state[k], other_state[k], atol=1e-5) for k in state)


def test_a_teacher_runs_once_for_all_budgets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores fill it, every later sweep reads it, and the outcome is that of a fresh one."""
    runs: list[int] = []
    run = LayerRunner.run

    def counted(self: LayerRunner, number: int) -> None:
        runs.append(self.depth) if self.model is model else None
        run(self, number)

    monkeypatch.setattr(LayerRunner, "run", counted)
    model, head, rows = tiny_model("bert"), Head("classification"), tiny_rows(96)
    pruner = Pruner(model, head, rows)
    found = [pruner.prune(Budget(keep)) for keep in (0.7, 0.5)]
    assert sorted(set(runs)) == [0, 1, 2]
    assert len(runs) == 3 * len(list(Batches(rows, head, 0)))
    fresh = prune_rows(model, head, rows, Budget(0.5))
    assert fresh.hash == found[1].hash
    for name, new in fresh.updates.items():
        assert torch.allclose(new.weight, found[1].updates[name].weight, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_replayed_attention_gives_the_same_layer(family: str) -> None:
    model, head, rows = tiny_model(family), Head("classification"), tiny_rows(24, family=family)
    groups, feeds = arch_of(model).groups(model), list(Batches(rows, head, 1))
    cache = StateCache(feeds, 32, 2, torch.device("cpu"))
    student = Student(model, head, feeds, cache)
    heads, neurons = groups[:2]
    core = model.get_submodule(heads.core)
    with torch.no_grad():
        student.watch(0, heads, heads.size * heads.width)
        first = student.watch(0, neurons, neurons.size)
        calls: list[int] = []
        consumer = model.get_submodule(heads.producers[0])
        handle = consumer.register_forward_hook(lambda *args: calls.append(1))
        replayed = student.watch(0, neurons, neurons.size)
        assert not calls, "the attention ran again"
        handle.remove()
        student.known = None
        plain = student.watch(0, neurons, neurons.size)
    for a, b, c in zip(first, replayed, plain, strict=True):
        assert torch.equal(a, b)
        assert torch.allclose(a, c, atol=1e-6)
    assert "forward" not in vars(core)


def test_targets_of_all_layers_need_twice_their_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small disk keeps those of one layer, as it always could."""
    model, rows = tiny_model("bert"), tiny_rows(24)
    groups = arch_of(model).groups(model)
    needed = teacher(model, groups, rows).cache.needed_bytes
    for free, whole in ((2 * needed, True), (2 * needed - 2, False)):
        monkeypatch.setattr("deploy_prune.teacher.room", lambda device, free=free: free)
        assert teacher(model, groups, rows).whole == whole


def test_an_interrupted_teacher_starts_anew() -> None:
    """What an interrupted pass left half-written is never read."""
    model, head, rows = tiny_model("bert"), Head("classification"), tiny_rows(96)
    groups, plan = ragged_plan(model)

    def stop(number: int, inputs: Any, outputs: Any) -> None:
        raise KeyboardInterrupt

    used, fresh = teacher(model, groups, rows), teacher(model, groups, rows)
    used.visit(0)
    with pytest.raises(KeyboardInterrupt):
        used.visit(1, stop)
    errors = []
    for dense in (used, fresh):
        student = slice_model(model, groups, plan)
        swept = sweep(student, dense, groups, plan, head, Batches(rows, head, 0), Refit())
        errors.append([e.residual_after for e in swept.log])
    assert errors[0] == pytest.approx(errors[1], rel=1e-6)
    with pytest.raises(RuntimeError, match="comes before"):
        fresh.visit(1, stop)


def test_no_room_for_the_states_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Any, size: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("deploy_prune.layerwise.reserve", full)
    model, head, rows = tiny_model("bert"), Head("classification"), tiny_rows(64)
    with pytest.raises(SystemStateError, match="GB of hidden states") as caught:
        prune_rows(model, head, rows, Budget(0.5))
    assert caught.value.hint == "Name another folder by TMPDIR, or keep fewer of them with --cache-gb."
    with pytest.raises(SystemStateError, match="GB of hidden states") as caught:
        calibrate_by_layers(model, arch_of(model).groups(model), head, rows)
    assert caught.value.hint == "Name another folder by TMPDIR, or use fewer --samples.", "it keeps all of them"
