"""Tell what a bundle holds: as a page (report.html), as Markdown, as the rows of the closing table. No torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from ..bundle import VARIANTS, Bundle
from ..disk import disk_errors, sha256_file, write_atomically
from ..lengths import kept_line, lengths_line
from ..signature import Signature
from . import figures
from .results import BASELINE, latest_bench, place_title, sensed_line, stored_runs

REPORT = "report.html"
TEXTS = Signature(("input_ids",))  # what a model takes that says nothing of it


def summary_rows(bundle: Bundle) -> list[dict[str, Any]]:
    """Return one row per variant: costs, speed and memory per runtime, quality and fidelity.

    Keys: variant, flops, encoder_flops, params, weight_bytes, keep_flops (share of the dense encoder's),
    runtimes [{runtime, provider, batch, seq, threads, median_ms, p95_ms, ratio to dense {value, low, high},
    cpu_ratio {...}, difference, peak_rss_bytes}], metric, value, n, agreement, kl (nats), rmse, cosine.
    What was not measured is None.
    """
    manifest = bundle.manifest
    measured = latest_bench(bundle)["measurements"]
    dense_flops = manifest.counts.get("dense", {}).get("encoder_flops")
    rows = []
    for variant in VARIANTS:
        counts = manifest.counts.get(variant, {})
        quality = manifest.quality.get(variant, {})
        fidelity = manifest.fidelity if variant == "sliced" else manifest.fidelity.get(variant) or {}
        encoder = counts.get("encoder_flops")
        rows.append(
            {
                "variant": variant,
                **{key: counts.get(key) for key in ("flops", "encoder_flops", "params", "weight_bytes")},
                "keep_flops": encoder / dense_flops if encoder is not None and dense_flops else None,
                "runtimes": [_speed(m) for m in _first_cells(measured) if m["model"] == variant],
                **{key: quality.get(key) for key in ("metric", "value", "n")},
                **{key: fidelity.get(key) for key in ("agreement", "kl", "rmse", "cosine")},
            }
        )
    return rows


def _first_cells(measurements: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Keep the measurements of each runtime's first shape: the variants must come from one session."""
    first: dict[str, tuple[int, ...]] = {}
    for m in measurements:
        first.setdefault(m["runtime"], (m["batch"], m["seq"], m["threads"]))
    return [m for m in measurements if first[m["runtime"]] == (m["batch"], m["seq"], m["threads"])]


def _speed(m: dict[str, Any]) -> dict[str, Any]:
    return {
        **{key: m[key] for key in ("runtime", "provider", "batch", "seq", "threads")},
        "median_ms": m["latency_ms"]["median"],
        "p95_ms": m["latency_ms"]["p95"],
        **{key: m[key] if m["baseline"] == BASELINE else None for key in ("ratio", "cpu_ratio", "difference")},
        "peak_rss_bytes": m["peak_rss_bytes"],
    }


def write_report(bundle: Bundle) -> str:
    """Write report.html into the bundle and name it in the manifest; the caller commits.

    A manifest that names an older report is committed without it first, so that a kill between here
    and the caller's commit leaves no file that differs from its recorded hash.
    """
    html = render_report(bundle)
    path = bundle.path(REPORT)
    if bundle.manifest.files.pop(REPORT, None) is not None:
        bundle.commit()
    with disk_errors(path):
        write_atomically(path, html)
    bundle.manifest.files[REPORT] = sha256_file(path)
    return REPORT


def store_report(bundle: Bundle) -> None:
    """Commit a bundle, write its report anew, and commit that."""
    bundle.commit()
    write_report(bundle)
    bundle.commit()


def render_report(bundle: Bundle) -> str:
    """Return the report as one self-contained HTML page."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= FILTERS
    rows = summary_rows(bundle)
    bench = latest_bench(bundle)
    cells = _cells(bundle, bench)
    layers = _layers(bundle)
    drawn = {
        "ratios": figures.ratios(bench["measurements"]),
        "flops": figures.flops_against_latency(bench["measurements"]),
        "layers": figures.kept_units(layers) if layers else None,
    }
    drawn |= {f"cell-{i}": figures.time_shares(cell["runs"]) for i, cell in enumerate(cells) if cell["runs"]}
    drawn = {name: figure for name, figure in drawn.items() if figure is not None}
    template = environment.get_template("report.html.j2")
    return template.render(
        artifact_bytes=bundle.artifact_bytes,
        manifest=bundle.manifest,
        headline=headline(bundle, rows),
        rows=rows,
        lines=_lines(rows, _signature(bundle)),
        name=model_name(bundle.manifest.model),
        units="heads and neurons" if _signature(bundle).part == "encoder" else "channels",
        figures={name: Markup(figures.as_html(figure, name)) for name, figure in drawn.items()},  # nosec B704
        plotly=Markup(figures.script()) if drawn else "",  # nosec B704
        stages=[stage.model_dump() for stage in bundle.manifest.stages],
        machine=bench["machine"],
        created=bench["created"][:10],
        cells=cells,
        sensed=sensed_line,
        provenance=_provenance(bundle),
        failures=bench["failures"],
        task=bundle.manifest.task.get("name", "unnamed"),
        declined=_declined,
        budget=budget_line(bundle.manifest.budget, _signature(bundle)),
    )


def _cells(bundle: Bundle, bench: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Group the measurements by cell: {"title", "floor" (of noise, or None), "cpu", "models", "runs" (ms by model)}."""
    noise = {place_title(n): n["floor"] for n in bench["noise"]}
    found: dict[str, dict[str, Any]] = {}
    for m in bench["measurements"]:
        title = place_title(m)
        cell = {"title": title, "floor": noise.get(title), "cpu": m["cpu"], "models": []}
        found.setdefault(title, cell)["models"].append(m)
    for cell in found.values():
        cell["runs"] = stored_runs(bundle, cell["models"])
    return list(found.values())


BOUND = {
    "flops": "of the encoder's FLOPs",
    "params": "of the encoder's parameters",
    "bytes": "of the whole model's bytes",
    "latency": "of the whole model's latency",
}


def as_markdown(bundle: Bundle) -> str:
    """Return the summary for a pull request: the sentence, the table, every measured ratio, and the machine."""
    model, bench = bundle.manifest.model, latest_bench(bundle)
    rows = summary_rows(bundle)
    lines = [f"### {model_name(model)}, {bundle.manifest.task.get('name', 'unnamed')}", "", headline(bundle, rows), ""]
    lines += _table(
        ["", *(row["variant"] for row in rows)], [[_labelled(x), *x["cells"]] for x in _lines(rows, _signature(bundle))]
    )
    if bench["measurements"]:
        said = {"none": "no difference"}
        lines += ["", "<details><summary>Every measurement</summary>", ""]
        lines += _table(
            ["", "model", "median ms", "p95", "ratio (95 %)", "", "peak memory"],
            [
                [
                    place_title(m),
                    m["model"],
                    *(f"{m['latency_ms'][key]:.2f}" for key in ("median", "p95")),
                    show_ratio(m["ratio"]) if m["ratio"] else "–",
                    said.get(m["difference"], m["difference"] or ""),
                    show_bytes(m["peak_rss_bytes"]),
                ]
                for m in bench["measurements"]
            ],
        )
        lines += ["", "</details>"]
    reasons = [(f, f["reason"].splitlines()[0]) for f in bench["failures"]]
    lines += ["", *(f"- not measured: {place_title(f)}, {f['model']}: {reason}" for f, reason in reasons)]
    if machine := bench["machine"]:
        lines += ["", f"{machine['cpu']}, {machine['threads']} threads, load {machine['load_1min']:.1f} at the start."]
    return "\n".join(lines) + "\n"


def model_name(model: Mapping[str, Any]) -> str:
    """Return what a page calls a manifest's model: its name, hub id, or the name of its folder."""
    source = str(model.get("name") or model.get("source", "model"))
    return source if source.count("/") == 1 and not source.startswith((".", "/")) else Path(source).name or source


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in (head, *rows)]
    lines = [f"| {' | '.join(row)} |" for row in cells]
    return [lines[0], "|" + "---|" * len(head), *lines[1:]]


