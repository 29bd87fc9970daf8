"""What a sweep's recipe may say, which cells it stands for, and how a table becomes means and a front."""

from __future__ import annotations

import re
import socket
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from deploy_prune.config import load_settings
from deploy_prune.errors import InputError, SystemStateError
from deploy_prune.sweep import Entry, SweepSettings, run_sweep
from deploy_prune.sweep.cells import expand, jobs_of
from deploy_prune.sweep.cluster import connected
from deploy_prune.sweep.report import as_html, as_markdown
from deploy_prune.sweep.results import COLUMNS, Point, Sweep, fronts, marked, summarise
from deploy_prune.sweep.store import Store

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
ENTRY = '[[entries]]\nmodel = "demo"\n'


def test_the_table_of_the_paper_is_one_recipe() -> None:
    settings = load_settings(SweepSettings, RECIPES / "paper-table.toml", "sweep")
    cells = expand(settings)
    assert len(cells) == 8 * 2 * 7 * 10
    assert Counter(entry.label for entry in settings.entries) == {"BERT-base": 8, "DistilBERT": 8}
    assert {e.task for e in settings.entries} == {"mnli", "qqp", "qnli", "sst2", "stsb", "mrpc", "squad", "squad_v2"}
    assert all(entry.model.count("/") == 1 and entry.data is None for entry in settings.entries), "from the hub"
    jobs = jobs_of(cells)
    assert len(jobs) == 160, "one calibration for each model, task and seed"
    assert {len(job.cells) for job in jobs} == {7}
    assert sorted(cell.number for job in jobs for cell in job.cells) == list(range(1120))


def test_the_small_recipe_needs_nothing_from_outside() -> None:
    settings = load_settings(SweepSettings, RECIPES / "sweep-small.toml", "sweep")
    assert len(expand(settings)) >= 8
    assert {entry.model for entry in settings.entries} == {"digits-vit"}


def test_the_recipe_of_the_overhead_has_as_many_cells_as_the_docs_say() -> None:
    settings = load_settings(SweepSettings, RECIPES / "sweep-sst2.toml", "sweep")
    assert f"{len(expand(settings))} cells took" in (RECIPES.parent / "docs" / "sweep.md").read_text("utf-8")


