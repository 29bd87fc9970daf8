"""Mask gradients: equal to autograd one sample at a time, for every head; the sample; the criteria."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from models_tiny import FAMILIES, heads_of, tiny_model, tiny_rows

from deploy_prune.archs import arch_of
from deploy_prune.batches import Batches
from deploy_prune.calibration import calibrate, check_finite, hash_rows, sample_indices
from deploy_prune.criteria import Evidence, get_criterion
from deploy_prune.errors import InputError
from deploy_prune.heads import Head
from deploy_prune.layerwise import Taps
from deploy_prune.tasks.base import HeadKind

KINDS: tuple[HeadKind, ...] = ("classification", "regression", "token", "qa")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_autograd_one_sample_at_a_time(kind: HeadKind, family: str) -> None:
    if kind not in heads_of(family):
        pytest.skip(f"{family} models have no such head here")
    model = tiny_model(family, kind).double()  # rounding of the model itself is not what is tested
    groups, head, rows = arch_of(model).groups(model), Head(kind), tiny_rows(12, kind, family=family)
    found = calibrate(model, groups, head, rows, pad_id=1).gradients
    for index, row in enumerate(rows):
        batch = Batches([row], head, 1).collate([0])  # alone, without padding
        masks = {g.name: torch.ones(g.size, requires_grad=True) for g in groups}
        handles = [
            model.get_submodule(g.consumer).register_forward_pre_hook(
                lambda module, args, mask=masks[g.name], width=g.width: (args[0] * mask.repeat_interleave(width),)
            )
            for g in groups
        ]
        outputs = {k: v.float() for k, v in head.outputs(model, batch.inputs).items()}
        loss = head.loss(outputs, batch.labels, batch.mask)
        expected = torch.autograd.grad(loss.sum(), list(masks.values()))
        for handle in handles:
            handle.remove()
        for g, grad in zip(groups, expected, strict=True):
            assert torch.allclose(found[g.name][index], grad, rtol=1e-4, atol=2e-6 * max(1.0, float(grad.abs().max())))


@pytest.mark.parametrize("family", FAMILIES)
def test_saliency_is_the_squared_gradient_at_every_token(family: str) -> None:
    model = tiny_model(family).double()
    groups, head, rows = arch_of(model).groups(model), Head("classification"), tiny_rows(12, family=family)
    found = calibrate(model, groups, head, rows, pad_id=1).saliency
    for index, row in enumerate(rows):
        batch = Batches([row], head, 1).collate([0])
        with Taps({g.name: model.get_submodule(g.consumer) for g in groups}) as taps:
            outputs = {k: v.float() for k, v in head.outputs(model, batch.inputs).items()}
        loss = head.loss(outputs, batch.labels, batch.mask).sum()
        seen = [taps.outputs[g.name] for g in groups]
        for g, grad in zip(groups, torch.autograd.grad(loss, seen), strict=True):
            expected = grad[0].square().sum(-1).float()
            assert torch.allclose(found[g.name][index, : row.length], expected, rtol=1e-3, atol=1e-12)
            assert not found[g.name][index, row.length :].any()


def test_fisher_of_samples_and_of_batches() -> None:
    model = tiny_model("bert")
    groups, rows = arch_of(model).groups(model), tiny_rows(70)
    stats = calibrate(model, groups, Head("classification"), rows)
    given = Evidence(model, groups, stats=stats)
    for g in groups:
        grads = stats.gradients[g.name].double().numpy()
        assert get_criterion("fisher")(given)[g.name] == pytest.approx((grads**2).mean(0))
        batches = [grads[i : i + 32].mean(0) for i in range(0, 70, 32)]
        assert get_criterion("fisher-batch")(given)[g.name] == pytest.approx(np.square(batches).sum(0))
    assert int(stats.tokens) == sum(r.length for r in rows)


@pytest.mark.parametrize("kind", [*KINDS, "embedding"])
def test_label_free_needs_no_labels_and_repeats(kind: HeadKind) -> None:
    model = tiny_model("bert", kind)
    groups, rows = arch_of(model).groups(model), tiny_rows(40, kind)
    for row in rows:
        row.label = None
    first, second = (calibrate(model, groups, Head(kind), rows, label_free=True, seed=3) for _ in range(2))
    other = calibrate(model, groups, Head(kind), rows, label_free=True, seed=4)
    for name, grad in first.gradients.items():
        assert torch.equal(grad, second.gradients[name])
        assert not torch.equal(grad, other.gradients[name])
        assert grad.abs().max() > 0
    with pytest.raises(InputError, match="no label"):
        calibrate(model, groups, Head(kind), rows)


def test_drawn_labels_follow_the_model() -> None:
    logits = torch.tensor([[2.0, 0.0, -1.0]]).repeat(20_000, 1)
    drawn = Head("classification").draw_labels(
        {"logits": logits}, torch.ones(20_000, 1), torch.Generator().manual_seed(0)
    )
    shares = torch.bincount(drawn, minlength=3) / 20_000
    assert torch.allclose(shares, logits[0].softmax(-1), atol=0.015)


def test_drawn_spans_stay_inside_the_row() -> None:
    mask = torch.tensor([[1, 1, 1, 0, 0]]).repeat(500, 1)
    outputs = {"start_logits": torch.zeros(500, 5), "end_logits": torch.zeros(500, 5)}
    drawn = Head("qa").draw_labels(outputs, mask, torch.Generator().manual_seed(0))
    assert set(drawn.unique().tolist()) == {0, 1, 2}


def test_nan_gradients_are_refused_by_name() -> None:
    model = tiny_model("bert")
    groups, rows = arch_of(model).groups(model), tiny_rows(32)
    stats = calibrate(model, groups, Head("classification"), rows)
    stats.gradients["L01.neurons"][3, 2] = float("nan")
    with pytest.raises(InputError, match=r"L01\.neurons"):
        check_finite(stats)


def test_sample_is_without_replacement_and_seeded() -> None:
    drawn = sample_indices(100, 60, seed=5)
    assert len(set(drawn)) == 60
    assert drawn == sample_indices(100, 60, seed=5) != sample_indices(100, 60, seed=6)
    assert sorted(sample_indices(50, 2048, seed=0)) == list(range(50))


def test_chunks_do_not_depend_on_the_order_of_equal_rows() -> None:
    rows = tiny_rows(50)
    batches = Batches(rows, Head("classification"), 0)
    lengths = [max(rows[i].length for i in chunk) for chunk in batches.chunks]
    assert lengths == sorted(lengths, reverse=True)
    assert sorted(i for chunk in batches.chunks for i in chunk) == list(range(50))
    assert hash_rows(rows) != hash_rows(rows[::-1])


def test_unknown_criterion_lists_the_known() -> None:
    with pytest.raises(InputError, match="psychic") as caught:
        get_criterion("psychic")
    assert "fisher" in caught.value.hint


def test_the_model_is_left_as_it_was() -> None:
    model = tiny_model("bert")
    frozen = next(model.parameters()).requires_grad_(False)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    calibrate(model, arch_of(model).groups(model), Head("classification"), tiny_rows(32))
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert [p.requires_grad for p in model.parameters()] == [p is not frozen for p in model.parameters()]
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_a_calibration_that_fails_leaves_the_parameters_trainable() -> None:
    """Regression: rows without labels once left the model frozen."""
    model, rows = tiny_model("bert"), tiny_rows(4)
    unlabelled = [replace(row, label=None) for row in rows]
    with pytest.raises(InputError, match="no label"):
        calibrate(model, arch_of(model).groups(model), Head("classification"), unlabelled)
    assert all(p.requires_grad for p in model.parameters())
