"""The latency table: measured on real cut models, additive, monotone, and a budget of the search."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conv_tiny import tiny_cnn
from runs_tiny import checkpoint, data, image_checkpoint, linear_costs
from test_core_search import toy_groups

from deploy_prune.bundle import Bundle
from deploy_prune.channel_costs import work_classes
from deploy_prune.channel_pruner import ChannelPruner
from deploy_prune.cli import invoke
from deploy_prune.costs import Budget, latency_table
from deploy_prune.errors import InputError
from deploy_prune.heads import Head
from deploy_prune.latency_table import ChannelLatency, LatencyTable, read_latency_table
from deploy_prune.probing import Measured, channel_plans, channel_table, probe
from deploy_prune.progress import Silent
from deploy_prune.runtime_bench.bench import Place
from deploy_prune.runtime_bench.probe import Point, grid, kind_tables
from deploy_prune.runtime_bench.stats import Ratio
from deploy_prune.signature import Signature
from deploy_prune.stages import Options
from deploy_prune.surgery import ChannelSurgery, surgery_of
from deploy_prune.tasks.base import Row


def table(**changes: Any) -> dict[str, Any]:
    """Return a table for toy_groups(): 3 heads of width 2 and 4 neurons on 6 features, 2 layers."""
    kinds = {
        "head": {"size": 3, "width": 2, "counts": [0, 1, 2, 3], "ms": [0.0, 1.0, 1.5, 2.0]},
        "neuron": {"size": 4, "width": 1, "counts": [0, 2, 4], "ms": [0.0, 2.0, 3.0]},
    }
    for kind in kinds.values():
        kind |= {"low_ms": kind["ms"], "high_ms": kind["ms"]}  # type: ignore[operator]
    whole = {"runtime": "ort-cpu", "batch": 1, "seq": 8, "hidden": 6, "layers": 2, "base_ms": 1.0, "dense_ms": 11.0}
    return whole | {"kinds": kinds} | changes


def test_the_grid_holds_every_head_count_and_the_corners() -> None:
    points = grid(4, 100, 3)
    assert {Point(h, 50) for h in range(5)} <= set(points)
    assert [p.neurons for p in points if p.heads == 2] == [50, 0, 33, 67, 100]
    assert {Point(4, 100), Point(0, 100), Point(4, 0), Point(0, 0)} <= set(points)
    assert len(points) == len(set(points))


def test_layer_costs_are_recovered_from_whole_models() -> None:
    """Latencies that are additive give back the costs they were made of; noise does not make them fall."""
    heads, neurons, layers, base = 3, 8, 5, 2.0
    head_ms, neuron_ms = [0.0, 0.5, 0.6, 1.0], np.linspace(0, 1.6, neurons + 1)
    dense = base + layers * (head_ms[-1] + neuron_ms[-1])

    def ratio(p: Point, wobble: float = 0.0) -> Ratio:
        value = (base + layers * (head_ms[p.heads] + neuron_ms[p.neurons])) / dense + wobble
        return Ratio(value, value - 0.01, value + 0.01)

    points = grid(heads, neurons, 4)
    kinds, found_base = kind_tables({p: ratio(p) for p in points}, dense, layers, heads, 2, neurons)
    assert kinds["head"].ms == pytest.approx(head_ms)
    assert kinds["neuron"].ms == pytest.approx(list(neuron_ms[kinds["neuron"].counts]))
    assert found_base == pytest.approx(base)
    faster = {p: ratio(p, -0.03 * (p.heads < heads and p.neurons < neurons)) for p in points}
    kinds, _ = kind_tables(faster, dense, layers, heads, 2, neurons)  # cutting both kinds gains more than the sum

    def predicted(p: Point) -> float:
        saved = [kinds["head"].ms[-1] - kinds["head"].ms[p.heads]]
        saved.append(kinds["neuron"].ms[-1] - kinds["neuron"].ms[kinds["neuron"].counts.index(p.neurons)])
        return 1 - layers * sum(saved) / dense

    assert predicted(Point(1, 4)) == pytest.approx(faster[Point(1, 4)].value, abs=0.01)
    noisy = {p: ratio(p, 0.05 * (-1) ** i) for i, p in enumerate(points)}
    kinds, _ = kind_tables(noisy, dense, layers, heads, 2, neurons)
    assert all(a <= b for kind in kinds.values() for a, b in zip(kind.ms, kind.ms[1:], strict=False))
    for kind in kinds.values():
        assert all(lo <= ms <= hi for lo, ms, hi in zip(kind.low_ms, kind.ms, kind.high_ms, strict=True))


def test_costs_add_up_to_the_dense_latency() -> None:
    groups = toy_groups()
    costs = latency_table(groups, LatencyTable.model_validate(table()))
    assert costs.dense == pytest.approx(11.0)
    assert costs.groups["L01.neurons"].tolist() == [0.0, 1.0, 2.0, 2.5, 3.0]
    limits = Budget(keep_latency=0.5, lut=LatencyTable.model_validate(table())).limits(groups, 8, 0)
    assert [x.table.kind for x in limits] == ["latency"]
    assert limits[0].most == pytest.approx(5.5)


@pytest.mark.parametrize(
    ("changes", "said"),
    [({"heads": 4}, "another architecture"), ({"neurons": 5}, "another architecture"), ({"layers": 3}, "2 layers")],
)
def test_a_table_of_other_shapes_is_refused(changes: dict[str, int], said: str) -> None:
    with pytest.raises(InputError, match=said):
        latency_table(toy_groups(**changes), LatencyTable.model_validate(table()))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "Could not read"),
        ("{", "not a latency table"),
        ("{}", "Field required"),
        (json.dumps(table(schema_version="2.0")), "1.0"),
        (json.dumps(table()).replace("[0.0, 1.0, 1.5, 2.0]", "[0.0, 1.0, 0.5, 2.0]", 1), "must not fall"),
        (json.dumps(table()).replace("[0, 1, 2, 3]", "[0, 1, 1, 3]"), "rise from 0 to 3"),
    ],
)
def test_files_that_are_no_table_are_refused(text: str | None, said: str, tmp_path: Path) -> None:
    path = tmp_path / "lut.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(InputError, match=said):
        read_latency_table(path)


def test_probing_measures_a_real_model(tmp_path: Path) -> None:
    model = checkpoint(tmp_path / "model")
    shares: list[float] = []
    found = probe(
        str(model), runtime="torch", seq=8, widths=2, threads=1, seconds=0.05, progress=lambda s: shares.append(s)
    )
    assert (found.runtime, found.seq, found.hidden, found.layers) == ("torch", 8, 32, 3)
    assert found.kinds["head"].counts == [0, 1, 2, 3, 4]
    assert found.kinds["neuron"].counts == [0, 12, 24]
    whole = found.base_ms + found.layers * sum(kind.ms[-1] for kind in found.kinds.values())
    assert found.base_ms == 0 or whole == pytest.approx(found.dense_ms)
    assert shares == sorted(shares)
    assert shares[-1] == 1.0


def test_a_latency_budget_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, rows = checkpoint(tmp_path / "model"), data(tmp_path / "data")
    lut, out = tmp_path / "lut.json", tmp_path / "bundle"
    words = ["probe", str(model), "--seq", "8", "--widths", "2", "--seconds", "0.05", "--out", str(lut)]
    assert invoke(words) == 0
    assert "cannot be cut" in " ".join(capsys.readouterr().out.split())
    linear_costs(lut)
    common = ["prune", str(model), "--data", str(rows), "--task", "text-classification", "--out", str(out)]
    assert invoke([*common, "--keep-latency", "0.6", "--lut", str(lut), "--keep-params", "0.7"]) == 0
    budget = Bundle.open(out).manifest.budget
    assert [x["kind"] for x in budget["limits"]] == ["params", "latency"]
    assert all(x["reached"] <= x["limit"] for x in budget["limits"])
    assert budget["keep"] == 0.7
    capsys.readouterr()
    assert invoke(["inspect", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "params: " in shown
    assert "latency: " in shown
    assert invoke([*common, "--keep-latency", "0.6"]) == 2
    assert "cannot be used: a latency budget needs a measured table" in " ".join(capsys.readouterr().err.split())
    assert invoke([*common, "--keep-latency", "0.05", "--lut", str(lut)]) == 2
    assert "keep_latency 0.05 is infeasible" in " ".join(capsys.readouterr().err.split())


def test_what_cannot_be_probed_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = str(checkpoint(tmp_path / "model"))
    out = tmp_path / "lut.json"
    for words, said in ((["--seq", "900"], "48 positions"), (["--runtime", "abacus"], "No runtime 'abacus'")):
        assert invoke(["probe", model, "--out", str(out), *words]) == 2
        assert said in capsys.readouterr().err
    assert not out.exists()
    assert invoke(["probe", model, "--out", str(tmp_path / "nowhere" / "lut.json")]) == 2
    assert "No folder" in capsys.readouterr().err


def test_bytes_bind_the_whole_model(tmp_path: Path) -> None:
    model, rows = checkpoint(tmp_path / "model"), data(tmp_path / "data")
    common = ["prune", str(model), "--data", str(rows), "--task", "text-classification", "--out", str(tmp_path / "b")]
    assert invoke([*common, "--max-bytes", "60000", "--align", "8"]) == 0
    manifest = Bundle.open(tmp_path / "b").manifest
    assert manifest.budget["kind"] == "bytes"
    assert manifest.counts["sliced"]["weight_bytes"] == manifest.budget["limits"][0]["reached"] <= 60_000
    assert manifest.counts["dense"]["weight_bytes"] == manifest.budget["limits"][0]["dense"]
    assert all(layer["neurons"] % 8 == 0 for layer in manifest.plan["layers"])


def channel_latency_table(widths: int = 2, batch: int = 1) -> ChannelLatency:
    """Return a table of a tiny network at 3 x 16 x 16, whose latency is its FLOPs."""
    surgery = surgery_of(tiny_cnn("vgg"), (3, 16, 16))
    assert isinstance(surgery, ChannelSurgery)
    shares: list[float] = []

    def ratios(plans: Any) -> list[Measured]:
        shares.extend(surgery.flops_of(plan) / surgery.flops(1) for plan in plans)
        return [([Ratio(s, s, s) for s in shares], 10.0)]

    return channel_table(
        surgery, Signature(("pixel_values",), (3, 16, 16), 1), Place("ort-cpu", batch, 1, 1), widths, ratios
    )


def test_a_convolutional_network_is_probed_at_one_width() -> None:
    found = channel_latency_table(widths=1)
    assert len(found.points) == 3
    assert found.largest_error == found.mean_error  # of the one network that was held out
    assert 0 <= found.largest_error < 1


def test_channels_are_probed_at_the_multiples_that_plans_will_have() -> None:
    surgery = surgery_of(tiny_cnn("vgg"), (3, 16, 16))
    assert isinstance(surgery, ChannelSurgery)
    class_of = work_classes(surgery.graph)[1]
    free, aligned = (channel_plans(surgery.groups, class_of, 6, align) for align in (1, 4))
    assert len(free) == len(aligned) == 5 + 12
    sizes = {g.name: g.size for g in surgery.groups}
    assert all(n % 4 == 0 or n == sizes[name] for plan in aligned for name, n in plan.items())
    assert all(abs(plan[name] - other[name]) <= 4 for plan, other in zip(free, aligned, strict=True) for name in plan)
    assert any(n % 4 for plan in free for n in plan.values())


def test_a_probe_of_heads_and_widths_is_not_aligned(tmp_path: Path) -> None:
    model = image_checkpoint(tmp_path / "model", "vit")
    with pytest.raises(InputError, match="interpolated"):
        probe(str(model), align=8)


@pytest.mark.parametrize(
    ("edge", "asked", "said"),
    [
        (24, None, "measured on images of 3 x 16 x 16, the model is given 3 x 24 x 24"),
        (16, 8, "for batches of 8, the latency table was probed at 4"),
        (16, 4, None),
        (16, None, None),
    ],
)
def test_a_channel_table_of_another_image_size_or_batch_is_refused(
    edge: int, asked: int | None, said: str | None
) -> None:
    table, images = channel_latency_table(batch=4), np.zeros((32, 3, edge, edge), np.float32)
    rows = [Row({"pixel_values": image}, 0, tokens=1) for image in images]
    pruner = ChannelPruner(tiny_cnn("vgg"), Head("classification"), rows)
    budget = Budget(keep_latency=0.5, lut=table, lengths_batch=asked)
    if said is None:
        (limit,) = pruner.limits(budget, budget.lengths_over(rows))
        assert limit.most == pytest.approx(0.5 * table.points[0].fitted_ms)
        return
    with pytest.raises(InputError, match=said):
        pruner.limits(budget, budget.lengths_over(rows))


@pytest.mark.parametrize(("align", "told"), [(1, True), (6, True), (4, False), (8, False)])
def test_plans_of_other_multiples_than_the_table_are_told(align: int, told: bool) -> None:
    table, images = channel_latency_table(), np.zeros((32, 3, 16, 16), np.float32)
    notes: list[str] = []
    reporter = Silent()
    reporter.note = notes.append  # type: ignore[method-assign]
    rows = [Row({"pixel_values": image}, 0, tokens=1) for image in images]
    pruner = ChannelPruner(tiny_cnn("vgg"), Head("classification"), rows, reporter=reporter)
    budget = Budget(keep_latency=0.9, lut=table.model_copy(update={"align": 4}))
    pruner.prune(budget, Options(align=align, compensate="none", criterion="magnitude-l1-out"))
    assert any(f"at multiples of 4 channels, and predicts those of {align}" in note for note in notes) == told
