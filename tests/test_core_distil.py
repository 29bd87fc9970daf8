"""How recovery trains: images without labels, mixed precision, the optimiser and its schedule."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from models_tiny import tiny_rows
from test_core_recover import BRIEF, pair, weights_of
from torch import Tensor

from deploy_prune import recover as recovery
from deploy_prune.distil import Distillation
from deploy_prune.fidelity import fidelity
from deploy_prune.heads import Head
from deploy_prune.predict import predict
from deploy_prune.recover import recover


@pytest.mark.parametrize("family", ["vit", "deit", "dinov2"])
def test_vision_transformers_follow_on_images_without_labels(family: str) -> None:
    """A distilled DeiT has two heads, whose mean is followed: both learn."""
    teacher, student, _ = pair(family=family)
    head, started, fresh = Head("classification"), weights_of(student), tiny_rows(40, seed=9, family=family)
    wanted = predict(teacher, head, fresh)
    before = fidelity("classification", wanted, predict(student, head, fresh))["kl"]
    rows = [replace(row, label=None) for row in tiny_rows(160, family=family)]
    record = recover(student, teacher, head, rows, replace(BRIEF, epochs=4))
    assert record["kept"]
    assert record["loss_after"] < 0.8 * record["loss_before"]
    after = fidelity("classification", wanted, predict(student, head, fresh))["kl"]
    assert isinstance(before, float)
    assert isinstance(after, float)
    assert after < 0.8 * before
    heads = [name for name in started if "classifier" in name and name.endswith("weight")]
    assert len(heads) == (2 if family == "deit" else 1)
    assert not any(torch.equal(started[name], student.state_dict()[name]) for name in heads)


def test_mixed_precision_computes_in_bf16_and_keeps_fp32_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU that has it, here on the CPU."""

    class Mixed(Distillation):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            assert self.dtype == torch.float32  # a CPU's own
            self.dtype = torch.bfloat16

    monkeypatch.setattr(recovery, "Distillation", Mixed)
    teacher, student, _ = pair()
    seen: list[torch.dtype] = []
    for model in (teacher, student):
        linear = model.get_submodule("bert.encoder.layer.0.attention.self.query")
        linear.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    record = recover(student, teacher, Head("classification"), tiny_rows(160), BRIEF)
    assert record["precision"] == "bf16"
    assert set(seen) == {torch.bfloat16}
    assert record["kept"]
    assert record["loss_after"] < 0.8 * record["loss_before"]
    assert {p.dtype for p in student.parameters()} == {torch.float32}


def test_adamw_follows_a_cosine_after_a_tenth_of_warming_up(monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[float] = []
    optimizers: list[Any] = []

    class Watched(recovery.DistilTrainer):
        def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
            assert self.optimizer is not None
            rates.append(self.optimizer.param_groups[0]["lr"])
            optimizers.append(getattr(self.optimizer, "optimizer", self.optimizer))
            return super().training_step(*args, **kwargs)

    monkeypatch.setattr(recovery, "DistilTrainer", Watched)
    teacher, student, _ = pair()
    record = recover(student, teacher, Head("classification"), tiny_rows(96), replace(BRIEF, epochs=10))
    steps = record["planned_steps"]
    assert steps == 30
    assert len(rates) == record["steps"] >= 15  # it may end before
    warm = steps // 10
    wanted = [n / warm if n < warm else (1 + math.cos(math.pi * (n - warm) / (steps - warm))) / 2 for n in range(steps)]
    assert rates == pytest.approx([BRIEF.lr * share for share in wanted[: len(rates)]])
    assert type(optimizers[0]) is torch.optim.AdamW
    assert {group["weight_decay"] for group in optimizers[0].param_groups} == {0.0}
