"""The three models that every comparison is about: dense, virtual (masked) and sliced."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from .heads import Head
from .masking import OutputWeights, Updates
from .signature import Signature
from .surgery import Surgery
from .units import SlicePlan


@dataclass
class Variants:
    """Hold the three models on the CPU, and what they were made by."""

    dense: nn.Module
    virtual: nn.Module
    sliced: nn.Module
    surgery: Surgery
    plan: SlicePlan
    refitted: list[str]
    recovered: bool = False

    def items(self) -> dict[str, nn.Module]:
        return {"dense": self.dense, "virtual": self.virtual, "sliced": self.sliced}


def make_variants(
    surgery: Surgery, plan: SlicePlan, updates: Updates | None = None, recovered: nn.Module | None = None
) -> Variants:
    """Mask and slice a dense model by a plan; all three end up on the CPU.

    `recovered` is a sliced model that was trained: its weights stand for all that the plan and `updates` say.
    """
    model, updates = surgery.model.cpu(), updates or {}
    if recovered is not None:
        plan, sliced = plan.folded(), recovered.cpu()
        virtual = surgery.restore(plan, sliced.state_dict())
        return Variants(model, virtual, sliced, surgery, plan, sorted(updates), recovered=True)
    on_cpu = {name: OutputWeights(u.weight.cpu(), u.bias.cpu()) for name, u in updates.items()}
    virtual, sliced = surgery.mask(plan, on_cpu), surgery.slice(plan, on_cpu)
    return Variants(model, virtual, sliced, surgery, plan, sorted(on_cpu))


def count_variants(variants: Variants, head: Head, seq_len: int, signature: Signature) -> dict[str, dict[str, int]]:
    """Count FLOPs by the formula and check them against the models that run."""
    from .runtime_bench.flops import count_torch

    dtype = torch.float32 if signature.image else torch.long
    feeds = {name: torch.ones(shape, dtype=dtype) for name, shape in signature.shapes(1, seq_len).items()}
    plans: dict[str, SlicePlan | None] = {"dense": None, "virtual": None, "sliced": variants.plan}
    params = {name: sum(p.numel() for p in model.parameters()) for name, model in variants.items().items()}
    expected = params["dense"] - variants.surgery.removed_params(variants.plan)
    if params["sliced"] != expected:
        raise RuntimeError(f"The sliced model has {params['sliced']} parameters, the plan says {expected}")
    counts: dict[str, dict[str, int]] = {}
    for name, model in variants.items().items():
        counted = count_torch(_WithHead(model, head), feeds)
        encoder = variants.surgery.flops(seq_len, plans[name])
        counts[name] = {
            "flops": counted,
            "encoder_flops": encoder,
            "params": params[name],
            "weight_bytes": 4 * params[name],
        }
        if counted - encoder != counts["dense"]["flops"] - counts["dense"]["encoder_flops"]:
            raise RuntimeError(f"{name}: {counted} FLOPs counted, the formula's encoder has {encoder}")
    return counts


class _WithHead(nn.Module):
    def __init__(self, model: nn.Module, head: Head) -> None:
        super().__init__()
        self.model, self.head = model, head

    def forward(self, **inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(self.head.outputs(self.model, inputs).values())
