"""Costs, the search under a budget, and the rearrangement."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deploy_prune.costs import Budget, encoder_flops, unit_flops
from deploy_prune.errors import InfeasibleBudgetError
from deploy_prune.rearrange import rearrange
from deploy_prune.search import search_flops
from deploy_prune.units import MaskSet, SlicePlan, UnitGroup


def toy_groups(layers: int = 2, heads: int = 3, neurons: int = 4, hidden: int = 6) -> tuple[UnitGroup, ...]:
    groups = []
    for layer in range(layers):
        for kind, size, width, producers in (("head", heads, 2, ("q", "k", "v")), ("neuron", neurons, 1, ("fc1",))):
            groups.append(
                UnitGroup(
                    name=f"L{layer:02d}.{kind}s",
                    kind=kind,  # type: ignore[arg-type]
                    layer=layer,
                    size=size,
                    width=width,
                    hidden=hidden,
                    params=1,
                    producers=producers,
                    consumer="out",
                    residual="r",
                )
            )
    return tuple(groups)


def random_scores(groups: tuple[UnitGroup, ...], seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {g.name: rng.exponential(size=g.size) for g in groups}


def cost_of(groups: tuple[UnitGroup, ...], masks: MaskSet, seq_len: int) -> int:
    return sum(int(masks[g.name].sum()) * unit_flops(g, seq_len) for g in groups)


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    keep=st.floats(0.02, 1.0),
    seq_len=st.integers(1, 600),
    minimum=st.integers(0, 1),
)
def test_never_over_the_budget(seed: int, keep: float, seq_len: int, minimum: int) -> None:
    groups = toy_groups(layers=3, heads=4, neurons=9)
    budget = Budget(keep, seq_len)
    smallest = minimum * sum(unit_flops(g, seq_len) for g in groups)
    if smallest > budget.limit(groups):
        with pytest.raises(InfeasibleBudgetError):
            search_flops(groups, random_scores(groups, seed), budget, min_heads=minimum, min_neurons=minimum)
        return
    masks = search_flops(groups, random_scores(groups, seed), budget, min_heads=minimum, min_neurons=minimum)
    plan = SlicePlan.from_masks(groups, masks)
    assert encoder_flops(groups, seq_len, plan) <= keep * encoder_flops(groups, seq_len)
    assert all(minimum <= g.count <= g.total for g in plan.groups)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("keep", [0.1, 0.35, 0.6, 0.9])
def test_equals_brute_force(seed: int, keep: float) -> None:
    groups = toy_groups(layers=2, heads=3, neurons=3)
    scores, seq_len = random_scores(groups, seed), 5
    masks = search_flops(groups, scores, Budget(keep, seq_len), min_heads=0, min_neurons=0)
    found = sum(float((scores[g.name] * masks[g.name]).sum()) for g in groups)
    limit = Budget(keep, seq_len).limit(groups)
    units = [(unit_flops(g, seq_len), float(s)) for g in groups for s in scores[g.name]]
    best = max(
        sum(s for (_, s), bit in zip(units, bits, strict=True) if bit)
        for bits in itertools.product((0, 1), repeat=len(units))
        if sum(c for (c, _), bit in zip(units, bits, strict=True) if bit) <= limit
    )
    assert found == pytest.approx(best)


def test_budget_below_the_heads_alone_is_kept() -> None:
    """The public code exceeds a budget that the heads alone would use up, and never tries zero heads."""
    groups = toy_groups(layers=2, heads=3, neurons=40)
    scores = {g.name: np.full(g.size, 100.0 if g.kind == "head" else 1.0) for g in groups}
    heads_share = sum(g.size * unit_flops(g, 9) for g in groups if g.kind == "head") / encoder_flops(groups, 9)
    budget = Budget(heads_share / 2, 9)
    masks = search_flops(groups, scores, budget, min_heads=0, min_neurons=0)
    assert cost_of(groups, masks, 9) <= budget.limit(groups)


def test_infeasible_budget_names_the_smallest() -> None:
    groups = toy_groups()
    with pytest.raises(InfeasibleBudgetError, match="smallest reachable is") as caught:
        search_flops(groups, random_scores(groups, 0), Budget(0.01, 8))
    smallest = caught.value.smallest
    masks = search_flops(groups, random_scores(groups, 0), Budget(smallest, 8))
    assert all(mask.sum() == 1 for mask in masks.values())


def test_whole_budget_keeps_everything() -> None:
    groups = toy_groups()
    masks = search_flops(groups, random_scores(groups, 0), Budget(1.0, 8))
    assert all(mask.all() for mask in masks.values())


def test_ties_go_to_the_lower_index() -> None:
    groups = toy_groups(layers=1, heads=2, neurons=4)
    scores = {g.name: np.ones(g.size) for g in groups}
    first, second = (search_flops(groups, scores, Budget(0.5, 4)) for _ in range(2))
    for g in groups:
        assert np.array_equal(first[g.name], second[g.name])
        assert np.array_equal(np.sort(first[g.name])[::-1], first[g.name]), "kept units are the first ones"


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), samples=st.integers(1, 40), units=st.integers(2, 12))
def test_rearranging_keeps_counts_and_never_raises_the_objective(seed: int, samples: int, units: int) -> None:
    group = toy_groups(layers=1, heads=2, neurons=units)[1]
    rng = np.random.default_rng(seed)
    gradients = {group.name: torch.from_numpy(rng.normal(size=(samples, units)))}
    masks = MaskSet({group.name: (rng.random(units) < 0.5).astype(float)})
    new, objectives = rearrange([group], masks, gradients)
    assert new[group.name].sum() == masks[group.name].sum()
    for before, after in objectives.values():
        assert after <= before * (1 + 1e-12) + 1e-12
        cut = new[group.name] == 0
        assert after == pytest.approx(float((gradients[group.name][:, cut].sum(1) ** 2).sum()), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("seed", range(20))
def test_rearranging_one_cut_unit_is_optimal(seed: int) -> None:
    """With a single cut unit the greedy round is exhaustive: compare with brute force."""
    group = toy_groups(layers=1, heads=2, neurons=7)[1]
    gradients = np.random.default_rng(seed).normal(size=(9, 7))
    masks = MaskSet({group.name: np.array([1, 1, 0, 1, 1, 1, 1.0])})
    new, objectives = rearrange([group], masks, {group.name: torch.from_numpy(gradients)})
    best = int(np.argmin((gradients**2).sum(0)))
    assert np.flatnonzero(new[group.name] == 0).tolist() == [best]
    assert objectives[group.name][1] == pytest.approx((gradients[:, best] ** 2).sum())
