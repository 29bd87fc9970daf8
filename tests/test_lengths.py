"""Budgets over the data's lengths from the command line: the probe of several shapes, the run, what is shown of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from runs_tiny import channel_checkpoint, checkpoint, data, image_checkpoint, image_data

from deploy_prune.bundle import Bundle
from deploy_prune.cli import invoke
from deploy_prune.config import load_recipe
from deploy_prune.errors import InputError
from deploy_prune.latency_table import LatencyTables, read_latency_table
from deploy_prune.runtime_bench.bench import Place
from deploy_prune.runtime_bench.report import render_report


def said_in(capsys: pytest.CaptureFixture[str]) -> str:
    """Return what was printed since the last time, in one line."""
    captured = capsys.readouterr()
    return " ".join((captured.out + captured.err).split())


def test_the_whole_way(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deploy_prune.probing.time_bundles", by_size)
    model, rows = checkpoint(tmp_path / "model"), data(tmp_path / "data")
    lut, out = tmp_path / "lut.json", tmp_path / "bundle"
    probe = ["probe", str(model), "--runtime", "torch", "--widths", "1", "--out", str(lut)]
    assert invoke([*probe, "--seq", "24,4", "--batch", "1,4"]) == 0
    shown = said_in(capsys)
    assert all(f"torch, batch {b}, {n} tokens: dense" in shown for b in (1, 4) for n in (4, 24))
    tables = read_latency_table(lut)
    assert isinstance(tables, LatencyTables)
    assert [(t.batch, t.seq) for t in tables.tables] == [(1, 4), (1, 24), (4, 4), (4, 24)]
    dense_ms = tables.tables[0].dense_ms / 4  # a token's

    common = ["prune", str(model), "--data", str(rows), "--task", "text-classification", "--samples", "64"]
    both = ["--keep-flops", "0.6", "--keep-latency", "0.7", "--lut", str(lut), "--lengths", "data"]
    assert invoke([*common, *both, "--lengths-batch", "4", "--out", str(out)]) == 0
    said_in(capsys)
    bundle = Bundle.open(out)
    budget = bundle.manifest.budget
    assert all(x["reached"] <= x["limit"] for x in budget["limits"])
    lengths, kept = budget["lengths"], budget["kept_flops"]
    assert (lengths["rows"], lengths["batch"]) == (64, 4)
    assert budget["seq_len"] == int(np.ceil(lengths["mean"]))
    flops = next(x for x in budget["limits"] if x["kind"] == "flops")
    assert kept["all"] == pytest.approx(flops["reached"] / flops["dense"])
    dense = bundle.manifest.counts["dense"]["encoder_flops"]
    at_mean = next(x["share"] for x in kept["at"] if x["tokens"] == budget["seq_len"])
    assert at_mean == pytest.approx(bundle.manifest.counts["sliced"]["encoder_flops"] / dense)
    assert invoke(["inspect", str(out)]) == 0
    shown = said_in(capsys)
    assert "keep 0.6 over the data's lengths" in shown
    assert "over the lengths of 64 rows in batches of 4, each padded to its longest: mean" in shown
    assert f"FLOPs kept: {100 * kept['all']:.1f}% over all of them" in shown
    assert "over the lengths of 64 rows in batches of 4" in " ".join(render_report(bundle).split()).replace(
        "&#39;", "'"
    )

    assert invoke([*common, *both, "--lengths-batch", "2", "--out", str(out)]) == 2
    assert "for batches of 2, the latency table was probed at 1, 4" in said_in(capsys)
    one = ["--keep-latency", "0.7", "--lut", str(lut), "--out", str(out)]
    assert invoke([*common, *one, "--seq-len", "30"]) == 2
    assert "for length 30, the latency table was probed from 4 to 24 tokens" in said_in(capsys)
    assert Bundle.open(out).manifest.budget == budget  # as it was
    assert invoke([*common, *one, "--seq-len", "14", "--lengths-batch", "4"]) == 0
    (limit,) = Bundle.open(out).manifest.budget["limits"]
    assert limit["dense"] == pytest.approx(4 * 14 * dense_ms, rel=0.01)


def by_size(roots: Mapping[str, Path], place: Place, seconds: float) -> dict[str, list[float]]:
    """Stand for the clock: a model takes 1 ns per byte of its weights and token."""
    sizes = {name: (root / "sliced" / "model.safetensors").stat().st_size for name, root in roots.items()}
    return {name: [float(size * place.batch * place.seq)] * 4 for name, size in sizes.items()}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"lengths": "some"}, "lengths = 'some'"),
        ({"lengths": "data", "seq_len": 8}, "has no seq_len"),
        ({"lengths_batch": 8}, "neither lengths = data nor a latency table"),
        ({"lengths": "data", "lengths_batch": 0}, "lengths_batch = 0"),
        ({"lengths": "data", "keep_params": 0.5}, "bounds neither FLOPs nor latency"),
    ],
)
def test_what_is_asked_in_vain_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        load_recipe(model="demo", **changes)


def test_a_bundle_is_named_by_its_lengths() -> None:
    assert load_recipe(model="m", lengths="data").destination("sst2").name == "m-sst2-0.5-lengths1"
    assert load_recipe(model="m").destination("sst2").name == "m-sst2-0.5"


def test_images_have_no_lengths(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    vit, cnn = image_checkpoint(tmp_path / "vit"), channel_checkpoint(tmp_path / "cnn", "resnet")
    rows = image_data(tmp_path / "images.npz")
    for model in (vit, cnn):
        words = ["prune", str(model), "--data", str(rows), "--task", "image-classification", "--lengths", "data"]
        assert invoke([*words, "--out", str(tmp_path / "bundle")]) == 2
        assert "they have no lengths to budget over" in said_in(capsys)
    probe = ["probe", "--out", str(tmp_path / "lut.json"), "--seconds", "0.02"]
    assert invoke([*probe, str(vit), "--seq", "8,16"]) == 2
    assert "The model makes 17 tokens of every image" in said_in(capsys)
    assert invoke([*probe, str(cnn), "--batch", "1,8"]) == 2
    assert "table is of one batch" in said_in(capsys)
    assert not (tmp_path / "lut.json").exists()


def test_lengths_that_are_no_numbers_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = str(checkpoint(tmp_path / "model"))
    for words, said in ((["--seq", "8,x"], "not a list of whole numbers"), (["--seq", ","], "must be 1 or more")):
        assert invoke(["probe", model, "--out", str(tmp_path / "lut.json"), *words]) == 2
        assert said in said_in(capsys)
