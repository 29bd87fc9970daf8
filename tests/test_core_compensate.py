"""Compensation: the normal equations against plain least squares, and the sweep over real layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from models_tiny import FAMILIES, tiny_inputs, tiny_model, tiny_rows
from scipy.sparse.linalg import lsmr
from sweeps_tiny import ragged_plan, teacher

from deploy_prune.archs import arch_of
from deploy_prune.batches import Batch, Batches
from deploy_prune.compensate import MaskTuning, Refit, get_solver, sweep
from deploy_prune.compensate.layers import token_weights
from deploy_prune.compensate.refit import RIDGES, _ridge_fit
from deploy_prune.compensate.solution import Solution
from deploy_prune.costs import Budget
from deploy_prune.criteria import Criterion, Evidence
from deploy_prune.errors import InputError
from deploy_prune.heads import Head
from deploy_prune.layerwise import Taps
from deploy_prune.masking import mask_model
from deploy_prune.model_runs import with_scales
from deploy_prune.moments import Moments, MomentSums, gram
from deploy_prune.predict import predict
from deploy_prune.pruner import prune_rows
from deploy_prune.slicing import slice_model
from deploy_prune.stages import Options
from deploy_prune.units import MaskSet, SlicePlan, UnitGroup


def group(width: int = 1) -> UnitGroup:
    return UnitGroup("L00.neurons", "neuron", 0, 6, width, 5, 1, ("fc1",), "fc2", "fc1")


def weighted_problem(seed: int = 0, n: int = 6, d: int = 5, weighted: bool = True) -> tuple[Any, ...]:
    g = torch.Generator().manual_seed(seed)
    h = torch.randn(3, 40, n, generator=g)
    y = torch.randn(3, 40, d, generator=g) + h @ torch.randn(n, d, generator=g)
    weight = 0.5 + torch.rand(3, 40, generator=g) if weighted else torch.ones(3, 40)
    weight[1, 25:] = 0
    sums = MomentSums(n, d, h.device)
    sums.add(h, y, weight)
    moments = sums.total()
    keep = weight.bool()
    root = weight[keep].double().sqrt().unsqueeze(1)  # what a weighted fit does to its equations
    equations = h[keep].double() * root, y[keep].double() * root
    return *equations, torch.randn(d, n, generator=g), torch.randn(d, generator=g), moments, root


def problem(seed: int = 0, n: int = 6, d: int = 5) -> tuple[Any, ...]:
    return weighted_problem(seed, n, d, weighted=False)[:5]


@pytest.mark.parametrize("weighted", [False, True])
def test_moments_are_those_of_the_unpadded_tokens(weighted: bool) -> None:
    h, y, w, b, moments, root = weighted_problem(weighted=weighted)
    assert torch.allclose(moments.hh, h.T @ h, rtol=1e-5)
    assert float(moments.count) == pytest.approx(float(root.square().sum()))
    error = ((h @ w.double().T + root * b.double() - y) ** 2).sum()
    assert float(moments.residual(w, b)) == pytest.approx(float(error), rel=1e-5)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("ridge", [1e-6, 1e-3, 1.0])
def test_refit_is_the_ridge_solution(ridge: float, weighted: bool) -> None:
    h, y, w0, b0, moments, root = weighted_problem(weighted=weighted)
    found = Refit(ridge=ridge).solve(group(), w0, b0, moments)
    penalty = ridge * float((h**2).sum(0).mean())
    # rows of an augmented least-squares problem: data, then sqrt(penalty) (W - W0) = 0; the bias is free
    a = np.block([[h.numpy(), root.numpy()], [np.sqrt(penalty) * np.eye(6), np.zeros((6, 1))]])
    rhs = np.vstack([y.numpy(), np.sqrt(penalty) * w0.double().numpy().T])
    expected = np.linalg.lstsq(a, rhs, rcond=None)[0]
    assert found.weight.numpy() == pytest.approx(expected[:6].T, rel=1e-3, abs=1e-4)
    assert found.bias.numpy() == pytest.approx(expected[6], rel=1e-3, abs=1e-4)
    assert float(found.after) <= float(found.before)
    assert found.decline_reason() is None


@pytest.mark.parametrize("noise", [0.0, 30.0])
def test_the_ridge_is_the_best_on_held_out_tokens(noise: float) -> None:
    """Clean targets take the weakest ridge, few noisy tokens a strong one."""
    g = torch.Generator().manual_seed(0)
    n, d, w0 = 30, 5, torch.zeros(5, 30)
    truth = torch.randn(n, d, generator=g)
    both = []
    for _ in range(2):
        h, sums = torch.randn(1, 40, n, generator=g), MomentSums(n, d, w0.device)
        sums.add(h, h @ truth + noise * torch.randn(1, 40, d, generator=g), torch.ones(1, 40))
        both.append(sums.total())
    fit, held = both
    found = Refit().solve(group(), w0, torch.zeros(d), fit, held)
    errors = [float(held.residual(*_ridge_fit(w0, fit, torch.tensor(r))[:2])) for r in RIDGES]
    assert float(found.ridge) == RIDGES[int(np.argmin(errors))] == (RIDGES[-1] if noise else RIDGES[0])  # type: ignore[arg-type]
    again = Refit(ridge=float(found.ridge)).solve(group(), w0, torch.zeros(d), fit + held)  # type: ignore[arg-type]
    assert torch.allclose(found.weight, again.weight)


def test_refit_without_inputs_is_the_mean() -> None:
    _, y, _, b0, _ = problem()
    sums = MomentSums(0, 5, y.device)
    sums.add(torch.zeros(1, len(y), 0), y.float().unsqueeze(0), torch.ones(1, len(y)))
    found = Refit().solve(group(), torch.zeros(5, 0), b0, sums.total())
    assert torch.allclose(found.bias.double(), y.mean(0), atol=1e-5)


def test_refit_of_dead_inputs_keeps_the_weights() -> None:
    """A head or neuron that never fires gives a singular Gram matrix."""
    _, y, w0, b0, _ = problem()
    sums = MomentSums(6, 5, y.device)
    sums.add(torch.zeros(1, len(y), 6), y.float().unsqueeze(0), torch.ones(1, len(y)))
    found = Refit().solve(group(), w0, b0, sums.total())
    assert found.decline_reason() is None
    assert torch.allclose(found.weight, w0)


@pytest.mark.parametrize("width", [1, 2])
@pytest.mark.parametrize("solver", ["lsmr", "exact"])
def test_mask_tuning_equals_lsmr_on_the_whole_system(solver: str, width: int) -> None:
    h, y, w0, b0, moments = problem()
    units = 6 // width
    found = MaskTuning(solver=solver).solve(group(width), w0, b0, moments)  # type: ignore[arg-type]
    w, b = w0.double(), b0.double()
    columns = [h[:, u * width : (u + 1) * width] @ w[:, u * width : (u + 1) * width].T for u in range(units)]
    a = torch.stack([c.reshape(-1) for c in columns], dim=1).numpy()
    rhs = (y - b).reshape(-1).numpy() - a.sum(1)
    expected = 1 + lsmr(a, rhs, damp=1.0, atol=1e-12, btol=1e-12, maxiter=1000)[0]
    assert found.scales is not None
    assert found.scales.numpy() == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert torch.allclose(found.weight.double(), w * found.scales.repeat_interleave(width), atol=1e-6)
    assert float(found.after) <= float(found.before)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"info": torch.tensor(2)}, "positive definite"),
        ({"weight": torch.full((5, 6), torch.nan)}, "finite"),
        ({"scales": torch.tensor([1.0, 11.0])}, "left"),
        ({"after": torch.tensor(3.0)}, "grow"),
    ],
)
def test_bad_solutions_are_declined_with_a_reason(change: dict[str, Any], reason: str) -> None:
    good = {"weight": torch.ones(5, 6), "bias": torch.ones(5), "before": torch.tensor(2.0), "after": torch.tensor(1.0)}
    assert Solution(**good).decline_reason() is None
    assert reason in str(Solution(**(good | change)).decline_reason())


def test_tokens_weigh_half_by_saliency_half_evenly() -> None:
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1]])
    batch = Batch({"attention_mask": mask}, mask, None, [2, 0, 1])
    saliency = torch.tensor([[0.0, 0.0, 9.0, 9.0, 9.0], [1e-30, 3e-30, 0.0, 0.0, 0.0], [3.0, 0.0, 0.0, 5.0, 0.0]])
    found = token_weights(batch, False, 0.5, saliency)
    expected = [[2.0, 0.5, 0.5, 0.0], [1.0, 1.0, 0.0, 0.0], [1.0, 2.0, 0.5, 0.5]]
    assert torch.allclose(found, torch.tensor(expected))  # the second row has no gradient on its own tokens
    assert torch.equal(token_weights(batch, False, 0.0, saliency), mask)
    assert token_weights(batch, True, 0.5, saliency).tolist() == [[1, 0, 0, 0]] * 3


@pytest.mark.parametrize("name", ["refit", "mask-tuning", "mask-tuning-exact"])
@pytest.mark.parametrize("family", FAMILIES)
def test_sweep_lowers_the_error_and_stays_equal_to_the_masked_model(family: str, name: str) -> None:
    model, head, rows = tiny_model(family), Head("classification"), tiny_rows(96, family=family)
    groups, plan = ragged_plan(model)
    student = slice_model(model, groups, plan)
    before = hidden_error(family, model, student)
    swept = sweep(
        student, teacher(model, groups, rows, 1), groups, plan, head, Batches(rows, head, 1), get_solver(name)
    )
    assert [entry.group for entry in swept.log] == [g.name for g in groups]
    assert all(e.residual_after <= e.residual_before * (1 + 1e-6) for e in swept.log)
    tuned = plan if name == "refit" else with_scales(plan, swept.scales)
    again = slice_model(model, groups, tuned, swept.updates)
    virtual = mask_model(model, groups, tuned, swept.updates)
    for a, b, c in zip(*(predict(m, head, rows, pad_id=1) for m in (student, again, virtual)), strict=True):
        assert np.abs(a["logits"] - b["logits"]).max() <= 1e-5
        assert np.abs(b["logits"] - c["logits"]).max() <= 1e-5
    if name == "refit":
        assert hidden_error(family, model, student) < before


def hidden_error(family: str, teacher: Any, student: Any) -> float:
    inputs = tiny_inputs(family, batch=1, length=12)
    with torch.inference_mode():
        states = [m.base_model(**inputs).last_hidden_state for m in (teacher, student)]
    return float((states[0] - states[1]).square().mean())


@dataclass(frozen=True)
class FailsOnce(Refit):
    """Refit, but with a proposal that must be declined in one group."""

    bad: str = "L00.neurons"

    def solve(
        self, group: UnitGroup, weight: Any, bias: Any, moments: Moments, held: Moments | None = None
    ) -> Solution:
        solution = super().solve(group, weight, bias, moments, held)
        if group.name == self.bad:
            solution.weight = torch.full_like(solution.weight, torch.nan)
        return solution


def test_a_parallel_refit_follows_the_dense_model_alone() -> None:
    """Each projection is the ridge solution on the dense inputs at the kept units, whatever the layers below lost."""
    model, head, rows = tiny_model("bert"), Head("classification"), tiny_rows(96)
    groups, plan = ragged_plan(model)
    student, batches = slice_model(model, groups, plan), Batches(rows, head, 0)
    swept = sweep(student, teacher(model, groups, rows), groups, plan, head, batches, Refit(ridge=1e-3, parallel=True))
    g = next(g for g in groups if g.name == "L02.heads")
    consumer: Any = model.get_submodule(g.consumer)
    sums = MomentSums(plan[g.name].count * g.width, g.hidden, torch.device("cpu"))
    for batch in batches:
        with Taps({"c": consumer}) as taps, torch.no_grad():
            model(**batch.inputs)
        h = taps.inputs["c"][..., g.columns(plan[g.name].kept)]
        sums.add(h, taps.outputs["c"], batch.inputs["attention_mask"], batch.number)
    weight = consumer.weight[:, g.columns(plan[g.name].kept)]
    expected = Refit(ridge=1e-3).solve(g, weight, consumer.bias, sums.total())
    assert torch.allclose(swept.updates[g.name].weight, expected.weight, atol=1e-5)
    assert torch.allclose(swept.updates[g.name].bias, expected.bias, atol=1e-5)


@pytest.mark.parametrize("n", [3, 256, 257, 700])
def test_gram_is_the_product(n: int) -> None:
    h = torch.randn(50, n, generator=torch.Generator().manual_seed(n))
    assert torch.allclose(gram(h), h.T @ h, atol=1e-4)
    assert torch.equal(gram(h), gram(h).T)


def test_one_bad_layer_does_not_stop_the_others() -> None:
    """The public code leaves the loop at the first bad layer and says nothing."""
    model, head = tiny_model("bert"), Head("classification")
    groups, plan = ragged_plan(model)
    student = slice_model(model, groups, plan)
    rows = tiny_rows(64)
    swept = sweep(student, teacher(model, groups, rows), groups, plan, head, Batches(rows, head, 0), FailsOnce())
    assert [e.group for e in swept.log if not e.accepted] == ["L00.neurons"]
    assert len(swept.log) == len(groups)
    assert "finite" in str(next(e.reason for e in swept.log if not e.accepted))
    assert torch.isfinite(torch.cat([p.flatten() for p in student.parameters()])).all()


def test_heads_of_the_first_layer_are_tuned() -> None:
    """The public code never tunes layer 0's heads."""
    model = tiny_model("bert")
    result = prune_rows(
        model, Head("classification"), tiny_rows(96), Budget(0.6), options=Options(compensate="mask-tuning")
    )
    assert any(s != 1.0 for s in result.plan["L00.heads"].scales)


