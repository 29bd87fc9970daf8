"""Turn docs/results/*.json into the tables of docs/results.md, between its markers.

python recipes/experiments/tables.py
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Any

import typer

from deploy_prune.bundle import Bundle
from deploy_prune.disk import write_atomically
from deploy_prune.experiments.report import as_markdown
from deploy_prune.runtime_bench.report import summary_rows
from deploy_prune.runtime_bench.results import latest_bench

DOCS = Path(__file__).resolve().parents[2] / "docs"


def demo_table(path: Path) -> str:
    """Return the closing table of a run, from its summary."""
    document = json.loads(path.read_text("utf-8"))
    rows, machine = document["summary"], document["machine"]
    lines = [
        f"Budget at {document['seq_len']} tokens; {machine['cpu']},"
        f" {machine['threads']} threads, load {machine['load_1min']:.1f}.",
        "",
        "| | " + " | ".join(r["variant"] for r in rows) + " |",
        "|---|" + "---|" * len(rows),
    ]

    def line(name: str, cells: list[str]) -> None:
        lines.append(f"| {name} | " + " | ".join(cells) + " |")

    for key in ("flops", "encoder_flops", "params", "weight_bytes"):
        line(key, [f"{r[key]:,}" for r in rows])
    for number, speed in enumerate(rows[0]["runtimes"]):
        where = f"{speed['runtime']} {speed['batch']}x{speed['seq']}"
        speeds = [r["runtimes"][number] for r in rows]
        line(f"{where}, median ms", [f"{s['median_ms']:.2f}" for s in speeds])
        ratios = [s["ratio"] for s in speeds]
        line(f"{where}, ratio to dense", [f"{r['value']:.2f} [{r['low']:.2f}, {r['high']:.2f}]" for r in ratios])
        line(f"{where}, peak RSS MB", [f"{s['peak_rss_bytes'] / 1e6:.0f}" for s in speeds])
    line(f"{rows[0]['metric']} (n={rows[0]['n']})", [f"{r['value']:.4f}" for r in rows])
    for key in ("agreement", "kl"):
        line(key, ["-" if r[key] is None else f"{r[key]:.4f}" for r in rows])
    return "\n".join(lines)


def bench_table(path: Path) -> str:
    """Return the stages' seconds of benchmarks/prune.py."""
    document = json.loads(path.read_text("utf-8"))
    results, machine = document["results"], document["machine"]
    reference, default = results["reference"], results["default"]
    lines = [
        f"{document['model']}, {document['samples']} samples of {document['length']} tokens, keep {document['keep']:g};"
        f" {machine['cpu']}, {machine['threads']} threads. The reference's tuning: {reference['lsmr_iterations']} LSMR"
        f" iterations, {reference['tuning_flops']:.1e} FLOPs.",
        "",
        "| seconds | " + " | ".join(results) + " | reference / default |",
        "|---|" + "---|" * (len(results) + 1),
    ]

    def line(name: str, values: list[float], digits: int) -> None:
        ratio = f"{values[-1] / values[0]:.2f}" if values[0] and values[-1] else "-"
        lines.append(f"| {name} | " + " | ".join(f"{v:.{digits}f}" for v in values) + f" | {ratio} |")

    for stage in dict.fromkeys([*default["seconds"], *reference["seconds"]]):
        line(stage, [r["seconds"].get(stage, 0.0) for r in results.values()], 2)
    line("total", [r["total"] for r in results.values()], 1)
    line("memory, +MB", [r["peak_growth_bytes"] / 1e6 for r in results.values()], 0)
    return "\n".join(lines)


def keep_summary(folder: Path) -> None:
    """Store a bundle's summary and machine as docs/results/demo.json."""
    bundle = Bundle.open(folder)
    bench = latest_bench(bundle)
    document = {
        "seq_len": bundle.manifest.budget["seq_len"],
        "machine": bench["machine"],
        "stages": [{"name": s.name, "seconds": s.seconds} for s in bundle.manifest.stages],
        "summary": summary_rows(bundle),
    }
    write_atomically(DOCS / "results" / "demo.json", json.dumps(document, indent=1) + "\n")


def keep_precisions(folder: Path) -> None:
    """Store the sizes and qualities of a bundle's files as docs/results/NAME-precisions.json."""
    bundle = Bundle.open(folder)
    manifest = bundle.manifest
    name = Path(manifest.model["name"]).name
    rows = [
        {
            "variant": a.variant,
            "file": a.label,
            "bytes": bundle.artifact_bytes(a),
            "parity": a.parity.model_dump(),
            "quality": a.quality or ({**manifest.quality[a.variant]} if a.parity.status == "passed" else None),
        }
        for a in manifest.artifacts
        if a.variant != "virtual"
    ]
    document = {"model": name, "keep": manifest.budget["keep"], "versions": manifest.versions, "rows": rows}
    write_atomically(DOCS / "results" / f"{name}-precisions.json", json.dumps(document, indent=1) + "\n")


