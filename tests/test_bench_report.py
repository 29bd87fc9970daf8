"""The report says what the bundle holds, in words that the numbers bear out."""

from __future__ import annotations

import html.parser
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles_tiny import exported_bundle

from deploy_prune.bundle import Bundle, Stage
from deploy_prune.runtime_bench.report import (
    as_markdown,
    budget_line,
    headline,
    model_name,
    render_report,
    show_bytes,
    show_count,
    summary_rows,
    write_report,
)
from deploy_prune.runtime_bench.results import SCHEMA_VERSION
from deploy_prune.runtime_bench.stats import tell_difference


def add_bench(
    bundle: Bundle, ratio: dict[str, float], *, created: str = "2026-01-01", seq: int = 12, cpu: str = "A & B"
) -> None:
    cell = {"runtime": "ort-cpu", "batch": 1, "seq": seq, "threads": 2, "provider": "CPUExecutionProvider"}
    speeds = {"dense": (10.0, {"value": 1.0, "low": 1.0, "high": 1.0}), "sliced": (5.0, ratio)}
    measurements = [
        {
            **cell,
            "model": variant,
            "latency_ms": {"median": ms, "p90": 1.05 * ms, "p95": 1.1 * ms, "p99": 1.2 * ms},
            "rows_per_second": 1000 / ms,
            "runs": 70,
            "rounds": 10,
            "flops": round(1e9 * ms),
            "file_bytes": 4_000_000,
            "resident_bytes": 5_000_000,
            "activation_bytes": None,
            "ratio": r,
            "cpu_ratio": {"value": 0.77, "low": 0.76, "high": 0.78} if variant == "sliced" else r,
            "peak_rss_bytes": 123_000_000,
            "difference": None if variant == "dense" else tell_difference(r, None),
        }
        for variant, (ms, r) in speeds.items()
    ]
    failure = {**cell, "model": "virtual", "kind": "InputError", "reason": "<broken> file"}
    measurements[1] |= {
        "device_ms": {"median": 7.5},
        "cuda_graphs": True,
        "device_bytes": 2e9,
        "gpu_joules_per_run": 0.25,
    }
    machine = {"cpu": cpu, "usable_cores": 2, "logical_cores": 4, "threads": 2, "load_1min": 0.5}
    machine |= {"cpu_flags": ["avx2"], "governor": None, "busy": [{"name": "cc1", "percent": 99.0}], "gpus": []}
    machine |= {"memory_bytes": 8e9, "os": "Linux", "python": "3.11", "versions": {"numpy": "2.0"}}
    result = {"schema_version": SCHEMA_VERSION, "created": created, "machine": machine, "baseline": "dense"}
    result |= {"measurements": measurements, "noise": [{**cell, "floor": 0.021}], "failures": [failure]}
    times = {m: np.full(70, 1e6 * ms, np.int64) for m, (ms, _) in speeds.items()}
    np.savez(bundle.root / "raw.npz", **{f"ort-cpu/1x{seq}/t2/{m}/wall_ns": ns for m, ns in times.items()})
    result["samples"] = bundle.add_file(bundle.root / "raw.npz", "bench", f"ort-s{seq}")
    path = bundle.root / "result.json"
    path.write_text(json.dumps(result))
    bundle.add_file(path, "bench", f"ort-s{seq}")


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    bundle = exported_bundle(tmp_path)
    m = bundle.manifest
    m.quality = {v: {"metric": "accuracy", "value": q, "n": 100} for v, q in (("dense", 0.9), ("sliced", 0.88))}
    m.fidelity = {"kl": 0.01, "agreement": 0.97, "virtual": {"kl": 0.01, "agreement": 0.97}}
    m.stages = [Stage(name="refit", seconds=3.25, declined=[{"group": "L01.heads", "reason": "no heads"}])]  # type: ignore[call-arg]
    return bundle


FASTER = {"value": 0.5, "low": 0.45, "high": 0.55}