def test_whole_plan_is_left_nearly_alone() -> None:
    """Nothing cut: the best refit is the dense projection itself."""
    model, head = tiny_model("bert"), Head("classification")
    groups = arch_of(model).groups(model)
    plan = SlicePlan.from_masks(groups, MaskSet.ones(groups))
    student = slice_model(model, groups, plan)
    rows = tiny_rows(64)
    sweep(student, teacher(model, groups, rows), groups, plan, head, Batches(rows, head, 0), Refit())
    dense, refitted = (predict(m, head, rows) for m in (model, student))
    assert max(np.abs(a["logits"] - b["logits"]).max() for a, b in zip(dense, refitted, strict=True)) < 1e-3


def test_same_seed_same_hash() -> None:
    model, rows, head = tiny_model("roberta"), tiny_rows(96), Head("classification")
    first, second = (prune_rows(model, head, rows, Budget(0.5), pad_id=1) for _ in range(2))
    assert first.hash == second.hash


@pytest.mark.parametrize(
    ("options", "skipped", "least"),
    [
        (Options(), {"rearrange"}, 4),
        (Options(compensate="mask-tuning"), set(), 1),
        (Options(rearrange="batch"), set(), 4),
        (Options(compensate="none", rearrange="none", min_neurons=2), {"rearrange", "compensate"}, 2),
    ],
)
def test_every_stage_is_recorded_as_run_or_skipped(options: Options, skipped: set[str], least: int) -> None:
    model = tiny_model("bert", intermediate_size=64)
    stages = prune_rows(model, Head("classification"), tiny_rows(64), Budget(0.5), options=options).stages
    assert [s["name"] for s in stages] == ["calibrate", "score", "search", "rearrange", "compensate"]
    assert {s["name"] for s in stages if "skipped" in s} == skipped
    assert stages[2]["min_neurons"] == least