def precisions_table(path: Path) -> str:
    """Return size, quality and agreement with fp32 of every file."""
    document = json.loads(path.read_text("utf-8"))
    lines = [
        f"{document['model']}, {document['keep']:g} of the encoder's FLOPs kept.",
        "",
        "| variant | file | MB | parity, max abs | quality | agreement with fp32 | KL to fp32 |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in document["rows"]:
        parity, quality = row["parity"], row["quality"] or {}
        worst = "not run here" if parity["max_abs"] is None else f"{parity['max_abs']:.1e}"
        value = f"{quality['value']:.4f}" if quality.get("value") is not None else "-"
        near = quality.get("to_fp32", {})
        shown = [f"{near[key]:.4f}" if near.get(key) is not None else "-" for key in ("agreement", "kl")]
        lines.append(
            f"| {row['variant']} | {row['file']} | {row['bytes'] / 1e6:.1f} | {worst} | {value} | {' | '.join(shown)} |"
        )
    return "\n".join(lines)


def shapes_table(path: Path) -> str:
    """Return for every cell the ratios of latency to dense beside those of FLOPs, by shapes.py."""
    document = json.loads(path.read_text("utf-8"))
    cells, machine = document["cells"], document["machine"]
    keeps = [name.removesuffix(" fp32") for name in cells[0]["models"] if name.endswith(" fp32")]
    head = ["runtime", "batch x tokens", "dense ms", "noise", "virtual", "dense int8"]
    head += [f"{keep}: {what}" for keep in keeps for what in ("FLOPs", "fp32", "int8")]
    lines = [
        f"{document['shape']}; {machine['cpu']}, {' '.join(machine['cpu_flags'])}, {cells[0]['threads']} threads;"
        f" onnxruntime {machine['versions'].get('onnxruntime')}, openvino {machine['versions'].get('openvino')},"
        f" torch {machine['versions'].get('torch')}.",
        "",
        f"| {' | '.join(head)} |",
        "|---|" + "---|" * (len(head) - 1),
    ]
    for cell in sorted(cells, key=lambda c: (c["runtime"], c["batch"], c["seq"])):
        models = cell["models"]

        def ratio(name: str, models: dict[str, Any] = models) -> str:
            return f"{models[name]['ratio']['value']:.3f}" if name in models else "-"

        dense = models["dense"]
        row = [cell["runtime"], f"{cell['batch']} x {cell['seq']}", f"{dense['latency_ms']['median']:.1f}"]
        row += [
            "-" if cell["noise_floor"] is None else f"{cell['noise_floor']:.3f}",
            ratio("virtual"),
            ratio("dense:int8"),
        ]
        for keep in keeps:
            share = models[f"{keep} fp32"]["flops"] / dense["flops"] if f"{keep} fp32" in models else None
            row += ["-" if share is None else f"{share:.3f}", ratio(f"{keep} fp32"), ratio(f"{keep} int8")]
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


TABLES = {"shapes": shapes_table, "precisions": precisions_table, "demo": demo_table, "bench": bench_table}


def main(
    demo: Annotated[Path | None, typer.Option(help="Bundle to take the demo's figures from.")] = None,
    precisions: Annotated[Path | None, typer.Option(help="Bundle to take the files' figures from.")] = None,
) -> None:
    """Rewrite the tables in place."""
    if demo:
        keep_summary(demo)
    if precisions:
        keep_precisions(precisions)
    path = DOCS / "results.md"
    text = path.read_text("utf-8")
    for source in sorted((DOCS / "results").glob("*.json")):
        document, table = json.loads(source.read_text("utf-8")), TABLES.get(source.stem.split("-")[-1])
        if "experiment" not in document and table is None:
            continue  # the text of a page has its figures
        begin, end = f"<!-- {source.stem} -->", f"<!-- /{source.stem} -->"
        if begin not in text:
            raise SystemExit(f"{path} has no place for {source.name}: add {begin} and {end}")
        made = table(source) if table is not None else as_markdown(document).rstrip()
        text = re.sub(f"{begin}.*?{end}", lambda _, whole=f"{begin}\n{made}\n{end}": whole, text, flags=re.S)
    path.write_text(text, "utf-8")


if __name__ == "__main__":
    typer.run(main)
