"""The load recipe against real servers of tiny models: a reload and a kill, the measurements, memory."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from bundles_tiny import make_exported

pytest.importorskip("tritonclient", reason="the extra 'serve' is not installed")

RECIPES = Path(__file__).resolve().parents[1] / "recipes" / "serving"


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(RECIPES))
    import load

    yield load
    for name in ("load", "servers"):
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_exported(tmp_path_factory.mktemp("load") / "one").root


def test_a_reload_and_a_kill_lose_nothing_unsaid(
    recipe: Any, bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    second = make_exported(tmp_path / "two", "electra", variants=("sliced",)).root  # takes the same, answers otherwise
    recipe.disturb(bundle, second, requests=600, clients=4, tokens=7)
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert said["wrong"] == 0
    assert said["answered"] + sum(said["errors"].values()) == 600
    assert set(said["by_version"]) == {"1", "2"}
    assert said["errors"]  # of the kill


def test_load_is_measured_against_the_bare_runtime(
    recipe: Any, bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "load.jsonl"
    recipe.load(bundle, out, clients="1,4", variants="sliced", tokens=7, seconds=1.0)
    entries = [json.loads(line) for line in out.read_text().splitlines()]
    assert [e["clients"] for e in entries] == [1, 4]
    for entry in entries:
        assert entry["errors"] == {}
        assert entry["answered"] > 10
        assert entry["p99_ms"] >= entry["p50_ms"] > 0
        assert entry["server_cpu_ms"] > entry["floor_cpu_ms"] > 0
        assert 1 <= entry["rows_per_run"] <= entry["clients"]
    capsys.readouterr()
    recipe.table(out)
    assert len(capsys.readouterr().out.splitlines()) == 4


def test_soak_writes_the_memory(recipe: Any, bundle: Path, tmp_path: Path) -> None:
    recipe.soak(bundle, tmp_path / "soak.jsonl", minutes=0.05, clients=2, tokens=7)
    entries = [json.loads(line) for line in (tmp_path / "soak.jsonl").read_text().splitlines()]
    assert len(entries) == 20
    assert all(e["bytes"] > 1 << 20 and not e["errors"] for e in entries)


def test_the_loader_fits_a_small_box(recipe: Any, bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe.edge(bundle, tokens=7)
    assert json.loads(capsys.readouterr().out)["peak_mib"] < 512
    with pytest.raises(SystemExit):
        recipe.edge(bundle, tokens=7, mib=16)
    assert "does not fit" in capsys.readouterr().out