def test_rows_hold_what_the_manifest_and_the_bench_say(bundle: Bundle) -> None:
    slower = {"value": 0.9, "low": 0.8, "high": 1.0}
    add_bench(bundle, slower, created="2030-01-01", seq=99)  # older, another length; the clock was then set back
    add_bench(bundle, FASTER)
    dense, virtual, sliced = summary_rows(bundle)
    counts = bundle.manifest.counts
    assert sliced["keep_flops"] == counts["sliced"]["encoder_flops"] / counts["dense"]["encoder_flops"] < 1
    assert (dense["keep_flops"], virtual["keep_flops"]) == (1.0, 1.0)
    assert {k: sliced[k] for k in counts["sliced"]} == counts["sliced"]
    (speed,) = sliced["runtimes"]
    assert (speed["runtime"], speed["seq"], speed["median_ms"], speed["ratio"]) == ("ort-cpu", 12, 5.0, FASTER)
    assert virtual["runtimes"] == []
    assert (sliced["metric"], sliced["value"], sliced["agreement"], sliced["kl"]) == ("accuracy", 0.88, 0.97, 0.01)
    assert (dense["value"], dense["kl"], virtual["value"], virtual["agreement"]) == (0.9, None, None, 0.97)


@pytest.mark.parametrize(
    ("ratio", "words"),
    [
        (FASTER, "takes 0.50 times as long"),
        ({"value": 0.97, "low": 0.9, "high": 1.05}, "no difference in speed"),
        ({"value": 1.2, "low": 1.1, "high": 1.3}, "it is slower"),
    ],
)
def test_headline_claims_no_more_than_the_interval(bundle: Bundle, ratio: dict[str, float], words: str) -> None:
    add_bench(bundle, ratio)
    said = headline(bundle, summary_rows(bundle))
    assert words in said
    assert f"95% interval {ratio['low']:.2f} to {ratio['high']:.2f}" in said
    assert "accuracy is 0.8800; the dense model's is 0.9000" in said


def test_headline_names_the_fastest_precision_of_the_same_cell(bundle: Bundle) -> None:
    add_bench(bundle, FASTER)
    (name,) = [n for n in bundle.manifest.files if n.startswith("bench/") and n.endswith(".json")]
    result = json.loads(bundle.path(name).read_text())
    base = result["measurements"][-1] | {"model": "sliced:int8", "precision": "int8"}
    for seq, value in ((12, 0.3), (99, 0.1)):
        ratio = {"value": value, "low": value, "high": value}
        result["measurements"].append(base | {"seq": seq, "ratio": ratio})
    (bundle.root / "r.json").write_text(json.dumps(result))
    bundle.add_file(bundle.root / "r.json", "bench", "ort-s12")
    del bundle.manifest.files[name]
    assert "In int8 it takes 0.30 times" in headline(bundle, summary_rows(bundle))


def test_headline_of_an_unmeasured_bundle(bundle: Bundle) -> None:
    bundle.manifest.quality, bundle.manifest.fidelity, bundle.manifest.counts = {}, {}, {}
    assert headline(bundle, summary_rows(bundle)) == "Nothing has been measured yet."


class Page(html.parser.HTMLParser):
    """Check that tags close in order and gather the text and the bars."""

    VOID = ("meta", "br")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = ""
        self.links: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [v for k, v in attrs if k in ("src", "href") and v]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        assert tag in self.VOID

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "script":
            self.text += data


def test_page_is_whole_self_contained_and_escaped(bundle: Bundle) -> None:
    add_bench(bundle, FASTER)
    page = Page(render_report(bundle))
    assert page.links == []  # nothing is loaded from elsewhere
    for words in (
        "0.50 (0.45 to 0.55)",
        "0.77 (0.76 to 0.78)",
        "5.00 (5.50)",
        "<broken> file",
        "A & B",
        "L01.heads declined: no heads",
        "3.2",
        "123.0 MB",
        "70 runs, 10 rounds",
        "differed by up to 2.1%",
        "cc1 used 99% of a core",
        bundle.manifest.plan["hash"],
        "passed, largest difference",
        "2026-01-01: A & B",
        "7.50 ms on the device, CUDA graphs, 2000 MB of its memory, 0.25 J a run in the GPU",
    ):
        assert words in page.text


