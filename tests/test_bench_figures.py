"""The figures of the report hold the numbers that were measured, and work in a real browser without a network."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browsers import open_browser, open_page
from bundles_tiny import exported_bundle
from test_bench_report import FASTER, add_bench

from deploy_prune.bundle import Bundle
from deploy_prune.runtime_bench import figures
from deploy_prune.runtime_bench.report import render_report

CELL = {"runtime": "ort-cpu", "batch": 1, "seq": 12, "threads": 2, "baseline": "dense"}
DENSE = {**CELL, "model": "dense", "flops": 400, "difference": None, "ratio": {"value": 1.0, "low": 1.0, "high": 1.0}}
SLICED = {**CELL, "model": "sliced", "flops": 200, "difference": "faster", "ratio": FASTER}


def test_bars_are_the_kept_shares() -> None:
    layers = [
        {"layer": "layer 0", "heads": {"kept": 3, "total": 4}},
        {"layer": "layer 1", "heads": {"kept": 0, "total": 4}},
    ]
    (bars,) = figures.kept_units(layers).data
    assert (list(bars.x), list(bars.y)) == ([75.0, 0.0], ["layer 0", "layer 1"])


def test_curves_pass_through_the_quantiles() -> None:
    ms = np.random.default_rng(0).gamma(2.0, size=500)
    (curve,) = figures.time_shares({"sliced": ms}).data
    assert curve.x[curve.y.index(95)] == pytest.approx(np.quantile(ms, 0.95), abs=1e-5)
    assert (curve.x[0], curve.x[-1]) == pytest.approx((ms.min(), ms.max()), abs=1e-5)


def test_ratios_have_their_intervals() -> None:
    figure = figures.ratios([DENSE, SLICED])
    (marks,) = figure.data  # the baseline has none
    assert (marks.x[0] - marks.error_x.arrayminus[0], marks.x[0] + marks.error_x.array[0]) == pytest.approx(
        (0.45, 0.55)
    )


def test_flops_are_against_the_baseline_of_the_same_cell() -> None:
    longer = {"seq": 24, "flops": 1000}
    (marks,) = figures.flops_against_latency([DENSE, SLICED, DENSE | longer, SLICED | longer]).data
    assert list(marks.x) == [0.5, 1.0]


def test_a_model_with_more_flops_than_the_baseline_is_within_the_figure() -> None:
    """The axis once ended at 1.1."""
    larger = SLICED | {"flops": 2 * DENSE["flops"]}
    figure = figures.flops_against_latency([DENSE, larger])
    assert figure.layout.xaxis.range[1] > figure.data[0].x[0] == 2


def test_nothing_is_drawn_of_what_was_not_measured() -> None:
    assert figures.ratios([DENSE]) is None
    assert figures.flops_against_latency([DENSE, SLICED | {"flops": None}]) is None
    assert figures.flops_against_latency([SLICED]) is None  # its baseline failed


def test_names_cannot_break_the_page() -> None:
    name = "</script><b>x"
    page = figures.as_html(figures.ratios([SLICED | {"model": name}]), "f")
    assert page.count("</script>") == 1


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with open_browser() as browser:
        yield browser


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    bundle: Bundle = exported_bundle(tmp_path_factory.mktemp("page"))
    add_bench(bundle, FASTER)
    path = bundle.root / "page.html"
    path.write_text(render_report(bundle), "utf-8")
    return path


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [(1200, 900), (360, 740)], ids=["desktop", "phone"])
def test_page_works_in_a_browser(browser: Any, page_file: Path, scheme: str, size: tuple[int, int]) -> None:
    trouble: list[str] = []
    page = open_page(browser, trouble, viewport={"width": size[0], "height": size[1]}, color_scheme=scheme)
    page.on("request", lambda r: trouble.append(r.url) if not r.url.startswith(("file:", "data:", "blob:")) else None)
    page.goto(page_file.as_uri())
    for name in ("flops", "ratios", "cell-0", "layers"):
        page.wait_for_selector(f"#{name} .main-svg")
    assert page.locator("#layers .bars path").count() == 4  # two layers, heads and neurons
    assert page.evaluate("document.documentElement.scrollWidth") <= size[0]

    bar = page.locator("#layers .bars path").first
    bar.scroll_into_view_if_needed()
    box = bar.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 3, box["y"] + box["height"] / 2)
    page.wait_for_selector("#layers .hoverlayer .hovertext")
    assert " of " in page.locator("#layers .hoverlayer .hovertext").first.text_content()
    ink, ground = (
        page.evaluate(f"getComputedStyle(document.querySelector('{where}')).{what}")
        for where, what in (("#layers .ytick text", "fill"), ("body", "backgroundColor"))
    )
    assert abs(_brightness(ink) - _brightness(ground)) > 120
    assert trouble == []
    page.close()


def _brightness(colour: str) -> float:
    return float(np.mean([float(part) for part in colour[colour.index("(") + 1 : -1].split(",")[:3]]))