def _labelled(line: Mapping[str, Any]) -> str:
    return f"{line['label']} ({line['note']})" if line["note"] else str(line["label"])


def budget_line(budget: Mapping[str, Any], signature: Signature = TEXTS) -> str:
    """Say what was bound: each cost with the share that was allowed, and the length that FLOPs are counted at."""
    length = signature.length(budget.get("seq_len", "?"))
    if budget.get("kind") == "masks":
        return f"given masks, FLOPs at {length}"
    limits = budget.get("limits") or [budget]
    bound = {kind: words.replace("encoder", signature.part) for kind, words in BOUND.items()}
    shares = [f"{percent(limit.get('keep', 1.0))} {bound[limit.get('kind', 'flops')]}" for limit in limits]
    if "lengths" in budget:
        over = lengths_line(budget["lengths"])
        return f"budget: {', '.join(shares)}, over {over}; {kept_line(budget['kept_flops'])}"
    return f"budget: {', '.join(shares)}, at {length}"


def _signature(bundle: Bundle) -> Signature:
    model = bundle.manifest.model
    return Signature.of_manifest(model) if model.get("inputs") else TEXTS


def headline(bundle: Bundle, rows: list[dict[str, Any]]) -> str:
    """Say in plain words what slicing changed, only from what was measured."""
    dense, sliced, signature = rows[0], rows[-1], _signature(bundle)
    said = []
    if sliced["keep_flops"] is not None:
        kept, part = percent(sliced["keep_flops"]), signature.part
        length = signature.length(bundle.manifest.budget.get("seq_len"))
        said.append(f"The sliced model keeps {kept} of the {part}'s FLOPs at {length}.")
    speed = next((r for r in sliced["runtimes"] if r["ratio"]), None)
    if speed:
        ratio = speed["ratio"]
        where = f"On {speed['runtime']} at batch {speed['batch']} and {signature.length(speed['seq'])}"
        interval = f"95% interval {ratio['low']:.2f} to {ratio['high']:.2f}"
        if speed["difference"] == "faster":
            said.append(f"{where} it takes {ratio['value']:.2f} times as long as the dense one ({interval}).")
        elif speed["difference"] == "slower":
            said.append(f"{where} it is slower: {ratio['value']:.2f} times the dense one's time ({interval}).")
        else:
            said.append(f"{where} no difference in speed from the dense one was found ({interval}).")
    if dense["value"] is not None and sliced["value"] is not None:
        said.append(f"Its {sliced['metric']} is {sliced['value']:.4f}; the dense model's is {dense['value']:.4f}.")
    elif sliced["agreement"] is not None:
        said.append(f"It decides as the dense model does on {percent(sliced['agreement'])} of the rows.")
    if speed and (faster := _fastest(bundle, speed)):
        precision, times = faster["precision"], faster["ratio"]["value"]
        said.append(
            f"In {precision} it takes {times:.2f} times the dense one's fp32; what that costs stands with the files."
        )
    return " ".join(said) or "Nothing has been measured yet."


