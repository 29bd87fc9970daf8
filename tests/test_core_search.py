"""Costs, the search under a budget, and the rearrangement."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deploy_prune.costs import Budget, CostTable, Limit, encoder_flops, flops_table, unit_flops
from deploy_prune.errors import InfeasibleBudgetError, InputError
from deploy_prune.rearrange import rearrange
from deploy_prune.search import Minimum, search
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


def flops_limit(groups: tuple[UnitGroup, ...], keep: float, seq_len: int) -> list[Limit]:
    return Budget(keep).limits(groups, seq_len, 0)


@pytest.fixture(params=["exact", "paper"])
def method(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    keep=st.floats(0.02, 1.0),
    seq_len=st.integers(1, 600),
    least=st.integers(0, 1),
    align=st.sampled_from([1, 2, 4]),
    method=st.sampled_from(["exact", "paper"]),
)
def test_never_over_the_budget(seed: int, keep: float, seq_len: int, least: int, align: int, method: str) -> None:
    groups = toy_groups(layers=3, heads=4, neurons=9)
    limits, scores = flops_limit(groups, keep, seq_len), random_scores(groups, seed)
    minimum = Minimum(least, least, align if method == "exact" else 1)
    smallest = sum(int(minimum.counts(g)[0]) * unit_flops(g, seq_len) for g in groups)
    if smallest > limits[0].most:
        with pytest.raises(InfeasibleBudgetError):
            search(groups, scores, limits, minimum, method=method)
        return
    found = search(groups, scores, limits, minimum, method=method)
    plan = SlicePlan.from_masks(groups, found.masks)
    assert found.costs["flops"] == encoder_flops(groups, seq_len, plan)
    assert encoder_flops(groups, seq_len, plan) <= keep * encoder_flops(groups, seq_len)
    assert all(plan[g.name].count in minimum.counts(g) for g in groups)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("keep", [0.1, 0.35, 0.6, 0.9])
def test_equals_brute_force(seed: int, keep: float, method: str) -> None:
    groups = toy_groups(layers=2, heads=3, neurons=3)
    scores, seq_len = random_scores(groups, seed), 5
    masks = search(groups, scores, flops_limit(groups, keep, seq_len), Minimum(0, 0), method=method).masks
    found = sum(float((scores[g.name] * masks[g.name]).sum()) for g in groups)
    limit = flops_limit(groups, keep, seq_len)[0].most
    units = [(unit_flops(g, seq_len), float(s)) for g in groups for s in scores[g.name]]
    best = max(
        sum(s for (_, s), bit in zip(units, bits, strict=True) if bit)
        for bits in itertools.product((0, 1), repeat=len(units))
        if sum(c for (c, _), bit in zip(units, bits, strict=True) if bit) <= limit
    )
    assert found == pytest.approx(best)


def random_tables(groups: tuple[UnitGroup, ...], rng: np.random.Generator, tables: int) -> list[CostTable]:
    """Draw cost tables of any shape: rising in steps, flat in places, not linear."""

    def costs(size: int) -> np.ndarray:
        steps = rng.exponential(size=size) * (rng.random(size) < 0.7)
        return np.concatenate([[0.0], np.cumsum(steps)])

    kinds = ("latency", "params", "bytes")
    return [CostTable(kinds[t], {g.name: costs(g.size) for g in groups}, rng.random()) for t in range(tables)]


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    keep=st.floats(0.05, 1.0),
    tables=st.integers(1, 3),
    least=st.integers(0, 1),
    ties=st.booleans(),
)
def test_any_cost_tables_equal_brute_force(seed: int, keep: float, tables: int, least: int, ties: bool) -> None:
    """One limit by dynamic programming, several as a mixed-integer program, on tables of any shape."""
    rng = np.random.default_rng(seed)
    groups = toy_groups(layers=2, heads=3, neurons=4)
    scores = random_scores(groups, seed)
    if ties:
        scores = {name: np.round(s * 2) for name, s in scores.items()}
    limits = [
        Limit(table, table.base + (table.dense - table.base) * keep * (0.7 + 0.3 * rng.random()), keep)
        for table in random_tables(groups, rng, tables)
    ]
    values = {name: np.concatenate([[0.0], np.cumsum(np.sort(s)[::-1])]) for name, s in scores.items()}
    best = -1.0
    for counts in itertools.product(*(range(least, g.size + 1) for g in groups)):
        chosen = {g.name: n for g, n in zip(groups, counts, strict=True)}
        if all(x.table.cost(chosen) <= x.most for x in limits):
            best = max(best, sum(float(values[name][n]) for name, n in chosen.items()))
    if best < 0:
        with pytest.raises(InfeasibleBudgetError):
            search(groups, scores, limits, Minimum(least, least))
        return
    found = search(groups, scores, limits, Minimum(least, least))
    kept = {g.name: int(found.masks[g.name].sum()) for g in groups}
    assert all(x.table.cost(kept) <= x.most for x in limits)
    assert sum(float(values[name][n]) for name, n in kept.items()) == pytest.approx(best, rel=2e-5, abs=1e-6)


def test_too_many_partial_plans_loosen_the_tolerance(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deploy_prune.search.knapsack.MAX_STATES", 8)
    groups = toy_groups(layers=4, heads=4, neurons=12)
    limits = flops_limit(groups, 0.5, 7)
    found = search(groups, random_scores(groups, 1), limits)
    assert found.gap is not None
    assert found.gap > 1e-9
    assert found.costs["flops"] <= limits[0].most


def test_limits_that_cannot_be_met_together() -> None:
    groups = toy_groups(layers=1, heads=2, neurons=2)
    prices = {"L00.heads": np.array([0.0, 1, 2]), "L00.neurons": np.array([5.0, 3, 1])}  # no count is cheap in both
    other = {name: costs[::-1] for name, costs in prices.items()}
    limits = [Limit(CostTable("flops", prices), 2, 0.5), Limit(CostTable("params", other), 2, 0.5)]
    with pytest.raises(InfeasibleBudgetError, match="together"):
        search(groups, random_scores(groups, 0), limits, Minimum(0, 0))


def test_budget_below_the_heads_alone_is_kept(method: str) -> None:
    """The public code exceeds a budget that the heads alone would use up, and never tries zero heads."""
    groups = toy_groups(layers=2, heads=3, neurons=40)
    scores = {g.name: np.full(g.size, 100.0 if g.kind == "head" else 1.0) for g in groups}
    heads_share = sum(g.size * unit_flops(g, 9) for g in groups if g.kind == "head") / encoder_flops(groups, 9)
    limits = flops_limit(groups, heads_share / 2, 9)
    masks = search(groups, scores, limits, Minimum(0, 0), method=method).masks
    assert cost_of(groups, masks, 9) <= limits[0].most


def latency_limit(groups: tuple[UnitGroup, ...], keep: float) -> Limit:
    """Flat up to 2 heads and 8 neurons, then linear."""
    costs = {g.name: 5.0 + np.maximum(np.arange(g.size + 1) - (2 if g.kind == "head" else 8), 0) for g in groups}
    return Limit.share(CostTable("latency", costs, 3.0), keep)


@pytest.mark.parametrize("keep", [0.7, 0.8, 0.9])
def test_latency_search_of_the_paper_keeps_what_is_free(keep: float) -> None:
    """The public code subtracts from the budget anew in every turn and leaves out the free units' importance."""
    groups = toy_groups(layers=2, heads=4, neurons=30)
    limit, scores = latency_limit(groups, keep), random_scores(groups, 3)
    found = search(groups, scores, [limit], method="paper")
    counts = {g.name: int(found.masks[g.name].sum()) for g in groups}
    assert all(counts[g.name] >= (2 if g.kind == "head" else 8) for g in groups)
    assert found.costs["latency"] <= limit.most
    exact = search(groups, scores, [limit])
    worth = [sum(float((scores[n] * x.masks[n]).sum()) for n in scores) for x in (found, exact)]
    assert worth[0] == pytest.approx(worth[1])  # the curve is what the paper assumes, so greedy is optimal


