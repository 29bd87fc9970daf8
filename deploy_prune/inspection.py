"""What `inspect` shows of a bundle. No torch here."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from .bundle import Bundle
from .lengths import kept_line, lengths_line
from .screen import out
from .signature import Signature

NOTED = ("samples", "method", "criterion", "skipped", "epochs", "loss_before", "loss_after", "kept")


def describe(bundle: Bundle) -> dict[str, Any]:
    """Return the manifest as plain values, with the bundle's folder."""
    return {"bundle": str(bundle.root), **bundle.manifest.model_dump()}


def print_bundle(bundle: Bundle) -> None:
    """Print the plan per layer, the costs, the artifacts and the stages."""
    manifest = bundle.manifest
    out.print(f"[bold]{bundle.root}[/]  schema {manifest.schema_version}", highlight=False)
    model, task, budget = manifest.model, manifest.task, manifest.budget
    takes = Signature.of_manifest(model)
    over = "over the data's lengths" if "lengths" in budget else f"at {takes.length(budget.get('seq_len'))}"
    out.print(f"{model.get('architecture')} from {model.get('source')}", highlight=False, soft_wrap=True)
    out.print(
        f"task {task.get('name')}, {budget.get('kind')} budget, keep {budget.get('keep'):.4g}"
        f" {over}, plan {manifest.plan.get('hash', '')[:12]}",
        highlight=False,
    )

    for limit in budget.get("limits", []):
        share = limit["reached"] / limit["dense"]
        out.print(
            f"{limit['kind']}: {limit['reached']:,.6g} of at most {limit['limit']:,.6g}, {share:.4f} of dense",
            highlight=False,
        )

    if "lengths" in budget:
        out.print(f"over {lengths_line(budget['lengths'])}", highlight=False, soft_wrap=True)
        out.print(kept_line(budget["kept_flops"]), highlight=False, soft_wrap=True)

    kinds = list(dict.fromkeys(kind for layer in manifest.plan["total"] for kind in layer))
    plan = Table("layer", *kinds, title="Kept units", title_justify="left")
    for number, (kept, total) in enumerate(zip(manifest.plan["layers"], manifest.plan["total"], strict=True)):
        plan.add_row(str(number), *(f"{kept[k]} of {total[k]}" for k in kinds))
    out.print(plan)

    costs = Table("", "FLOPs", f"{takes.part} FLOPs", "parameters", "weight bytes", "quality", title="Variants")
    costs.title_justify = "left"
    for name, counts in manifest.counts.items():
        quality = manifest.quality.get(name, {})
        value = quality.get("value")
        shown = "-" if value is None else f"{quality['metric']} {value:.4f} (n={quality['n']})"
        costs.add_row(name, *(f"{counts[k]:,}" for k in ("flops", "encoder_flops", "params", "weight_bytes")), shown)
    out.print(costs)

    artifacts = Table("variant", "artifact", "MB", "parity", "quality", title="Artifacts", title_justify="left")
    for a in manifest.artifacts:
        difference = "" if a.parity.max_abs is None else f" {a.parity.max_abs:.1e}"
        megabytes = f"{bundle.artifact_bytes(a) / 1e6:.1f}"
        artifacts.add_row(
            a.variant, f"{a.label}\n[dim]{a.path}[/]", megabytes, f"{a.parity.status}{difference}", a.quality_text()
        )
    if manifest.artifacts:
        out.print(artifacts)

    stages = Table("stage", "seconds", "notes", title="Stages", title_justify="left")
    for stage in manifest.stages:
        values = stage.model_dump()
        declined = values.get("declined") or []
        notes = [f"{k} {v}" for k, v in values.items() if k in NOTED]
        notes += [f"declined {d['group']}: {d['reason']}" for d in declined]
        stages.add_row(stage.name, f"{stage.seconds:.1f}", ", ".join(notes))
    out.print(stages)