def test_the_docs_name_every_key_and_column() -> None:
    text = (RECIPES.parent / "docs" / "sweep.md").read_text("utf-8")
    named = set(re.findall(r"`(\w+)`", text))
    assert named >= {*COLUMNS, *Entry.model_fields, *SweepSettings.model_fields} - {"entries"}
    assert "[[entries]]" in text


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("keeps = [0.5]\n", "entries"),
        (f"kepes = [0.5]\n{ENTRY}", "unknown key 'kepes'; known: .*keeps"),
        (f'{ENTRY}modle = "x"\n', "unknown key 'entries.0.modle'; known: data, label_column, .*, model, "),
        (f"keeps = [0.5, 1.5]\n{ENTRY}", "1.5 is not a share"),
        (f"keeps = [0.5, 0.5]\n{ENTRY}", "0.5 is named twice"),
        (f"seeds = []\n{ENTRY}", "leaves no cell"),
        (f"seeds = [-1]\n{ENTRY}", "-1 is less than 0"),
        (f"samples = 10\n{ENTRY}", "samples"),
        (f'budget = "latency"\n{ENTRY}', "needs a latency table"),
        (f'{ENTRY}lut = "lut.json"\n', "budget is of flops"),
        (f'bench_on = ["edge-box"]\n{ENTRY}', "names no runtime"),
        (ENTRY + ENTRY, "two entries are called 'demo'"),
    ],
)
def test_bad_recipes_say_what_is_wrong(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "sweep.toml"
    path.write_text(text)
    with pytest.raises(InputError, match=said) as caught:
        load_settings(SweepSettings, path, "sweep")
    assert str(path) in caught.value.message


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"criteria": ["astrology"]}, "Unknown criterion 'astrology'"),
        ({"compensate": ["prayer"]}, "Unknown compensation 'prayer'"),
        ({"bench_runtimes": ["abacus"]}, "No runtime 'abacus'"),
        ({"bench_runtimes": ["tensorrt"]}, "cannot measure in tensorrt"),
    ],
)
def test_unknown_names_are_refused_before_anything_is_computed(
    wrong: dict[str, Any], said: str, tmp_path: Path
) -> None:
    settings = SweepSettings.model_validate({"entries": [{"model": "demo"}], **wrong})
    with pytest.raises(InputError, match=said):
        run_sweep(settings, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("address", ["here", "ray://127.0.0.1:10001", ":6379", "127.0.0.1:port"])
def test_addresses_are_host_and_port(address: str) -> None:
    with pytest.raises(InputError, match="no address"), connected(address, 0):
        pass


def test_a_cluster_that_does_not_answer_is_said_at_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(SystemStateError, match=f"No Ray cluster answers at 127.0.0.1:{port}"):
        connected(f"127.0.0.1:{port}", 0).__enter__()


def test_paths_are_whole_and_ids_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("mine", "demo"):
        (tmp_path / name).mkdir()
    settings = SweepSettings.model_validate({"entries": [{"model": m} for m in ("mine", "demo", "a/b")]})
    assert [e.located().model for e in settings.entries] == [str(tmp_path / "mine"), "demo", "a/b"]
    assert [e.located().label for e in settings.entries] == ["mine", "demo", "b"]


def test_half_written_results_are_computed_again(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.keep("cells", "a", {"kl": 1.0})
    (tmp_path / "cells" / "b.json").write_text('{"key": "b", "resu')
    (tmp_path / "cells" / "c.json").write_text('{"key": "a", "result": {}}')
    assert store.results("cells") == {"a": {"kl": 1.0}}
    store.keep_model("m", {"x/y": b"1", "z": b""})
    (tmp_path / "models" / ".half-1").mkdir()
    assert Store(tmp_path).models() == {"m"}
    assert store.model("m") == {"x/y": b"1", "z": b""}
    store.drop_models()
    assert store.models() == set()


def row(**values: Any) -> dict[str, Any]:
    base = {"model": "m", "task": "t", "keep": 0.5, "seed": 0, "criterion": "auto", "compensate": "refit"}
    base |= {"status": "done", "metric": "accuracy", "quality_dense": 0.9, "flops": 50, "flops_dense": 100}
    return dict.fromkeys(COLUMNS) | base | values


def measured(ratio: float, dense: float, **values: Any) -> dict[str, Any]:
    speed = {"runtime": "ort-cpu", "bench_on": "edge", "ratio": ratio, "latency_ms_dense": dense}
    return row(**speed, latency_ms=ratio * dense, **values)


def test_means_have_students_intervals() -> None:
    values = [0.80, 0.84, 0.85]
    rows = [row(seed=seed, quality_sliced=value) for seed, value in enumerate(values)]
    rows.append(row(seed=3, status="failed", reason="no"))
    (entry,) = summarise(rows)
    low, high = stats.t.interval(0.95, 2, loc=np.mean(values), scale=stats.sem(values))
    assert entry["quality_sliced"] == pytest.approx((np.mean(values), (high - low) / 2))
    assert entry["quality_loss"][0] == pytest.approx(0.9 - np.mean(values))
    assert (entry["runs"], entry["failed"], entry["kl"]) == (3, 1, None)
    assert summarise(rows[:1])[0]["quality_sliced"] == (0.80, None)


def test_latency_does_not_depend_on_the_hour() -> None:
    rows = [measured(0.5, 10.0, seed=0, quality_sliced=0.8), measured(0.5, 30.0, seed=1, quality_sliced=0.8)]
    (entry,) = summarise(rows)
    assert entry["latency_ms"] == pytest.approx((10.0, 0.0)), "half of the dense model's mean of 20 ms"


def test_the_front_holds_what_nothing_beats() -> None:
    places = {"a": (1, 0.5), "b": (2, 0.4), "c": (3, 0.7), "d": (3, 0.6), "e": (4, 0.7), "f": (5, 0.9), "g": (5, 0.9)}
    points = [Point(name, "", 0.5, cost, quality, None) for name, (cost, quality) in places.items()]
    assert [p.model for p in marked(points) if p.front] == ["a", "c", "f", "g"]


def test_fronts_are_of_flops_or_of_latency() -> None:
    rows = [row(quality_sliced=0.8), row(keep=0.3, flops=30, quality_sliced=0.7)]
    (front,) = fronts(rows, summarise(rows))
    assert (front.cost, front.quality, front.where) == ("flops", "accuracy", "")
    assert [(p.cost, p.quality, p.keep, p.front) for p in front.points] == [
        (30, 0.7, 0.3, True),
        (50, 0.8, 0.5, True),
        (100, 0.9, None, True),
    ]
    rows = [measured(0.5, 10.0, quality_sliced=0.95), measured(0.4, 10.0, keep=0.3, quality_sliced=0.7)]
    (front,) = fronts(rows, summarise(rows))
    assert (front.cost, front.where) == ("latency_ms", "ort-cpu on edge")
    assert [(p.keep, p.front) for p in front.points] == [(0.3, True), (0.5, True), (None, False)]
    rows = [row(agreement=0.8, quality_dense=None, metric=None)]
    (front,) = fronts(rows, summarise(rows))
    assert [(p.quality, p.keep) for p in front.points] == [(0.8, 0.5), (1.0, None)], "without labels: agreement"


def test_reports_hold_every_cell_and_every_reason() -> None:
    rows = [row(quality_sliced=0.8), row(keep=0.3, status="failed", reason="<no> | plan")]
    account = {"cells": 2, "reused": 0, "restarts": 1, "workers": 2, "wall_seconds": 6.0, "cell_seconds": 10.0}
    account |= {"job_seconds": 11.0, "overhead": 0.2}
    summary = summarise(rows)
    sweep = Sweep(rows, summary, fronts(rows, summary), account, [])
    text, page = as_markdown(sweep), as_html(sweep)
    assert "overhead 20.0%" in text
    assert "| m | t | 0.5 | auto | refit | 1 | yes | 0.8000 |" in text
    assert "| m | t | 0.3 | auto | refit | 0 (1 failed) |  | - |" in text
    assert "m, t, 0.3, auto, refit, 0: <no> | plan" in text
    assert "&lt;no&gt; | plan" in page
    assert "http" not in page.replace("http://www.w3.org", "").split("</script>")[-1], "nothing is fetched"
    assert sweep.to_dict()["failed"][0]["reason"] == "<no> | plan"