def test_the_paper_search_takes_one_budget_only() -> None:
    groups = toy_groups()
    limits = Budget(0.5, keep_params=0.5).limits(groups, 4, 0)
    with pytest.raises(InputError, match="--search exact"):
        search(groups, random_scores(groups, 0), limits, method="paper")
    with pytest.raises(InputError, match="Unknown search"):
        search(groups, random_scores(groups, 0), limits, method="psychic")


def test_infeasible_budget_names_the_smallest(method: str) -> None:
    groups = toy_groups()
    with pytest.raises(InfeasibleBudgetError, match="smallest reachable is") as caught:
        search(groups, random_scores(groups, 0), flops_limit(groups, 0.01, 8), method=method)
    limits = flops_limit(groups, caught.value.smallest, 8)
    masks = search(groups, random_scores(groups, 0), limits, method=method).masks
    assert all(mask.sum() == 1 for mask in masks.values())


def test_infeasible_bytes_name_the_smallest() -> None:
    groups = toy_groups()
    with pytest.raises(InfeasibleBudgetError, match=r"max_bytes 10 is infeasible.* 4,016 bytes"):
        search(groups, random_scores(groups, 0), Budget(max_bytes=10).limits(groups, 4, 1000 + 14))


def test_several_limits_are_all_kept() -> None:
    groups = toy_groups(layers=3, heads=4, neurons=60)
    limits = Budget(0.6, keep_params=0.5, max_bytes=4 * 150).limits(groups, 4, 3 * 64)
    found = search(groups, random_scores(groups, 5), limits)
    assert found.solver == "mixed integer"
    assert all(found.costs[x.table.kind] <= x.most for x in limits)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 1000), keep=st.floats(0.45, 1.0), align=st.sampled_from([1, 4]))
