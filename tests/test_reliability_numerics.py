"""Numbers that break things: NaN and Inf, dead and constant units, singular moments. Handled or refused by name."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from conv_tiny import tiny_cnn, tiny_images
from models_tiny import tiny_model, tiny_rows

import deploy_prune
from deploy_prune.archs import arch_of
from deploy_prune.calibration import calibrate, check_finite
from deploy_prune.criteria import criteria
from deploy_prune.errors import InputError
from deploy_prune.fidelity import fidelity
from deploy_prune.heads import Head
from deploy_prune.predict import predict
from deploy_prune.stages import Options
from deploy_prune.tasks.base import Row

HEAD = Head("classification")
KINDS = ("bert", "basic")  # heads and neurons, channels


def model_of(kind: str) -> Any:
    return tiny_model("bert") if kind == "bert" else tiny_cnn("basic")


def rows_of(kind: str, count: int = 96) -> list[Row]:
    if kind == "bert":
        return tiny_rows(count)
    rng, images = np.random.default_rng(0), tiny_images("basic", count).numpy()
    return [Row({"pixel_values": image}, int(rng.integers(4)), tokens=1) for image in images]


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("criterion", ["obs", "fisher", "magnitude", "random"])
@pytest.mark.parametrize("kind", KINDS)
def test_broken_weights_are_refused(kind: str, criterion: str, value: float) -> None:
    model = model_of(kind)
    name, weight = list(model.named_parameters())[-5]
    with torch.no_grad():
        weight.view(-1)[0] = value
    with pytest.raises(InputError, match=f"{re.escape(name)} hold NaN or Inf"):
        deploy_prune.prune(
            model, rows_of(kind), 0.8, options=Options(criterion=criterion, compensate="none", rearrange="none")
        )


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_broken_pixels_are_refused(value: float) -> None:
    rows = rows_of("basic")
    rows[40].features["pixel_values"][0, 3, 3] = value
    with pytest.raises(InputError, match="NaN or Inf"):
        deploy_prune.prune(tiny_cnn("basic"), rows, 0.8)


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e30])
def test_broken_labels_are_refused(value: float) -> None:
    rows = tiny_rows(96, "regression")
    rows[7].label = value
    with pytest.raises(InputError, match="NaN or Inf"):
        deploy_prune.prune(tiny_model("bert", "regression"), rows, 0.5)


@pytest.mark.parametrize("field", ["gradients", "saliency", "activation_squares", "gradient_moments", "mean_loss"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_every_statistic_is_checked(field: str, value: float) -> None:
    model = tiny_model("bert")
    stats = calibrate(model, arch_of(model).groups(model), HEAD, tiny_rows(32), gradient_moments=True)
    check_finite(stats)
    if field == "mean_loss":
        stats.mean_loss.fill_(value)
    else:
        getattr(stats, field)["L01.heads"].view(-1)[-1] = value
    with pytest.raises(InputError, match="mean loss" if field == "mean_loss" else r"L01\.heads"):
        check_finite(stats)


def test_a_model_whose_output_is_constant_is_refused() -> None:
    """No unit matters to it, and any plan would agree with it on every row."""
    model = tiny_model("bert")
    with torch.no_grad():
        model.classifier.weight.zero_()
    with pytest.raises(InputError, match="All mask gradients are 0"):
        deploy_prune.prune(model, tiny_rows(96), 0.5)


def dead_head(model: Any) -> None:
    """Let head 2 of layer 1 give 0: its part of the Gram matrix is zero."""
    value = model.bert.encoder.layer[1].attention.self.value
    value.weight[16:24] = 0
    value.bias[16:24] = 0


def dead_attention(model: Any) -> None:
    """Let all heads of layer 1 give 0: the whole Gram matrix is zero."""
    value = model.bert.encoder.layer[1].attention.self.value
    value.weight.zero_()
    value.bias.zero_()


def constant_neurons(model: Any) -> None:
    """Let half of layer 0's neurons be constants, which the centred Gram matrix does not see."""
    model.bert.encoder.layer[0].intermediate.dense.weight[:12] = 0


def twins(model: Any) -> None:
    """Let layer 2's neurons be copies of six, so that the Gram matrix has rank 6."""
    dense = model.bert.encoder.layer[2].intermediate.dense
    dense.weight.copy_(dense.weight[:6].repeat(4, 1))
    dense.bias.copy_(dense.bias[:6].repeat(4))


@pytest.mark.parametrize("compensate", ["refit", "refit-parallel", "mask-tuning"])
@pytest.mark.parametrize("harm", [dead_head, dead_attention, constant_neurons, twins])
def test_dead_and_dependent_units_do_no_harm(harm: Callable[[Any], None], compensate: str) -> None:
    model, rows = tiny_model("bert"), tiny_rows(128)
    with torch.no_grad():
        harm(model)
    found = deploy_prune.prune(model, rows, 0.6, options=Options(compensate=compensate))
    small = deploy_prune.slice_model(model, found)
    assert all(bool(torch.isfinite(p).all()) for p in small.parameters())
    outputs = predict(small, HEAD, tiny_rows(64, seed=9))  # raises for NaN and Inf
    close = fidelity("classification", predict(model, HEAD, tiny_rows(64, seed=9)), outputs)
    whole = tiny_model("bert")
    plan = deploy_prune.prune(whole, rows, 0.6, options=Options(compensate=compensate))
    usual = fidelity(
        "classification",
        predict(whole, HEAD, tiny_rows(64, seed=9)),
        predict(deploy_prune.slice_model(whole, plan), HEAD, tiny_rows(64, seed=9)),
    )
    assert close["kl"] is not None
    assert usual["kl"] is not None
    assert close["kl"] <= 2 * usual["kl"] + 0.05  # not much worse than a model without harm


@pytest.mark.parametrize("criterion", ["obs", "fisher", "taylor", "activation", "activation-weight"])
def test_a_dead_head_is_the_first_to_go(criterion: str) -> None:
    model = tiny_model("bert")
    with torch.no_grad():
        dead_head(model)
    options = Options(criterion=criterion, rearrange="none", min_neurons=24)
    kept = deploy_prune.prune(model, tiny_rows(128), 0.95, options=options).plan["L01.heads"].kept
    assert 2 not in kept


@pytest.mark.parametrize("criterion", [name for name in criteria() if name != "random"])
def test_scores_of_dead_units_are_finite(criterion: str) -> None:
    model = tiny_model("bert")
    with torch.no_grad():
        dead_attention(model)
        constant_neurons(model)
        twins(model)
    found = deploy_prune.prune(
        model, tiny_rows(96), 0.6, options=Options(criterion=criterion, compensate="none", rearrange="none")
    )
    assert sum(g.count for g in found.plan.groups) > 0


@pytest.mark.parametrize("compensate", ["refit", "fold", "none"])
def test_dead_and_constant_channels_do_no_harm(compensate: str) -> None:
    model, rows = tiny_cnn("basic"), rows_of("basic")
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    with torch.no_grad():
        for norm in norms[::2]:  # a channel that is 0, and one that is a constant
            norm.weight[:2] = 0
            norm.bias[:2] = torch.tensor([0.0, 0.7])
    found = deploy_prune.prune(model, rows, 0.8, options=Options(compensate=compensate, label_free=True))
    small = deploy_prune.slice_model(model, found)
    assert all(bool(torch.isfinite(t).all()) for t in small.state_dict().values())
    close = fidelity("classification", predict(model, HEAD, rows), predict(small, HEAD, rows))
    assert close["agreement"] is not None
    assert close["agreement"] >= 0.5