def test_a_page_says_how_its_bundle_was_made_and_where_each_cell_was_measured(bundle: Bundle) -> None:
    bundle.manifest.model |= {"source": "org/model", "sha256": "ab12"}
    bundle.manifest.recipe = {"seed": 7, "formats": ["onnx", "pt2"], "samples": 512, "profile": None}
    bundle.manifest.versions = {"torch": "2.13.0"}
    add_bench(bundle, FASTER, seq=99, cpu="C & D")
    add_bench(bundle, FASTER)
    text = Page(render_report(bundle)).text
    for words in ("org/model, sha256 ab12", "seed 7, formats onnx+pt2, samples 512", "torch 2.13.0"):
        assert words in text
    assert "profile" not in text.split("How it was made")[1]
    assert text.count("C & D") == 1  # beside the cell that the newest machine did not measure


def test_page_of_a_bare_bundle_has_no_empty_sections(bundle: Bundle) -> None:
    m = bundle.manifest
    m.stages, m.artifacts, m.quality, m.fidelity, m.counts = [], [], {}, {}, {}
    del m.files["plan.json"]
    page = Page(render_report(bundle))
    for section in ("Stages", "Machine", "Files to deploy", "What stays", "Not measured"):
        assert section not in page.text


def test_markdown_says_what_the_page_says(bundle: Bundle) -> None:
    add_bench(bundle, FASTER)
    text = as_markdown(bundle)
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert headline(bundle, summary_rows(bundle)) in text
    assert "| accuracy (100 rows) | 0.9000 | – | 0.8800 |" in rows
    assert (
        "| ort-cpu, batch 1, 12 tokens, 2 threads | sliced | 5.00 | 5.50 | 0.50 (0.45 to 0.55) | faster | 123.0 MB |"
        in rows
    )
    assert "| ort-cpu, batch 1, 12 tokens, 2 threads | dense | 10.00 | 11.00 | 1.00 |  | 123.0 MB |" in rows
    assert "\n\n- not measured: ort-cpu, batch 1, 12 tokens, 2 threads, virtual: <broken> file\n" in text
    assert len({line.count(" | ") for line in rows[:4] if "---" not in line}) == 1  # as many cells in every row


def test_markdown_of_a_bare_bundle(bundle: Bundle) -> None:
    bundle.manifest.quality, bundle.manifest.fidelity, bundle.manifest.counts = {}, {}, {}
    text = as_markdown(bundle)
    assert "Nothing has been measured yet." in text
    assert "Every measurement" not in text


def test_report_is_named_in_the_manifest_and_a_kill_never_corrupts(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert write_report(bundle) == "report.html"
    bundle.commit()
    old = Bundle.open(bundle.root).path("report.html").read_text()
    add_bench(bundle, FASTER)
    write_report(bundle)
    Bundle.open(bundle.root)  # killed here, before the commit: the bundle is still whole
    bundle.commit()
    again: Any = Bundle.open(bundle.root)
    assert "report.html" in again.manifest.files
    assert again.path("report.html").read_text() != old


def test_units() -> None:
    assert [show_count(v) for v in (7, 1_789_440, 558_601_728, 2.5e10)] == ["7", "1.79 M", "559 M", "25 G"]
    assert [show_bytes(v) for v in (90_900_000, 1_340_000_000)] == ["90.9 MB", "1.34 GB"]


@pytest.mark.parametrize(
    ("budget", "said"),
    [
        ({"kind": "flops", "keep": 0.5, "seq_len": 12}, "budget: 50.0% of the encoder's FLOPs, at 12 tokens"),
        ({"kind": "masks", "keep": 0.5, "seq_len": 12}, "given masks, FLOPs at 12 tokens"),
        (
            {"limits": [{"kind": "params", "keep": 0.6}, {"kind": "latency", "keep": 0.7}], "seq_len": 9},
            "budget: 60.0% of the encoder's parameters, 70.0% of the whole model's latency, at 9 tokens",
        ),
    ],
)
def test_the_budget_is_named_by_its_kind(budget: dict[str, Any], said: str) -> None:
    """The report once called every budget a share of FLOPs."""
    assert budget_line(budget) == said


@pytest.mark.parametrize(
    ("source", "shown"),
    [("/models/lenet", "lenet"), ("./lenet/", "lenet"), ("a/b/lenet", "lenet"), ("org/lenet", "org/lenet"), ("x", "x")],
)
def test_a_page_is_headed_by_the_model_not_by_its_folder(source: str, shown: str) -> None:
    assert model_name({"source": source}) == shown
