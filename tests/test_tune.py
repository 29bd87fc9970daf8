"""Tuning on a tiny model: candidates, discards, resumption, the winner, and what is refused."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar
from unittest.mock import Mock

import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from runs_tiny import channel_checkpoint, checkpoint, data, image_checkpoint, image_data
from test_lengths import by_size
from test_probe import table

from deploy_prune.bundle import Bundle
from deploy_prune.cli import invoke
from deploy_prune.config import load_settings
from deploy_prune.errors import InputError, SystemStateError
from deploy_prune.flags import split_lists
from deploy_prune.latency_table import LatencyTable
from deploy_prune.progress import Silent
from deploy_prune.runtime_bench.machine import describe_machine
from deploy_prune.tune import TuneSettings
from deploy_prune.tune.run import tune
from deploy_prune.tune.space import Form, Space
from deploy_prune.tune.workbench import Latency, Workbench


def said_in(capsys: pytest.CaptureFixture[str]) -> str:
    """Return what was printed since the last time, in one line."""
    captured = capsys.readouterr()
    return " ".join((captured.out + captured.err).split())


class Clock:
    """Stand for the bench: a candidate takes 1 us per byte of its weights, int8 half of that; `calls` lists its runs.

    Without `files` nothing is exported, a candidate is the better the larger it is, and no winner is published: what is
    tested then is the search.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, files: bool = False) -> None:
        self.calls: list[tuple[str, float]] = []
        self.dies_at: int | None = None
        self.slower_again = 1.0  # by which a second measurement is
        monkeypatch.setattr(Workbench, "measure", lambda bench, root, form, seconds: self(bench, root, form, seconds))
        if not files:
            monkeypatch.setattr(Workbench, "_export", lambda *given: None)
            monkeypatch.setattr(Workbench, "value", lambda bench, root, form: weights(root) / 1e6)
            monkeypatch.setattr("deploy_prune.tune.run._published", lambda winner, *given: winner)

    def __call__(self, bench: Workbench, root: Path, form: Form, seconds: float) -> Latency:
        if self.dies_at == len(self.calls):
            raise KeyboardInterrupt
        again = self.slower_again if seconds > bench.settings.seconds else 1.0
        ms = weights(root) / 1e3 * (0.5 if form.precision == "int8" else 1.0) * again
        self.calls.append((root.name, seconds))
        return Latency(ms, 0.98 * ms, 1.02 * ms, 0.02, 50.0, None)


def weights(root: Path) -> int:
    return (root / "sliced" / "model.safetensors").stat().st_size


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tune")
    checkpoint(root / "model")
    data(root / "data")
    kinds = {
        "head": {"size": 4, "width": 8, "counts": [0, 4], "ms": [0.0, 1.0]},
        "neuron": {"size": 24, "width": 1, "counts": [0, 24], "ms": [0.0, 1.0]},
    }
    for kind in kinds.values():
        kind |= {"low_ms": kind["ms"], "high_ms": kind["ms"]}  # type: ignore[operator]
    lut = table(seq=9, hidden=32, layers=3, base_ms=6.0, dense_ms=12.0, kinds=kinds)
    (root / "lut.json").write_text(json.dumps(lut))
    return root


def words(place: Path, out: Path, **changes: Any) -> list[str]:
    """Return the command on the tiny model; None leaves a flag out."""
    whole = json.loads((place / "lut.json").read_text())
    assert whole["runtime"] == "ort-cpu"
    flags = {
        "task": "text-classification",
        "data": place / "data",
        "lut": place / "lut.json",
        "target-latency-ms": 50,
        "max-quality-loss": 100,
        "precisions": "fp32",
        "dialects": "opset18",
        "samples": 64,
        "trials": 4,
        "seconds": 0.1,
        "threads": 1,
        "out": out,
    }
    given = {**flags, **{name.replace("_", "-"): value for name, value in changes.items()}}
    return ["tune", str(place / "model"), *(w for n, v in given.items() if v is not None for w in (f"--{n}", str(v)))]