def test_local_scope_keeps_the_same_share_of_every_group(seed: int, keep: float, align: int) -> None:
    groups = toy_groups(layers=3, heads=4, neurons=16)
    scores, limits = random_scores(groups, seed), flops_limit(groups, keep, 5)
    found = search(groups, scores, limits, Minimum(1, 1, align), scope="local")
    counts = [int(found.masks[g.name].sum()) for g in groups]
    assert len(set(counts[0::2])) == len(set(counts[1::2])) == 1
    assert found.costs["flops"] <= limits[0].most
    if align == 1:
        assert abs(counts[0] / 4 - counts[1] / 16) <= 0.25
    for g in groups:
        kept = found.masks[g.name] > 0
        if kept.any() and not kept.all():
            assert scores[g.name][kept].min() >= scores[g.name][~kept].max()


def test_whole_budget_keeps_everything(method: str) -> None:
    groups = toy_groups()
    masks = search(groups, random_scores(groups, 0), flops_limit(groups, 1.0, 8), method=method).masks
    assert all(mask.all() for mask in masks.values())


def test_units_worth_nothing_fill_the_room() -> None:
    groups = toy_groups(layers=2, heads=2, neurons=8)
    scores = {g.name: np.zeros(g.size) for g in groups}
    found = search(groups, scores, flops_limit(groups, 0.5, 4))
    assert found.costs["flops"] > 0.4 * encoder_flops(groups, 4)


def test_ties_go_to_the_lower_index(method: str) -> None:
    groups = toy_groups(layers=1, heads=2, neurons=4)
    scores = {g.name: np.ones(g.size) for g in groups}
    limits = flops_limit(groups, 0.5, 4)
    first, second = (search(groups, scores, limits, method=method).masks for _ in range(2))
    for g in groups:
        assert np.array_equal(first[g.name], second[g.name])
        assert np.array_equal(np.sort(first[g.name])[::-1], first[g.name]), "kept units are the first ones"


@pytest.mark.parametrize("bad", [0, 0.0, -1, 1.5, True])
def test_budgets_that_are_no_shares_are_refused(bad: float) -> None:
    with pytest.raises(InputError, match="keep_flops"):
        Budget(bad)


def test_latency_budget_without_a_table_is_refused() -> None:
    with pytest.raises(InputError, match="probe"):
        Budget(keep_latency=0.5).limits(toy_groups(), 4, 0)


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


@pytest.mark.parametrize("keep", [0.2, 0.5, 1.0])
@pytest.mark.parametrize("scope", ["global", "local"])
def test_what_is_left_out_costs_nothing_and_the_rest_takes_its_room(scope: str, keep: float) -> None:
    groups = toy_groups(layers=3, heads=4, neurons=9)
    limits, scores = flops_limit(groups, keep, 20), random_scores(groups, 3)
    gone = frozenset({"L01.heads", "L01.neurons", "L02.heads"})
    found = search(groups, scores, limits, Minimum(left_out=gone), scope=scope)
    assert {name for name, mask in found.masks.items() if not mask.any()} == gone
    assert cost_of(groups, found.masks, 20) == found.costs["flops"] <= limits[0].most
    if scope == "global":
        rest = tuple(g for g in groups if g.name not in gone)
        alone = search(rest, scores, [Limit(flops_table(rest, 20), limits[0].most, keep)], Minimum(left_out=gone)).masks
        worth = [sum(float(scores[g.name] @ masks[g.name]) for g in rest) for masks in (found.masks, alone)]
        assert worth[0] == pytest.approx(worth[1], rel=1e-6)
    with pytest.raises(InputError, match="whole sub-layers"):
        search(groups, scores, limits, Minimum(left_out=gone), method="paper")
