"""Recovery of convolutional networks: the states that it follows, and that the student learns."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conv_tiny import tiny_cnn, tiny_images
from torch import nn

from deploy_prune.distil import Weights, shared_states
from deploy_prune.fidelity import fidelity
from deploy_prune.heads import Head
from deploy_prune.predict import predict
from deploy_prune.recover import Recovery, recover
from deploy_prune.surgery import surgery_of
from deploy_prune.tasks.base import Row
from deploy_prune.units import MaskSet, SlicePlan

HEAD = Head("classification")
BRIEF = Recovery(epochs=5, lr=3e-3)
BLOCKS = ["layer1.0", "layer1", "layer2.0.downsample", "layer2.0", "layer2"]


def rows(family: str, count: int, seed: int = 0) -> list[Row]:
    return [Row({"pixel_values": x}, None, tokens=1) for x in tiny_images(family, count, seed).numpy()]


def pair(family: str, residual: bool) -> tuple[nn.Module, nn.Module]:
    """Return a network and one that lost half of every group's channels."""
    teacher = tiny_cnn(family)
    surgery = surgery_of(teacher, tuple(tiny_images(family).shape[1:]), residual=residual)
    masks = MaskSet.ones(surgery.groups)
    for g in surgery.groups:
        masks[g.name][: g.size // 2] = 0
    return teacher, surgery.slice(SlicePlan.from_masks(surgery.groups, masks), {})


@pytest.mark.parametrize(
    ("family", "residual", "states"), [("basic", False, BLOCKS), ("basic", True, []), ("vgg", False, [])]
)
def test_a_student_follows_the_outputs_and_the_states_that_are_whole(
    family: str, residual: bool, states: list[str]
) -> None:
    teacher, student = pair(family, residual)
    fresh = rows(family, 60, seed=9)
    wanted = predict(teacher, HEAD, fresh)
    before = fidelity("classification", wanted, predict(student, HEAD, fresh))
    record = recover(student, teacher, HEAD, rows(family, 320), BRIEF)
    after = fidelity("classification", wanted, predict(student, HEAD, fresh))
    assert record["states"] == states
    assert record["kept"]
    assert record["loss_after"] < 0.7 * record["loss_before"]
    assert after["kl"] < 0.7 * before["kl"]


def test_states_that_are_followed_come_nearer() -> None:
    """The weight of the hidden states reaches the blocks' outputs, though the logits alone would not ask for them."""
    errors = []
    for hidden in (0.0, 10.0):
        teacher, student = pair("basic", False)
        recover(student, teacher, HEAD, rows("basic", 320), replace(BRIEF, weights=Weights(hidden=hidden)))
        x = tiny_images("basic", 40, seed=9)
        with torch.inference_mode():
            found, wanted = (nn.Sequential(*list(m.children())[:5])(x) for m in (student, teacher))
        errors.append(float((found - wanted).square().mean()))
    assert errors[1] < 0.8 * errors[0]


def test_a_tensor_that_several_modules_hand_on_is_one_state() -> None:
    teacher, student = pair("basic", False)
    assert shared_states(student, teacher, HEAD, {"pixel_values": tiny_images("basic")}) == BLOCKS
    assert all(not module._forward_hooks for model in (teacher, student) for module in model.modules())
