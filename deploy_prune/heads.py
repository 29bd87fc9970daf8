"""What a model's head gives out, and the per-sample losses on it: one place for all tasks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .archs import of_transformers
from .tasks.base import HeadKind

IGNORE = -100  # label of a token that does not count


@dataclass(frozen=True)
class Head:
    """Name a head's outputs and define its loss per sample; labels are tensors of one batch.

    classification (B,) int · regression (B,) float · token (B, T) int with -100 · qa (B, 2) int ·
    embedding (B, d) float, the target vector.
    """

    kind: HeadKind
    pooling: Literal["mean", "cls"] = "mean"

    @property
    def output_names(self) -> tuple[str, ...]:
        return {"qa": ("start_logits", "end_logits"), "embedding": ("embedding",)}.get(self.kind, ("logits",))

    def outputs(self, model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run the model on inputs (B, T) and return its named outputs."""
        if not of_transformers(model):  # a plain module: its inputs have names of its own
            return self.read(model(*batch.values()), batch)
        return self.read(model(**batch), batch)

    def read(self, out: Any, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the named outputs of what a model gave for inputs (B, T)."""
        if isinstance(out, Tensor):
            return {self.output_names[0]: out}
        if self.kind == "qa":
            return {"start_logits": out.start_logits, "end_logits": out.end_logits}
        if self.kind == "embedding":
            hidden = out.last_hidden_state  # (B, T, d)
            if self.pooling == "cls":
                return {"embedding": hidden[:, 0]}
            weight = batch["attention_mask"].unsqueeze(-1).to(hidden.dtype)
            return {"embedding": (hidden * weight).sum(1) / weight.sum(1).clamp(min=1)}
        return {"logits": out.logits}

    def loss(self, outputs: Mapping[str, Tensor], labels: Tensor, mask: Tensor) -> Tensor:
        """Return the loss of each sample (B,): negative log-likelihood up to a constant.

        `mask` (B, T) is the attention mask: a span never starts or ends on padding, so that a row's loss
        does not depend on the rows beside it.
        """
        if self.kind == "classification":
            return F.cross_entropy(outputs["logits"], labels, reduction="none")
        if self.kind == "regression":
            return 0.5 * (outputs["logits"].squeeze(-1) - labels) ** 2
        if self.kind == "token":
            logits = outputs["logits"].transpose(1, 2)  # (B, C, T)
            loss = F.cross_entropy(logits, labels, reduction="none", ignore_index=IGNORE)  # (B, T)
            return loss.sum(1) / (labels != IGNORE).sum(1).clamp(min=1)
        if self.kind == "qa":
            start, end = self._spans(outputs, mask)
            start_loss = F.cross_entropy(start, labels[:, 0], reduction="none")
            end_loss = F.cross_entropy(end, labels[:, 1], reduction="none")
            return 0.5 * (start_loss + end_loss)
        return 0.5 * ((outputs["embedding"] - labels) ** 2).sum(-1)

    def distance(
        self, outputs: Mapping[str, Tensor], targets: Mapping[str, Tensor], mask: Tensor, temperature: float = 1.0
    ) -> Tensor:
        """Return how far each sample's outputs are from another model's (B,), in fp32.

        KL(targets || outputs) in nats, both softened by the temperature, times its square, so that the gradients'
        scale does not depend on it (QA: start plus end; tagging: mean over a row's tokens); half the squared error
        for regression and embeddings. `mask` (B, T) is the attention mask.

        Source: Hinton et al. 2015, Distilling the Knowledge in a Neural Network, section 2.
        """
        if self.kind in ("regression", "embedding"):
            name = self.output_names[0]
            return 0.5 * (outputs[name].float() - targets[name].float()).square().sum(-1)

        def kl(found: Tensor, wanted: Tensor) -> Tensor:
            log_q, log_p = (F.log_softmax(x.float() / temperature, dim=-1) for x in (found, wanted))
            return temperature**2 * F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)

        if self.kind == "qa":
            ends = zip(self._spans(outputs, mask), self._spans(targets, mask), strict=True)
            return torch.stack([kl(found, wanted) for found, wanted in ends]).sum(0)
        found = kl(outputs["logits"], targets["logits"])  # (B,) or (B, T)
        return (found * mask).sum(1) / mask.sum(1).clamp(min=1) if self.kind == "token" else found

    def _spans(self, outputs: Mapping[str, Tensor], mask: Tensor) -> list[Tensor]:
        low = torch.finfo(torch.float32).min
        return [outputs[name].float().masked_fill(~mask.bool(), low) for name in self.output_names]

    def draw_labels(self, outputs: Mapping[str, Tensor], mask: Tensor, generator: torch.Generator) -> Tensor:
        """Draw labels from the model's own predictive distribution (label-free Fisher).

        The noise comes from a CPU generator, so that all devices see the same draw. Regression and
        embedding heads are read as Gaussians of unit variance.
        """

        def categorical(logits: Tensor) -> Tensor:  # inverse CDF along the last axis
            u = torch.rand(logits.shape[:-1], generator=generator).to(logits.device)
            cdf = logits.float().softmax(-1).cumsum(-1)
            return (cdf < u.unsqueeze(-1) * cdf[..., -1:]).sum(-1).clamp(max=logits.shape[-1] - 1)

        if self.kind == "qa":
            return torch.stack([categorical(logits) for logits in self._spans(outputs, mask)], dim=1)
        if self.kind == "classification":
            return categorical(outputs["logits"])
        if self.kind == "token":
            return categorical(outputs["logits"]).masked_fill(~mask.bool(), IGNORE)
        mean = outputs["embedding"] if self.kind == "embedding" else outputs["logits"].squeeze(-1)
        return mean + torch.randn(mean.shape, generator=generator).to(mean)

    def collate_labels(self, labels: list[Any], length: int) -> Tensor:
        """Stack the labels of a batch; token labels are padded with -100 to `length`."""
        if self.kind == "regression":
            return torch.tensor(labels, dtype=torch.float32)
        if self.kind == "token":
            out = torch.full((len(labels), length), IGNORE, dtype=torch.long)
            for i, row in enumerate(labels):
                out[i, : len(row)] = torch.as_tensor(row)
            return out
        return torch.tensor(labels, dtype=torch.long)
