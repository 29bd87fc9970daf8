"""Every experiment runs from one command and says what it measured, nothing else."""

from __future__ import annotations

import csv
import json
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from runs_tiny import checkpoint, data, linear_costs
from scipy import stats

from deploy_prune.cli import invoke
from deploy_prune.cli_lab import EXPERIMENT_NAMES
from deploy_prune.errors import InputError
from deploy_prune.experiments import EXPERIMENTS, Lab, Setting, run_experiment
from deploy_prune.experiments.report import as_csv, as_markdown, as_svg, summarise


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    root = tmp_path_factory.mktemp("experiments")
    model, rows = checkpoint(root / "model"), data(root / "data")
    lut = root / "lut.json"
    words = ["probe", str(model), "--runtime", "torch", "--seq", "8", "--widths", "1", "--seconds", "0.05"]
    assert invoke([*words, "--threads", "1", "--out", str(lut)]) == 0
    linear_costs(lut)
    return Setting(
        model=str(model),
        task="text-classification",
        data=str(rows),
        keeps=(0.8,),
        seeds=(0,),
        samples=64,
        runtime="torch",
        threads=1,
        lut=str(lut),
        rival=str(model),
    )


@pytest.fixture(scope="module")
def documents() -> dict[str, Any]:
    return {}


@pytest.mark.parametrize("name", [n for n, e in EXPERIMENTS.items() if not e.convolutional])
def test_every_experiment_runs(name: str, setting: Setting, documents: dict[str, Any], tmp_path: Path) -> None:
    experiment = EXPERIMENTS[name]
    document, files = run_experiment(name, setting, tmp_path)
    documents[name] = document
    assert {f.name for f in files} == {
        f"{name}{s}" for s in (".json", ".csv", ".md", *((".svg",) if experiment.figure else ()))
    }
    assert json.loads((tmp_path / f"{name}.json").read_text()) == json.loads(json.dumps(document))
    assert document["machine"]["threads"] == 1
    assert "/" not in document["setting"]["model"], "no paths of this machine"
    cells = summarise(document)
    assert len(cells) == len({tuple(c[k] for k in experiment.by) for c in cells}) > 0
    assert any(c[column] is not None for column in experiment.columns for c in cells)
    with open(tmp_path / f"{name}.csv") as file:
        assert len(list(csv.DictReader(file))) == len(document["rows"])
    table = (tmp_path / f"{name}.md").read_text().splitlines()
    assert len(table) == len(cells) + 4
    if experiment.figure:
        ET.parse(tmp_path / f"{name}.svg")


def test_virtual_and_sliced_do_not_differ(setting: Setting, tmp_path: Path) -> None:
    document, _ = run_experiment("parity", setting, tmp_path)
    assert {row["difference"] for row in document["rows"]} == {0.0}
    assert all(row["max_abs"] <= 1e-4 for row in document["rows"])


def test_flops_taken_away_are_what_was_asked_for(setting: Setting, tmp_path: Path) -> None:
    document, _ = run_experiment("flops", setting, tmp_path)
    at_budget = [r for r in document["rows"] if r["length"] == r["budget_length"]]
    assert at_budget
    for row in at_budget:
        assert 0 <= row["encoder_reduction"] - row["one_minus_keep"] < 0.03  # one unit of a tiny model
    for row in document["rows"]:
        layers, d, ff, t = 3, 32, 24, row["length"]
        exact = 2 * layers * t * (4 * d * d + 2 * d * ff + 2 * t * d)
        assert row["dense_encoder_gflops"] == pytest.approx(exact / 1e9)


def test_plans_by_the_table_cost_what_it_says(setting: Setting, tmp_path: Path) -> None:
    document, _ = run_experiment("prediction", setting, tmp_path)
    for row in document["rows"]:
        assert row["predicted"] <= row["keep"]
        assert row["relative_error"] == pytest.approx(row["predicted"] / row["ratio_to_dense"] - 1)
    with pytest.raises(InputError, match="probe"):
        run_experiment("prediction", replace(setting, lut=None), tmp_path)


def test_a_rival_faster_than_the_smallest_model_meets_the_smallest(setting: Setting, tmp_path: Path) -> None:
    document, _ = run_experiment("rival", replace(setting, keeps=(0.001,)), tmp_path)
    rival, pruned = document["rows"]
    assert pruned["method"] == "pruned"
    assert 0.001 < pruned["kept_flops"] <= 1.0
    assert rival["ratio_to_dense"] > 0


def document(**changes: Any) -> dict[str, Any]:
    rows = [{"keep": 0.5, "method": "a", "value": v, "kl": None} for v in (0.8, 0.9, 0.85)]
    rows.append({"keep": 0.4, "method": "a", "value": 0.7, "kl": None})
    whole = {
        "title": "T",
        "setting": {"model": "m", "task": "sst2", "samples": 64},
        "dense": {"metric": "accuracy", "value": 0.9},
        "evaluated": {"rows": 10},
        "machine": {"cpu": "c", "threads": 1},
        "by": ["keep", "method"],
        "columns": ["value", "kl"],
        "figure": ("keep", "value", "method"),
        "rows": rows,
    }
    return whole | changes


def test_means_and_intervals() -> None:
    first, second = summarise(document())
    values = [0.8, 0.9, 0.85]
    half = stats.t.ppf(0.975, 2) * np.std(values, ddof=1) / np.sqrt(3)
    assert first["value"] == pytest.approx((0.85, half))
    assert second["value"] == (0.7, None), "one run has no interval"
    assert first["kl"] is None
    text = as_markdown(document())
    assert "| 0.5 | a | 0.8500 ± 0.1242 |" in text
    assert "| 0.4 | a | 0.7000 |" in text
    assert "kl" not in text, "a column that nothing was measured for is left out"
    assert as_svg(document()) == as_svg(document())
    assert as_csv(document()).splitlines()[0] == "keep,method,value,kl"


def test_an_interrupted_experiment_keeps_its_rows(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compare, calls = Lab.compare, []

    def twice(self: Lab, model: Any) -> dict[str, Any]:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return compare(self, model)

    earlier = tmp_path / "ablation.json"
    earlier.write_text("{}")
    monkeypatch.setattr(Lab, "compare", twice)
    with pytest.raises(KeyboardInterrupt):
        run_experiment("ablation", setting, tmp_path)
    assert len(json.loads((tmp_path / "ablation.partial.json").read_text())["rows"]) == 2
    assert earlier.read_text() == "{}"
    with pytest.raises(InputError, match="not a folder"):
        run_experiment("ablation", setting, earlier)


def test_help_names_every_experiment() -> None:
    assert sorted(EXPERIMENT_NAMES.replace(" or ", ", ").rstrip(".").split(", ")) == sorted(EXPERIMENTS)


def test_from_the_command_line(setting: Setting, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--model", setting.model, "--task", setting.task, "--data", str(setting.data), "--samples", "64"]
    words += ["--seeds", "0", "--keep", "0.7", "--out", str(tmp_path / "out"), "--stem", "tiny"]
    assert invoke(["experiment", "ablation", *words]) == 0
    assert "| 0.7 | +mask tuning |" in capsys.readouterr().out
    assert (tmp_path / "out" / "tiny.svg").is_file()
    assert invoke(["experiment", "astrology", *words]) == 2
    assert "ablation" in capsys.readouterr().err
    assert invoke(["experiment", "ablation", *words[:-6], "--keep", "1.5"]) == 2
    with pytest.raises(InputError, match="astrology"):
        run_experiment("astrology", setting, tmp_path)