def _fastest(bundle: Bundle, speed: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the measurement of the fastest lower precision of the sliced model in a cell, if it beats dense."""
    there = ("runtime", "batch", "seq", "threads")
    lower = [
        m
        for m in latest_bench(bundle)["measurements"]
        if m["model"].startswith("sliced:") and m["difference"] == "faster" and all(m[k] == speed[k] for k in there)
    ]
    return min(lower, key=lambda m: m["ratio"]["value"], default=None)


def _lines(rows: list[dict[str, Any]], signature: Signature = TEXTS) -> list[dict[str, Any]]:
    """Turn the rows around: one line per quantity with a cell per variant, empty quantities left out."""
    lines: list[dict[str, Any]] = []

    def add(label: str, note: str, get: Callable[[dict[str, Any]], Any], show: Callable[[Any], str]) -> None:
        values = [get(row) for row in rows]
        if any(v is not None for v in values):
            cells = ["–" if v is None else show(v) for v in values]
            lines.append({"label": label, "note": note, "cells": cells})

    metric = next((r["metric"] for r in rows if r["metric"]), "quality")
    n = next((r["n"] for r in rows if r["n"]), None)
    add(metric, f"{n} rows" if n else "", lambda r: r["value"], "{:.4f}".format)
    add("Agreement", "same decision as dense", lambda r: r["agreement"], percent)
    add("KL to dense", "nats, mean", lambda r: r["kl"], "{:.4g}".format)
    add("RMSE to dense", "", lambda r: r["rmse"], "{:.4g}".format)
    add("Cosine to dense", "mean", lambda r: r["cosine"], "{:.4f}".format)
    for name in dict.fromkeys(s["runtime"] for r in rows for s in r["runtimes"]):

        def speed(row: dict[str, Any], name: str = name) -> dict[str, Any] | None:
            return next((s for s in row["runtimes"] if s["runtime"] == name), None)

        example: dict[str, Any] = next(s for r in rows if (s := speed(r)))
        note = f"batch {example['batch']}, {signature.length(example['seq'])}, {example['threads']} threads"
        add(f"Latency, {name}", f"median (p95) ms; {note}", speed, _show_ms)
        add("– against dense", "ratio, 95% interval", _inside(speed, "ratio"), show_ratio)
        add("– CPU time against dense", "ratio, 95% interval", _inside(speed, "cpu_ratio"), show_ratio)
        add("– peak memory", "process, loading included", _inside(speed, "peak_rss_bytes"), show_bytes)
    length = "the budget's length" if signature.part == "encoder" else signature.length(1)
    add(
        f"{signature.part.capitalize()} FLOPs",
        f"2 x MAC, batch 1, at {length}",
        lambda r: r["encoder_flops"],
        show_count,
    )
    add("– share of dense", "", lambda r: r["keep_flops"], percent)
    if signature.part == "encoder":  # of a convolutional network all FLOPs are those above
        add("All FLOPs", "with embeddings and head", lambda r: r["flops"], show_count)
    add("Parameters", "", lambda r: r["params"], show_count)
    add("Weights", "in fp32", lambda r: r["weight_bytes"], show_bytes)
    return lines


def _provenance(bundle: Bundle) -> list[tuple[str, str]]:
    """Return what the bundle was made of: model, settings that are not off, software, and the plan's hash."""
    manifest = bundle.manifest
    lines = {
        "Model": ", sha256 ".join(str(manifest.model[key]) for key in ("source", "sha256") if manifest.model.get(key)),
        "Settings": ", ".join(f"{k} {_shown(v)}" for k, v in manifest.recipe.items() if v not in (None, False, "", [])),
        "Software": ", ".join(f"{name} {version}" for name, version in manifest.versions.items()),
        "Plan": str(manifest.plan.get("hash", "none")),
    }
    return [(name, text) for name, text in lines.items() if text]


def _shown(value: Any) -> str:
    return "+".join(map(str, value)) if isinstance(value, list) else str(value)


def _inside(get: Callable[[dict[str, Any]], dict[str, Any] | None], key: str) -> Callable[[dict[str, Any]], Any]:
    return lambda row: (get(row) or {}).get(key)


def _declined(stage: dict[str, Any]) -> str:
    """Return a stage's declined groups with their reasons, or why it did not run at all."""
    if stage.get("skipped"):
        return f"skipped: {stage['skipped']}"
    entries = stage.get("declined") or []
    return "; ".join(f"{e['group']} declined: {e['reason']}" for e in entries) or "–"


def _layers(bundle: Bundle) -> list[dict[str, Any]]:
    """Return per layer what each group keeps: [{"layer", "heads": {kept, total}, "neurons": {...}}], or "channels".

    Heads and neurons are shown by the number of their layer, channels by the name of the module that makes them.
    """
    if "plan.json" not in bundle.manifest.files:
        return []
    layers: dict[int, dict[str, Any]] = {}
    for g in bundle.plan().groups:
        name = g.name if g.kind == "channel" else f"layer {g.layer}"
        entry = layers.setdefault(g.layer, {"layer": name})
        entry[f"{g.kind}s"] = {"kept": g.count, "total": g.total}
    return [layers[i] for i in sorted(layers)]


def percent(value: float) -> str:
    return f"{100 * value:.1f}%"


def show_ratio(ratio: dict[str, float]) -> str:
    if ratio["low"] == ratio["value"] == ratio["high"]:  # dense against itself
        return f"{ratio['value']:.2f}"
    return f"{ratio['value']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})"


def _show_ms(speed: dict[str, Any]) -> str:
    return f"{speed['median_ms']:.2f} ({speed['p95_ms']:.2f})"


def show_count(value: float) -> str:
    """Show a count with three digits and a decimal unit: 1,789,440 -> 1.79 M."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.0f}"


def show_bytes(value: float) -> str:
    return f"{value / 1e6:,.1f} MB" if value < 1e9 else f"{value / 1e9:,.2f} GB"


FILTERS = {"percent": percent, "count": show_count, "bytes": show_bytes, "ratio": show_ratio}
