"""Criteria: by hand where a formula is short, against explicit refits where it is not."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from models_tiny import FAMILIES, tiny_model, tiny_rows
from scipy.stats import spearmanr

from deploy_prune.archs import arch_of
from deploy_prune.batches import Batches
from deploy_prune.calibration import calibrate
from deploy_prune.costs import Budget
from deploy_prune.criteria import Criterion, Evidence, criteria, get_criterion
from deploy_prune.criteria.obs import eliminate
from deploy_prune.errors import InputError
from deploy_prune.heads import Head
from deploy_prune.layerwise import Taps
from deploy_prune.masking import mask_model
from deploy_prune.pruner import prune_rows
from deploy_prune.stages import Options
from deploy_prune.teacher import Teacher
from deploy_prune.units import MaskSet, SlicePlan


def evidence(family: str = "bert", rows: int = 48, **changes: Any) -> Evidence:
    model, head, data = tiny_model(family, **changes), Head("classification"), tiny_rows(rows, family=family)
    groups = arch_of(model).groups(model)
    stats = calibrate(model, groups, head, data, pad_id=1, gradient_moments=True)
    return Evidence(model, groups, 0, stats, lambda: Teacher(model, groups, head, list(Batches(data, head, 1))))


@pytest.mark.parametrize("name", sorted(criteria()))
@pytest.mark.parametrize("family", FAMILIES)
def test_every_criterion_scores_every_unit(name: str, family: str) -> None:
    given = evidence(family)
    scores = get_criterion(name)(given)
    assert {n: s.shape for n, s in scores.items()} == {g.name: (g.size,) for g in given.groups}
    assert all((s >= 0).all() and np.ptp(s) > 0 for s in scores.values())
    again = get_criterion(name)(given)
    assert all(np.array_equal(s, again[n]) for n, s in scores.items())


@pytest.mark.parametrize("name", [n for n, c in criteria().items() if c.data_free])
def test_data_free_criteria_look_at_no_data(name: str) -> None:
    given = evidence()
    bare = Evidence(given.model, given.groups, given.seed)
    for group, scores in get_criterion(name)(bare).items():
        assert np.array_equal(scores, get_criterion(name)(given)[group])


@pytest.mark.parametrize("name", [n for n, c in criteria().items() if not c.data_free])
def test_the_others_say_that_they_need_data(name: str) -> None:
    given = evidence()
    with pytest.raises(InputError, match="needs calibration data"):
        get_criterion(name)(Evidence(given.model, given.groups))


def test_first_order_criteria_by_hand() -> None:
    given = evidence()
    for g in given.groups:
        grads = given.calibrated.gradients[g.name].double().numpy()
        taylor = np.abs(grads).mean(0)
        assert get_criterion("taylor")(given)[g.name] == pytest.approx(taylor)
        assert get_criterion("head-sensitivity")(given)[g.name] == pytest.approx(taylor / np.sqrt((taylor**2).sum()))
    total = sum(np.abs(g.double().numpy().mean(0)).sum() for g in given.calibrated.gradients.values())
    snip = get_criterion("snip")(given)
    assert sum(s.sum() for s in snip.values()) == pytest.approx(1.0)
    name = given.groups[0].name
    assert snip[name] == pytest.approx(np.abs(given.calibrated.gradients[name].double().numpy().mean(0)) / total)


def test_magnitudes_by_hand() -> None:
    given = evidence()
    heads, neurons = given.groups[0], given.groups[1]
    out = given.model.get_submodule(heads.consumer).weight.detach().numpy().astype(np.float64)  # type: ignore[operator, union-attr]
    fc1 = given.model.get_submodule(neurons.producers[0]).weight.detach().numpy().astype(np.float64)  # type: ignore[operator, union-attr]
    second = slice(heads.width, 2 * heads.width)
    assert get_criterion("magnitude-l1-out")(given)[heads.name][1] == pytest.approx(np.abs(out[:, second]).sum())
    assert get_criterion("magnitude-l2-in")(given)[neurons.name] == pytest.approx(np.sqrt((fc1**2).sum(1)))


def test_activations_are_those_of_the_unpadded_tokens() -> None:
    given = evidence(rows=12)
    squares = {g.name: np.zeros(g.size) for g in given.groups}
    tokens = 0
    for row in tiny_rows(12):
        batch = Batches([row], Head("classification"), 1).collate([0])
        with Taps({g.name: given.model.get_submodule(g.consumer) for g in given.groups}) as taps, torch.no_grad():
            given.model(**batch.inputs)
        for g in given.groups:
            h = taps.inputs[g.name][0].double().numpy()  # (T, units * width)
            squares[g.name] += (h**2).sum(0).reshape(g.size, g.width).sum(1)
        tokens += row.length
    for g in given.groups:
        assert get_criterion("activation")(given)[g.name] == pytest.approx(np.sqrt(squares[g.name] / tokens), rel=1e-4)
        norms = np.linalg.norm(given.weight(g.consumer).numpy().reshape(g.hidden, g.size, g.width), axis=(0, 2))
        found = get_criterion("activation-weight")(given)[g.name]
        assert found == pytest.approx(np.sqrt(squares[g.name] / tokens) * norms, rel=1e-4)


def refit_error(moments: np.ndarray, weight: np.ndarray, metric: np.ndarray, kept: list[int]) -> float:
    """Return the least tr(E[e e^T] metric) of any projection of the kept inputs."""
    cross = weight @ moments[:, kept]
    new = cross @ np.linalg.inv(moments[np.ix_(kept, kept)]) if kept else np.zeros((len(weight), 0))
    delta = weight.copy()
    delta[:, kept] -= new
    return float(np.trace(delta @ moments @ delta.T @ metric))


@pytest.mark.parametrize("width", [1, 2, 3])
@pytest.mark.parametrize("seed", range(3))
def test_elimination_follows_explicit_refits(width: int, seed: int) -> None:
    """Each step's rise is that of the best refit, and no other single unit would have cost less."""
    rng = np.random.default_rng(seed)
    n, d = 6, 4
    h, g = rng.normal(size=(50, n)) @ rng.normal(size=(n, n)), rng.normal(size=(20, d))
    moments, metric, weight = h.T @ h / 50, g.T @ g / 20, rng.normal(size=(d, n))
    order, rises = eliminate(*(torch.from_numpy(x) for x in (moments, weight, metric)), width)
    ridged = moments + 1e-3 * np.trace(moments) / n * np.eye(n)
    kept, error = list(range(n // width)), 0.0

    def columns(units: list[int]) -> list[int]:
        return [u * width + j for u in units for j in range(width)]

    for unit, rise in zip(order.tolist(), rises.tolist(), strict=True):
        after = {u: refit_error(ridged, weight, metric, columns([k for k in kept if k != u])) for u in kept}
        assert unit == min(after, key=lambda u: after[u])
        assert error + rise == pytest.approx(after[unit], rel=1e-6)
        kept.remove(unit)
        error = after[unit]
    assert not kept


@pytest.mark.parametrize("width", [1, 2])
def test_units_of_a_wide_group_are_eliminated_in_blocks_of_the_same_total(
    width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    solves: list[int] = []
    solve = torch.linalg.solve
    monkeypatch.setattr(torch.linalg, "solve", lambda a, b: solves.append(a.shape[-1]) or solve(a, b))
    rng = np.random.default_rng(0)
    n, d = 400 * width, 5
    h = rng.normal(size=(900, n))
    weight, metric = torch.from_numpy(rng.normal(size=(d, n))), torch.eye(d, dtype=torch.float64)
    moments = torch.from_numpy(h.T @ h / 900)
    order, rises = eliminate(moments, weight, metric, width)
    assert sorted(order.tolist()) == list(range(400))
    assert solves.count(4 * width) == 100
    ridged = moments + 1e-3 * moments.diagonal().mean() * torch.eye(n, dtype=torch.float64)
    assert float(rises.sum()) == pytest.approx(float(torch.trace(weight @ ridged @ weight.T)), rel=1e-6)


def test_saliencies_agree_with_the_loss_when_one_unit_is_cut() -> None:
    """First-order and Fisher scores rank units as leaving each one out does."""
    given = evidence(rows=96)
    group = given.groups[1]
    rows = tiny_rows(96)

    def mean_change(unit: int) -> float:
        masks = MaskSet.ones(given.groups)
        masks[group.name][unit] = 0
        cut = mask_model(given.model, given.groups, SlicePlan.from_masks(given.groups, masks))
        changes = []
        for batch in Batches(rows, Head("classification"), 1):
            with torch.no_grad():
                losses = [
                    Head("classification").loss({"logits": m(**batch.inputs).logits}, batch.labels, torch.ones(1))  # type: ignore[arg-type]
                    for m in (cut, given.model)
                ]
            changes.append((losses[0] - losses[1]).abs())
        return float(torch.cat(changes).mean())

    true = [mean_change(u) for u in range(group.size)]
    for name in ("taylor", "fisher"):
        assert spearmanr(true, get_criterion(name)(given)[group.name]).statistic >= 0.8


def test_a_criterion_of_another_package_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    first = get_criterion("random")
    bad = Criterion(lambda given: {g.name: np.full(g.size, np.nan) for g in given.groups}, data_free=True)
    monkeypatch.setattr("deploy_prune.pruner.get_criterion", lambda name: bad)
    with pytest.raises(InputError, match="finite"):
        prune_rows(tiny_model("bert"), Head("classification"), tiny_rows(64), Budget(0.5))
    monkeypatch.setattr("deploy_prune.pruner.get_criterion", lambda name: replace(first))
    assert prune_rows(tiny_model("bert"), Head("classification"), tiny_rows(64), Budget(0.5)).plan


@pytest.mark.parametrize(
    ("options", "criterion"),
    [(Options(), "obs"), (Options(compensate="none"), "fisher"), (Options(criterion="taylor"), "taylor")],
)
def test_the_criterion_follows_the_compensation(options: Options, criterion: str) -> None:
    made = prune_rows(tiny_model("bert"), Head("classification"), tiny_rows(64), Budget(0.5), options=options)
    assert made.stages[1]["criterion"] == criterion


@pytest.mark.parametrize("compensate", ["none", "refit", "mask-tuning-exact"])
def test_steps_follow_the_cubic_schedule(compensate: str) -> None:
    model, rows = tiny_model("bert"), tiny_rows(64)
    options = Options(criterion="fisher", compensate=compensate, rearrange="none", steps=3, min_neurons=1)
    made = prune_rows(model, Head("classification"), rows, Budget(0.5), options=options)
    steps = [s for s in made.stages if s["name"].startswith("step")]
    assert [s["kept"][0] for s in steps] == pytest.approx([1 - 0.5 * (1 - (2 / 3) ** 3), 1 - 0.5 * (1 - (1 / 3) ** 3)])
    assert made.limits[0]["reached"] <= made.limits[0]["limit"]
    one = prune_rows(model, Head("classification"), rows, Budget(0.5), options=replace(options, steps=1))
    assert not [s for s in one.stages if s["name"].startswith("step")]
    assert one.plan.hash != made.plan.hash, "renewed statistics choose other units"


def test_without_data_nothing_is_calibrated() -> None:
    options = Options(criterion="magnitude-l2-out", compensate="none", rearrange="none")
    made = prune_rows(tiny_model("bert"), Head("classification"), tiny_rows(64), Budget(0.5), options=options)
    assert "skipped" in made.stages[0]
    assert made.seq_len == int(np.ceil(np.mean([r.length for r in tiny_rows(64)])))
