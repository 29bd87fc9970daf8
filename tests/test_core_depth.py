"""Depth: the choice is the brute-force optimum at every removal, and what is left out is really gone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models_tiny import FAMILIES, heads_of, tiny_model, tiny_rows
from pydantic import ValidationError
from torch import nn

from deploy_prune.archs import arch_of
from deploy_prune.batches import Batches
from deploy_prune.config import Recipe, load_recipe
from deploy_prune.costs import Budget, encoder_flops
from deploy_prune.depth import Depth, choose, without
from deploy_prune.errors import InfeasibleBudgetError, InputError
from deploy_prune.heads import Head
from deploy_prune.layerwise import first
from deploy_prune.masking import OutputWeights, mask_model, scatter
from deploy_prune.pruner import Pruner
from deploy_prune.slicing import slice_model
from deploy_prune.stages import Options
from deploy_prune.units import MaskSet, SlicePlan, UnitGroup

Groups = tuple[UnitGroup, ...]


def parts(family: str, head: str = "classification", count: int = 80) -> tuple[Any, Groups, Head, list[Any]]:
    model = tiny_model(family, head)
    return model, arch_of(model).groups(model), Head(head), tiny_rows(count, head, family=family)  # type: ignore[arg-type]


@torch.no_grad()
def loss_of(model: nn.Module, head: Head, rows: list[Any], teacher: nn.Module | None = None) -> float:
    total = 0.0
    for batch in Batches(rows, head, 0):
        found = head.outputs(model, batch.inputs)
        if teacher is None:
            loss = head.loss(found, batch.labels, batch.mask)  # type: ignore[arg-type]
        else:
            loss = head.distance(found, head.outputs(teacher, batch.inputs), batch.mask)
        total += float(loss.double().sum())
    return total / len(rows)


@torch.no_grad()
def mean_outputs(model: nn.Module, groups: Groups, head: Head, rows: list[Any]) -> dict[str, torch.Tensor]:
    """Return the mean output of every projection over unpadded tokens, taken one batch and one module at a time."""
    means = {}
    for g in groups:
        seen: list[torch.Tensor] = []
        hook = model.get_submodule(g.consumer).register_forward_hook(lambda m, a, out, seen=seen: seen.append(out))  # type: ignore[misc]
        kept = [
            first(seen[-1])[batch.mask.bool()] for batch in Batches(rows, head, 0) if head.outputs(model, batch.inputs)
        ]
        hook.remove()
        means[g.name] = torch.cat(kept).double().mean(0).float()
    return means


def cut(model: nn.Module, groups: Groups, constants: dict[str, torch.Tensor]) -> Any:
    """Return the physically sliced model without some groups."""
    masks = MaskSet.ones(groups)
    for name in constants:
        masks[name][:] = 0
    updates = {n: OutputWeights(c.new_zeros(len(c), 0), c) for n, c in constants.items()}
    return slice_model(model, groups, SlicePlan.from_masks(groups, masks), updates)


@pytest.mark.parametrize("unit", ["layers", "sublayers"])
@pytest.mark.parametrize("label_free", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_removal_is_the_best_of_all(family: str, label_free: bool, unit: str) -> None:
    model, groups, head, rows = parts(family)
    found = choose(model, groups, head, rows, Depth(**{unit: 2}), label_free=label_free)  # type: ignore[arg-type]
    teacher = model if label_free else None
    assert found.loss_before == pytest.approx(loss_of(model, head, rows, teacher), abs=1e-5)
    gone: dict[str, torch.Tensor] = {}
    for removal in found.log:
        means = (
            mean_outputs(cut(model, groups, gone), groups, head, rows)
            if not gone
            else _with(model, groups, gone, head, rows)
        )
        candidates = (
            [[g.name] for g in groups]
            if unit == "sublayers"
            else [[g.name for g in groups if g.layer == i] for i in range(3)]
        )
        candidates = [c for c in candidates if not set(c) & set(gone)]
        losses = [loss_of(cut(model, groups, gone | {n: means[n] for n in c}), head, rows, teacher) for c in candidates]
        best = min(range(len(losses)), key=losses.__getitem__)
        assert removal["groups"] == candidates[best]
        assert removal["loss"] == pytest.approx(losses[best], abs=1e-5)
        assert removal["candidates"] == len(candidates)
        gone |= {n: means[n] for n in candidates[best]}
    assert found.names == list(gone)
    assert all(torch.allclose(found.constants[n], c, atol=1e-5) for n, c in gone.items())


def _with(model: nn.Module, groups: Groups, gone: Any, head: Head, rows: list[Any]) -> dict[str, torch.Tensor]:
    """Return mean outputs where some sub-layers are bypassed, by the masked model: it has every projection."""
    masks = MaskSet.ones(groups)
    for name in gone:
        masks[name][:] = 0
    updates = {n: OutputWeights(c.new_zeros(len(c), 0), c) for n, c in gone.items()}
    masked = mask_model(model, groups, SlicePlan.from_masks(groups, masks), updates)
    return mean_outputs(masked, groups, head, rows)


@pytest.mark.parametrize("head", ["regression", "token", "qa", "embedding"])
def test_every_head_and_the_bias_as_the_stand_in(head: str) -> None:
    model, groups, kind, rows = parts("bert", head)
    free = head == "embedding"
    found = choose(model, groups, kind, rows, Depth(sublayers=1), label_free=free, means=False)
    biases = {g.name: model.get_submodule(g.consumer).bias.detach() for g in groups}
    losses = {n: loss_of(cut(model, groups, {n: b}), kind, rows, model if free else None) for n, b in biases.items()}
    assert found.names == [min(losses, key=losses.__getitem__)]
    assert found.log[0]["loss"] == pytest.approx(min(losses.values()), rel=1e-5)


def test_nothing_of_the_model_is_changed_by_the_choice() -> None:
    model, groups, head, rows = parts("distilbert")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    choose(model, groups, head, rows, Depth(1, 1))
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert not any(m._forward_hooks or "forward" in vars(m) for m in model.modules())


def test_only_the_stated_rows_are_used() -> None:
    model, groups, head, rows = parts("bert")
    few = choose(model, groups, head, rows, Depth(sublayers=2, rows=20))
    assert few.log == choose(model, groups, head, rows[:20], Depth(sublayers=2)).log
    assert few.log != choose(model, groups, head, rows, Depth(sublayers=2)).log
    assert few.record(20)["rows"] == 20


def test_what_cannot_be_left_out_is_refused() -> None:
    model, groups, head, rows = parts("bert")
    for depth in (Depth(layers=3), Depth(sublayers=6), Depth(2, 2)):
        with pytest.raises(InputError, match="leaves nothing"):
            choose(model, groups, head, rows, depth)
    with pytest.raises(InputError, match="No group L09"):
        choose(model, groups, head, rows, Depth(1), given=["L09.heads"])
    for row in rows:
        row.label = None
    with pytest.raises(InputError, match="no label"):
        choose(model, groups, head, rows, Depth(1))


@pytest.mark.parametrize(("share", "count"), [(0.34, 1), (2 / 3, 2), (0.99, 2)])
def test_a_share_is_a_number_rounded_down(share: float, count: int) -> None:
    model, groups, head, rows = parts("bert")  # three layers
    assert Depth(share).counts(groups) == (count, 0)
    assert Depth(0, share).counts(groups) == (0, 2 * count if share < 0.9 else 5)
    assert choose(model, groups, head, rows, Depth(share)).log == choose(model, groups, head, rows, Depth(count)).log


def test_a_share_of_less_than_one_is_refused() -> None:
    model, groups, head, rows = parts("bert")
    with pytest.raises(InputError, match=r"0\.3 of 3 layers is less than one"):
        choose(model, groups, head, rows, Depth(0.3))


@pytest.mark.parametrize(("given", "read"), [("2", 2), (3.0, 3), ("0.25", 0.25), ("25%", 0.25), ("0", 0), (0.5, 0.5)])
def test_recipes_take_numbers_shares_and_percentages(given: object, read: float) -> None:
    recipe = load_recipe(drop_layers=given, drop_sublayers=given)
    assert (recipe.drop_layers, type(recipe.drop_layers)) == (read, type(read))
    assert Depth.of(recipe) == Depth(read, read)


@pytest.mark.parametrize("given", ["1.5", "-1", "100%", "0%", "-0.2", "half", "nan", "inf", "1e999", True, None, [1]])
def test_recipes_refuse_other_depths(given: object) -> None:
    with pytest.raises(ValidationError, match="share in"):
        Recipe.model_validate({"drop_layers": given})


@pytest.mark.parametrize("compensate", ["refit", "mask-tuning", "none"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_widths_spend_what_the_depth_left(family: str, compensate: str) -> None:
    model, groups, head, rows = parts(family)
    options = Options(compensate=compensate, depth=Depth(layers=1, sublayers=1))
    pruner = Pruner(model, head, rows)
    made = pruner.prune(Budget(0.4), options)
    record = next(r for r in made.stages if r["name"] == "depth")
    gone = [name for removal in record["removals"] for name in removal["groups"]]
    assert len(gone) == 3
    assert {g.name for g in made.plan.groups if g.count == 0} == set(gone)
    dense = encoder_flops(groups, made.seq_len)
    spent = encoder_flops(groups, made.seq_len, made.plan)
    unit = max(dense // sum(g.size for g in groups if g.kind == kind) for kind in ("head",))
    assert 0.4 * dense - unit <= spent <= 0.4 * dense
    assert made.limits[0]["reached"] == spent
    virtual = mask_model(model, groups, made.plan, made.updates)
    sliced = slice_model(model, groups, made.plan, made.updates)
    batch = next(iter(Batches(rows, head, 0)))
    with torch.inference_mode():
        a, b = (m(**batch.inputs).logits for m in (virtual, sliced))
    assert (a - b).abs().max() <= 1e-5 * max(1.0, float(a.abs().max()))
    with pytest.raises(InfeasibleBudgetError):
        pruner.prune(Budget(0.001), options)


@pytest.mark.parametrize("head", ["classification", "token"])
@pytest.mark.parametrize("family", FAMILIES)
def test_flops_of_what_is_left_are_the_plans(family: str, head: str) -> None:
    if head not in heads_of(family):
        pytest.skip("images have no such head")
    from torch.utils.flop_counter import FlopCounterMode

    model, groups, kind, rows = parts(family, head)
    found = choose(model, groups, kind, rows, Depth(layers=1, sublayers=1))
    shallow = cut(model, groups, found.constants)
    batch = Batches(rows, kind, 0).collate([0])
    counts = []
    for m in (model, shallow):
        with (
            torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
            FlopCounterMode(display=False) as counter,
            torch.inference_mode(),
        ):
            kind.outputs(m, batch.inputs)
        counts.append(counter.get_total_flops())
    plan = SlicePlan.from_masks(groups, {g.name: [float(g.name not in found.names)] * g.size for g in groups})  # type: ignore[misc]
    tokens = batch.mask.shape[1]
    assert counts[0] - counts[1] == encoder_flops(groups, tokens) - encoder_flops(groups, tokens, plan)


def test_depth_without_a_limit_on_the_widths() -> None:
    model, _, head, rows = parts("bert")
    made = Pruner(model, head, rows).prune(Budget(1.0), Options(depth=Depth(layers=1)))
    counts = {g.name: g.count for g in made.plan.groups}
    assert sorted(counts.values()) == [0, 0, 4, 4, 24, 24]
    named = Pruner(model, head, rows).prune(Budget(1.0), Options(left_out=("L02.heads",)))
    assert {g.name for g in named.plan.groups if g.count == 0} == {"L02.heads"}
    with pytest.raises(InputError, match="paper"):
        Pruner(model, head, rows).prune(Budget(0.5), Options(search="paper", depth=Depth(layers=1)))


@pytest.mark.parametrize("family", FAMILIES)
def test_depth_of_a_model_whose_widths_are_cut(family: str) -> None:
    """The order of the literature on ViT: widths first, then depth, on the sliced model."""
    model, groups, head, rows = parts(family)
    made = Pruner(model, head, rows).prune(Budget(0.6), Options(min_heads=0, left_out=("L00.neurons",)))
    student = made.sliced
    assert student is not None
    left = [g for g in groups if made.plan[g.name].count]
    found = choose(student, left, head, rows, Depth(layers=1), teacher=model, label_free=True)
    shallow, plan = without(student, model, groups, made.plan, found)
    assert {g.name for g in plan.groups if g.count == 0} >= {*found.names, "L00.neurons"}
    assert all(plan[g.name].kept == made.plan[g.name].kept for g in groups if plan[g.name].count)
    assert loss_of(shallow, head, rows, model) == pytest.approx(found.log[-1]["loss"], abs=1e-5)
    virtual = mask_model(scatter(model, groups, plan, shallow.state_dict()), groups, plan)
    batch = next(iter(Batches(rows, head, 0)))
    with torch.inference_mode():
        a, b = (m(**batch.inputs).logits for m in (virtual, shallow))
    assert (a - b).abs().max() <= 1e-5 * max(1.0, float(a.abs().max()))