def test_last_layers_are_not_emptied_before_a_refit(monkeypatch: pytest.MonkeyPatch) -> None:
    """All the importance in one layer: the others still keep a sixteenth of their neurons."""

    def first_layer_only(given: Evidence) -> dict[str, np.ndarray]:
        return {g.name: np.full(g.size, 1.0 if "L00" in g.name else 1e-9) for g in given.groups}

    monkeypatch.setattr("deploy_prune.pruner.get_criterion", lambda name: Criterion(first_layer_only))
    model, head, rows = tiny_model("bert", intermediate_size=64), Head("classification"), tiny_rows(64)
    kept = prune_rows(model, head, rows, Budget(0.3)).plan.layer_counts()
    assert all(layer["neurons"] >= 4 for layer in kept)
    bare = prune_rows(model, head, rows, Budget(0.3), options=Options(compensate="none")).plan.layer_counts()
    assert bare[2]["neurons"] < 4


def test_unknown_compensation_lists_the_known() -> None:
    with pytest.raises(InputError, match="prayer") as caught:
        get_solver("prayer")
    assert "refit" in caught.value.hint


def test_an_unknown_compensation_costs_no_calibration(monkeypatch: pytest.MonkeyPatch) -> None:
    """It used to be refused after minutes of calibration and scores."""
    monkeypatch.setattr("deploy_prune.model_runs.calibrate", lambda *args, **kwargs: pytest.fail("calibrated first"))
    with pytest.raises(InputError, match="prayer"):
        prune_rows(
            tiny_model("bert"), Head("classification"), tiny_rows(64), Budget(0.5), options=Options(compensate="prayer")
        )