def trials_of(out: Path) -> dict[str, Any]:
    return json.loads(out.with_name(f"{out.name}.tune").joinpath("trials.json").read_text())


def dense_ms(place: Path) -> float:
    return (place / "model" / "model.safetensors").stat().st_size / 1e3


def choices(document: Mapping[str, Any]) -> list[tuple[Any, ...]]:
    return [(r["keep"], r["align"], r["form"], r["state"]) for r in document["trials"]]


def test_a_winner_becomes_a_bundle(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Clock(monkeypatch, files=True)
    out, target = tmp_path / "best", 0.45 * dense_ms(place)  # which fp32 cannot reach, and int8 only when pruned
    assert invoke(words(place, out, target_latency_ms=target, precisions="fp32,int8", schemes="dynamic")) == 0
    shown = said_in(capsys)
    document = trials_of(out)
    records = {r["number"]: r for r in document["trials"]}
    winner = records[document["winner"]]
    assert winner["latency"]["high_ms"] <= target
    assert document["confirmed"]["high_ms"] <= target
    assert winner["loss"] == min(
        r["loss"] for r in records.values() if r["state"] == "measured" and r["latency"]["high_ms"] <= target
    )
    assert winner["loss"] == pytest.approx(100 * (document["dense_value"] - winner["value"]))
    forms = [r["form"].removeprefix("ort-cpu onnx-opset18-") for r in document["trials"][:2]]
    assert forms == ["fp32", "int8-dynamic"]
    assert all(r["keep"] == 1 for r in document["trials"][:2])
    assert document["counts"]["measured"] == 4
    assert document["why"] in shown
    assert "The front: quality against latency" in shown
    bundle = Bundle.open(out)
    assert winner["plan_hash"] == bundle.manifest.plan["hash"]
    assert winner["form"] == "ort-cpu onnx-opset18-int8-dynamic"
    assert ("sliced", "opset18", "dynamic") in {(a.variant, a.dialect, a.scheme) for a in bundle.manifest.artifacts}
    assert 0.1 < winner["keep"] < 1
    assert bundle.manifest.recipe["keep_flops"] == winner["keep"]
    assert not (out.with_name("best.tune") / "candidates").exists()


def test_a_discarded_candidate_is_never_made(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The table alone tells what is far off: too slow, or so fast that more could have stayed."""
    clock = Clock(monkeypatch)
    out, target = tmp_path / "best", 0.8 * dense_ms(place)
    settings = settings_of(place, out, target_latency_ms=target, trials=6, slack=0.1)
    found = tune(str(place / "model"), settings)
    left = [r for r in found.document["trials"] if r["state"] == "discarded"]
    discarded = [r for r in left if r["predicted_ms"] is not None]
    assert all("infeasible" in r["reason"] for r in left if r not in discarded)
    made = [r for r in found.document["trials"] if r["state"] == "measured"]
    assert {("above" if r["predicted_ms"] > target else "below") for r in discarded} == {"above", "below"}
    assert all(r["reason"].count("far above" if r["predicted_ms"] > target else "far below") for r in discarded)
    assert all(abs(r["predicted_ms"] / target - 1) <= 0.1 for r in made if r["keep"] < 1)
    assert len(clock.calls) == len(made) + 1  # and the winner again
    predicted = [r for r in made if r["keep"] < 1]
    assert predicted
    assert all("latency" not in r and "plan_hash" not in r for r in left)


def test_a_search_that_ends_without_its_trials_says_why(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Noted(Silent):
        notes: ClassVar[list[str]] = []

        def note(self, text: str) -> None:
            self.notes.append(text)

    Clock(monkeypatch)
    monkeypatch.setattr("deploy_prune.tune.search.ASKED_PER_TRIAL", 1)
    settings = settings_of(place, tmp_path / "best", target_latency_ms=0.8 * dense_ms(place), trials=6, slack=0.1)
    found = tune(str(place / "model"), settings, Noted())
    made = sum(r["state"] == "measured" for r in found.document["trials"])
    assert made < 6
    assert [note for note in Noted.notes if f"{made} candidates made of 6: of 6 proposals" in note]


def settings_of(place: Path, out: Path, **changes: Any) -> TuneSettings:
    flags = words(place, out, **changes)[2:]
    names = [name.removeprefix("--").replace("-", "_") for name in flags[::2]]
    given = split_lists(TuneSettings, dict(zip(names, flags[1::2], strict=True)))
    return load_settings(TuneSettings, None, "tune", **given)


def test_a_killed_search_goes_on(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It measures nothing twice, and chooses what a run that was not killed would have chosen."""
    clock = Clock(monkeypatch)
    target = 0.85 * dense_ms(place)
    whole = settings_of(place, tmp_path / "whole", target_latency_ms=target, trials=12)
    expected = tune(str(place / "model"), whole).document
    killed = settings_of(place, tmp_path / "killed", target_latency_ms=target, trials=12)
    clock.calls, clock.dies_at = [], 9  # when the optimiser has a model of its own
    with pytest.raises(KeyboardInterrupt):
        tune(str(place / "model"), killed)
    assert not (tmp_path / "killed").exists()
    clock.dies_at = None
    found = tune(str(place / "model"), killed).document
    assert choices(found) == choices(expected)
    assert [r.get("loss") for r in found["trials"]] == [r.get("loss") for r in expected["trials"]]
    assert (found["winner"] is None) is (expected["winner"] is None) is False
    measured = [number for number, seconds in clock.calls if seconds == killed.seconds]
    assert len(measured) == len(set(measured)) == 12
    clock.calls = []
    longer = settings_of(place, tmp_path / "killed", target_latency_ms=target, trials=13)
    more = tune(str(place / "model"), longer).document
    assert more["trials"][: len(found["trials"])] == found["trials"]
    assert len([seconds for _, seconds in clock.calls if seconds == killed.seconds]) == 1


def test_what_was_planned_when_the_search_was_killed_is_planned_anew(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between the plan and its trial: Optuna would give that one in the place of every later proposal."""
    Clock(monkeypatch)
    changes: dict[str, Any] = {"target_latency_ms": 0.85 * dense_ms(place), "trials": 5}
    expected = tune(str(place / "model"), settings_of(place, tmp_path / "whole", **changes)).document
    killed = settings_of(place, tmp_path / "killed", **changes)
    with monkeypatch.context() as patch:
        patch.setattr(optuna.Study, "ask", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            tune(str(place / "model"), killed)
    assert states_in(tmp_path / "killed.tune") == {"WAITING": 1}
    found = tune(str(place / "model"), killed).document
    assert choices(found) == choices(expected)
    assert [r["aimed"] for r in found["trials"]] == [r["aimed"] for r in expected["trials"]]
    assert states_in(tmp_path / "killed.tune") == {"FAIL": 1, **states_in(tmp_path / "whole.tune")}


def states_in(folder: Path) -> Counter[str]:
    """Count the trials of a journal's only study by their state."""
    storage = JournalStorage(JournalFileBackend(str(folder / "study.log")))
    (study,) = optuna.get_all_study_names(storage)
    return Counter(t.state.name for t in optuna.load_study(study_name=study, storage=storage).get_trials())


def test_an_interrupt_tells_what_is_kept(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock, out = Clock(monkeypatch), tmp_path / "best"
    clock.dies_at = 1
    assert invoke(words(place, out, target_latency_ms=0.85 * dense_ms(place), trials=3)) == 130
    shown = said_in(capsys)
    assert "Interrupted: no bundle was changed; what a run, sweep or tuning has finished is kept." in shown
    assert len(clock.calls) == 1
    assert out.with_name("best.tune").joinpath("study.log").stat().st_size > 0


def test_nothing_meets_both_limits(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Clock(monkeypatch)
    out = tmp_path / "best"
    assert invoke(words(place, out, target_latency_ms=0.001, trials=2, max_quality_loss=0)) == 1
    shown = said_in(capsys)
    assert "No candidate takes at most 0.001 ms and loses at most 0 points; no bundle was written." in shown
    assert "The front: quality against latency" in shown
    assert "is above 0.001 ms" in shown
    assert not out.exists()
    document = trials_of(out)
    assert document["winner"] is document["why"] is None
    made = [r for r in document["trials"] if r["state"] == "measured"]
    assert [r["keep"] == 1 for r in made] == [True, False]  # the nearest one is made, to say how near it is
    assert made[1]["predicted_ms"] == min(r["predicted_ms"] for r in document["trials"] if r["predicted_ms"])


def test_a_lucky_measurement_does_not_win(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    clock.slower_again = 10.0
    found = tune(str(place / "model"), settings_of(place, tmp_path / "best", target_latency_ms=2 * dense_ms(place)))
    assert found.bundle is None
    assert found.document["refuted"]
    assert all("measured again, latency" in line for line in found.document["near_misses"][:1])


def test_a_form_that_cannot_be_made_is_left_out(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)

    def broken(bench: Workbench, root: Path, form: Form, seconds: float) -> Latency:
        if form.precision == "int8":
            raise SystemStateError("the runtime has no such kernel")
        return clock(bench, root, form, seconds)

    monkeypatch.setattr(Workbench, "measure", broken)
    target = 0.85 * dense_ms(place)
    settings = settings_of(
        place, tmp_path / "best", target_latency_ms=target, precisions="int8,fp32", schemes="dynamic", trials=3
    )
    document = tune(str(place / "model"), settings).document
    failed = [r for r in document["trials"] if r["state"] == "failed"]
    assert [(r["keep"], r["reason"]) for r in failed] == [(1.0, "the runtime has no such kernel")]
    (line,) = document["not_made"]
    assert line == "#0 (dense, ort-cpu onnx-opset18-int8-dynamic): the runtime has no such kernel"
    assert document["winner"] is not None
    assert all("fp32" in r["form"] for r in document["trials"] if r["state"] == "measured")


def test_one_real_measurement(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a stand-in: fresh processes, the dense model beside the candidate, and its noise."""
    monkeypatch.setattr("deploy_prune.tune.run._published", lambda winner, *given: winner)
    settings = settings_of(place, tmp_path / "best", target_latency_ms=60_000, trials=1)
    document = tune(str(place / "model"), settings).document
    (only,) = [r for r in document["trials"] if r["state"] == "measured"]
    latency = only["latency"]
    assert 0 < latency["low_ms"] <= latency["median_ms"] <= latency["high_ms"]
    assert latency["high_ms"] >= latency["median_ms"] * (1 + latency["floor"]) * (1 - 1e-9)
    assert latency["ratio"]["low"] <= latency["ratio"]["value"] <= latency["ratio"]["high"]
    assert only["loss"] == pytest.approx(0, abs=1e-9)  # the dense model in fp32
    assert document["winner"] == only["number"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"target_latency_ms": None}, "name the latency to reach"),
        ({"target_latency_ms": 0}, "target_latency_ms = '0'"),
        ({"max_quality_loss": -1}, "max_quality_loss"),
        ({"runtimes": "abacus"}, "No runtime 'abacus'"),
        ({"runtimes": "torch"}, "The latency table is of ort-cpu, not of torch"),
        ({"precisions": "int3"}, "No precision 'int3'"),
        ({"precisions": "bf16"}, "No form of the model is left to choose from"),
        ({"aligns": "0"}, "aligns"),
        ({"seq_len": 12}, "The latency table is of batch 1 and 9 tokens, the target of batch 1 and 12 tokens"),
        ({"batch": 4}, "of batch 4 and 9 tokens"),
        ({"lut": "nowhere.json"}, "Could not read the latency table"),
        ({"task": "sst3"}, "sst3"),
    ],
)
def test_bad_input_is_refused(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], said: str
) -> None:
    assert invoke(words(place, tmp_path / "best", **changes)) == 2
    assert said in said_in(capsys)
    assert not (tmp_path / "best").exists()


def test_a_runtime_may_be_named_in_the_singular(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert invoke(words(place, tmp_path / "best", runtime="abacus")) == 2
    assert "No runtime 'abacus'" in said_in(capsys)
    assert invoke(words(place, tmp_path / "best", runtime="torch")) == 2
    assert "The latency table is of ort-cpu, not of torch" in said_in(capsys)


def test_tables_of_several_lengths_will_do(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Clock(monkeypatch)
    one = json.loads((place / "lut.json").read_text())
    several = tmp_path / "lut.json"
    several.write_text(json.dumps({"kind": "lengths", "tables": [one | {"seq": 4}, one | {"seq": 16}]}))
    changes = {"lut": several, "target_latency_ms": 0.85 * dense_ms(place), "trials": 2}
    document = tune(str(place / "model"), settings_of(place, tmp_path / "best", seq_len=12, **changes)).document
    assert [r["state"] for r in document["trials"]] == ["measured", "measured"]
    assert document["seq_len"] == 12
    with pytest.raises(InputError, match="for length 20, the latency table was probed from 4 to 16 tokens"):
        tune(str(place / "model"), settings_of(place, tmp_path / "best", seq_len=20, **changes))


@pytest.mark.parametrize(("batches", "said"), [((8,), "8"), ((2, 8), "2, 8")])
def test_tables_of_another_batch_are_refused(
    batches: tuple[int, ...], said: str, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = json.loads((place / "lut.json").read_text())
    tables = [one | {"batch": batch, "seq": seq} for batch in batches for seq in (4, 16)]
    several = tmp_path / "lut.json"
    several.write_text(json.dumps({"kind": "lengths", "tables": tables}))
    assert invoke(words(place, tmp_path / "best", lut=several)) == 2
    assert f"The latency table is of batch {said}, the target of batch 1." in said_in(capsys)


def test_quality_needs_labels(tmp_path: Path, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = data(tmp_path / "unlabelled", label=False)
    assert invoke(words(place, tmp_path / "best", data=rows)) == 2
    assert "needs labelled evaluation data" in said_in(capsys)


def test_a_broken_journal_is_no_crash(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "best"
    out.with_name("best.tune").mkdir()
    (tmp_path / "best.tune" / "study.log").write_text("{broken}\n{}\n")
    assert invoke(words(place, out)) == 4
    assert "The study in" in said_in(capsys)


def test_what_a_kill_left_of_the_journal_is_mended(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Clock(monkeypatch)
    settings = settings_of(place, tmp_path / "best", target_latency_ms=0.85 * dense_ms(place), trials=2)
    found = tune(str(place / "model"), settings).document
    journal = tmp_path / "best.tune" / "study.log"
    whole = journal.read_bytes()
    journal.write_bytes(whole + b'{"op_code": 4, "half')
    journal.with_name("study.log.lock").symlink_to(journal)
    assert tune(str(place / "model"), settings).document["trials"] == found["trials"]
    assert journal.read_bytes().startswith(whole)
    assert b"half" not in journal.read_bytes()


def test_the_prediction_learns_from_what_was_measured(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The table says 50 % at the least, the clock goes by all weights: the second aim is nearer than the first."""
    Clock(monkeypatch)
    target = 0.8 * dense_ms(place)
    settings = settings_of(place, tmp_path / "best", target_latency_ms=target, trials=3)
    document = tune(str(place / "model"), settings).document
    first, second = (r for r in document["trials"] if r["aimed"] and r["keep"] < 1)
    assert first["predicted_ms"] == pytest.approx(first["table_ms"])
    off = first["latency"]["median_ms"] / first["table_ms"]
    assert second["predicted_ms"] == pytest.approx(off * second["table_ms"])
    misses = [abs(r["latency"]["median_ms"] / r["predicted_ms"] - 1) for r in (first, second)]
    assert misses[1] < misses[0]
    assert first["predicted_ms"] * 1.02 <= target  # the upper end is what is aimed


def test_an_aim_that_was_late_is_followed_by_a_lower_one(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Clock(monkeypatch)
    monkeypatch.setattr("deploy_prune.tune.forecast.Forecast.largest", lambda *given: 70)
    settings = settings_of(place, tmp_path / "best", target_latency_ms=0.5 * dense_ms(place), trials=4, slack=9)
    document = tune(str(place / "model"), settings).document
    assert [r["keep"] for r in document["trials"]] == [1.0, 0.7, 0.65, 0.6]


@pytest.mark.parametrize("changed", ["cpu", "versions", "probe_seconds", "nothing"])
def test_a_table_of_another_machine_or_probe_is_not_taken(
    changed: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Clock(monkeypatch)
    probed = []
    lut = LatencyTable.model_validate_json((place / "lut.json").read_text())

    def probe(source: str, **how: Any) -> LatencyTable:
        probed.append(how["seconds"])
        return lut

    monkeypatch.setattr("deploy_prune.tune.run.probe", probe)
    changes: dict[str, Any] = {"lut": None, "seq_len": 9, "target_latency_ms": 2 * dense_ms(place), "trials": 1}
    tune(str(place / "model"), settings_of(place, tmp_path / "best", **changes))
    if changed == "probe_seconds":
        changes[changed] = 2.0
    elif changed != "nothing":
        other = {**describe_machine(1), changed: "another"}
        monkeypatch.setattr("deploy_prune.tune.run.describe_machine", lambda threads: other)
    tune(str(place / "model"), settings_of(place, tmp_path / "best", **changes))
    assert probed == ([1.0] if changed == "nothing" else [1.0, changes.get("probe_seconds", 1.0)])


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_images_are_tuned_and_probed_first(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a table one is probed, once; transformers and convolutional networks alike."""
    Clock(monkeypatch)
    monkeypatch.setattr("deploy_prune.probing.time_bundles", by_size)
    make = channel_checkpoint if kind == "resnet" else image_checkpoint
    model = make(tmp_path / "model", kind)
    settings = TuneSettings(
        task="image-classification",
        data=str(image_data(tmp_path / "images.npz")),
        runtimes=("torch",),
        target_latency_ms=0.8 * (model / "model.safetensors").stat().st_size / 1e3,
        max_quality_loss=100,
        samples=64,
        trials=3,
        probe_widths=2,
        threads=1,
        out=str(tmp_path / "best"),
    )
    found = tune(str(model), settings).document
    cut = [r for r in found["trials"] if r["keep"] < 1 and r["state"] == "measured"]
    assert cut
    assert all(r["form"] == "torch checkpoint" and r["predicted_ms"] > 0 for r in cut)
    monkeypatch.setattr("deploy_prune.probing.time_bundles", None)  # what was probed is read again
    assert tune(str(model), settings).document["trials"] == found["trials"]


def test_the_space_names_what_it_leaves_out(place: Path, tmp_path: Path) -> None:
    settings = settings_of(place, tmp_path / "best", precisions="fp32,fp16,bf16,int8", dialects="opset23,mha")
    space = Space.of(settings)
    names = [form.name.removeprefix("ort-cpu onnx-") for form in space.forms]
    assert names == ["opset23-fp32", "mha-fp32", "opset23-fp16", "mha-fp16", "opset23-int8-dynamic", "opset23-int8-qdq"]
    assert any("bf16" in line for line in space.left_out)
    study = optuna.create_study(directions=["minimize", "minimize"], sampler=optuna.samplers.TPESampler(seed=0))
    drawn = [space.suggest(study.ask()) for _ in range(20)]
    assert {c.align for c in drawn} <= set(settings.aligns)
    assert all(10 <= c.percent <= 100 for c in drawn)
    with pytest.raises(InputError, match="name the latency"):
        load_settings(TuneSettings, None, "tune")
