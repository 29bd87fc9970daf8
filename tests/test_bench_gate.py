"""The gate: what its statistics promise, what it says of which machine, and real runs of equal and slower files."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import onnx
import pytest
import yaml
from bundles_tiny import exported_bundle

from deploy_prune.bundle import Bundle
from deploy_prune.cli import invoke
from deploy_prune.config import GateSettings
from deploy_prune.errors import InputError, SystemStateError, VerdictError
from deploy_prune.export import export_bundle
from deploy_prune.runtime_bench.bench import Place, Timed
from deploy_prune.runtime_bench.gate import (
    Session,
    Verdict,
    choose_clock,
    gate_paths,
    judge,
    read_session,
    recorded_quality,
)
from deploy_prune.runtime_bench.gate_report import (
    append_history,
    as_markdown,
    draw_trend,
    github_annotations,
    read_history,
    write_junit,
)
from deploy_prune.runtime_bench.sequential import Plan, estimate, run_plan
from deploy_prune.runtime_bench.slowdown import slow_down
from deploy_prune.runtime_bench.subjects import Subject
from deploy_prune.runtime_bench.timing import Samples
from deploy_prune.runtimes import open_onnx

ROOT = Path(__file__).resolve().parents[1]
PLAN = Plan()
PLACE = Place("ort-cpu", 1, 12, 1)
MODEL = Subject("m", "m.onnx")


def decisions(ratio: float, spread: float, trials: int, seed: int = 0) -> list[str | None]:
    draws = np.random.default_rng(seed).normal(math.log(ratio), spread, (trials, PLAN.sessions))
    return [run_plan(list(row), 1.02, PLAN)[0] for row in draws]


@pytest.mark.parametrize("spread", [0.003, 0.02, 0.2])
def test_what_is_at_the_limit_is_seldom_called_slower_however_noisy(spread: float) -> None:
    slower = decisions(1.02, spread, 4000).count("slower")
    assert slower <= 4000 * 0.003 + 4 * math.sqrt(4000 * 0.003)
    assert decisions(1.0, spread, 4000, seed=1).count("slower") <= slower + 8


@pytest.mark.parametrize("spread", [0.003, 0.02])
def test_slow_downs_are_seen_and_never_waved_through(spread: float) -> None:
    five, ten = decisions(1.05, spread, 1000), decisions(1.10, spread, 1000)
    assert five.count("slower") >= 950
    assert ten.count("slower") >= 999
    assert five.count("within") + ten.count("within") <= 2


def test_it_stops_early_when_it_is_sure_either_way() -> None:
    rng = np.random.default_rng(0)
    for ratio, expected in ((0.6, "within"), (1.5, "slower")):
        decision, sessions, found = run_plan(list(rng.normal(math.log(ratio), 0.01, 24)), 1.02, PLAN)
        assert (decision, sessions) == (expected, 4)
        assert found.low < ratio < found.high


def test_what_it_says_it_sees_it_sees() -> None:
    """`visible` is called slower with 90 % chance by a look like the one that named it."""
    rng = np.random.default_rng(0)
    spread, n = 0.02, 24
    visible = np.median([estimate(list(rng.normal(0, spread, n)), 1.02, PLAN).visible for _ in range(300)])
    seen = [estimate(list(rng.normal(math.log(visible), spread, n)), 1.02, PLAN).low > 1.02 for _ in range(2000)]
    assert 0.85 <= np.mean(seen) <= 0.95


def sessions(ratio: float, spread: float, *, seed: int = 0, new_ms: float = 10.0, peak: int = 100) -> Any:
    rng = np.random.default_rng(seed)

    def measure(seconds: float) -> Session:
        wall, cpu = rng.normal(0, spread, 2), rng.normal(0, 3 * spread, 2)
        return Session(
            new={"wall": math.log(ratio) + wall[0], "cpu": math.log(ratio) + cpu[0]},
            control={"wall": wall[1], "cpu": cpu[1]},
            new_ms={"wall": new_ms * math.exp(wall[0]), "cpu": new_ms},
            base_ms={"wall": new_ms / ratio, "cpu": new_ms / ratio},
            peak_bytes={"new": peak, "base": 100, "control": 101},
        )

    return measure


def judged(measure: Callable[[float], Session], base: Subject | None = MODEL, **settings: Any) -> Verdict:
    return judge(MODEL, base, GateSettings(**({"max_slowdown": 1.02} | settings)), PLACE, measure=measure)


@pytest.mark.parametrize(
    ("ratio", "spread", "outcome", "words", "taken"),
    [
        (1.0, 0.003, "passed", "times the base's wall time", 4),
        (1.1, 0.003, "failed", "allowed 1.02", 4),
        (1.02, 0.01, "passed", "Nothing beyond the limit was found", 24),
        (1.0, 0.3, "too noisy", "would have been seen 9 times in 10, not 1.051", 24),
        (1.06, 0.1, "too noisy", "too noisy to tell", 24),
    ],
)
def test_verdicts(ratio: float, spread: float, outcome: str, words: str, taken: int) -> None:
    verdict = judged(sessions(ratio, spread))
    (check,) = verdict.checks
    assert (verdict.outcome, check.name, len(verdict.sessions)) == (outcome, "slowdown", taken)
    assert words in check.text
    assert json.loads(json.dumps(verdict.to_dict()))["outcome"] == outcome
    for bad, error in (("failed", VerdictError), ("too noisy", SystemStateError)):
        if outcome == bad:
            with pytest.raises(error, match="allowed"):
                verdict.check()
    if outcome == "passed":
        verdict.check()


def test_a_coarser_resolution_lets_a_noisy_machine_pass_and_says_what_it_missed() -> None:
    verdict = judged(sessions(1.0, 0.1), resolution=0.5)
    assert verdict.outcome == "passed"
    noisy = judged(sessions(1.0, 0.1))
    assert noisy.outcome == "too noisy"
    assert noisy.checks[0].details["visible"] == verdict.checks[0].details["visible"]


def test_absolute_latency_and_memory() -> None:
    found = judged(sessions(1.0, 0.003, peak=120), max_latency_ms=5.0, max_memory=1.1)
    assert [(c.name, c.outcome) for c in found.checks] == [
        ("slowdown", "passed"),
        ("latency", "failed"),
        ("memory", "failed"),
    ]
    assert found.outcome == "failed"
    alone = judged(sessions(1.0, 0.003), base=None, max_latency_ms=20.0)
    assert [(c.name, c.outcome) for c in alone.checks] == [("latency", "passed")]
    assert judged(sessions(1.0, 0.3), base=None, max_latency_ms=10.0).outcome == "too noisy"
    with pytest.raises(InputError, match="--max-memory compares"):
        judged(sessions(1.0, 0.01), base=None, max_memory=1.1)


def test_failed_outweighs_too_noisy() -> None:
    verdict = judged(sessions(1.0, 0.3, peak=200), max_memory=1.1)
    assert [c.outcome for c in verdict.checks] == ["too noisy", "failed"]
    assert verdict.outcome == "failed"


def test_the_clock_is_the_one_by_which_the_base_agrees_with_itself() -> None:
    quiet_wall = [sessions(1.5, 0.01, seed=i)(1.0) for i in range(6)]
    assert choose_clock(quiet_wall, "auto") == "wall"
    swapped = [
        Session(s.new, {"wall": s.control["cpu"], "cpu": s.control["wall"]}, s.new_ms, s.base_ms, s.peak_bytes)
        for s in quiet_wall
    ]
    assert choose_clock(swapped, "auto") == "cpu"
    assert choose_clock(swapped, "wall") == "wall"
    coarse = [Session(s.new, s.control, s.new_ms, {"wall": 1.0, "cpu": 0.0}, s.peak_bytes) for s in swapped]
    assert choose_clock(coarse, "auto") == "wall"


def test_a_session_is_paired_round_by_round_and_spikes_are_trimmed() -> None:
    load = np.random.default_rng(0).lognormal(0, 1, 30)
    spiky = load.copy()
    spiky[[3, 17]] *= 40
    rounds = {"base": load, "control": 1.01 * load, "new": 1.2 * spiky}
    samples = {
        name: Samples([[int(1e7 * v)] for v in values], [[int(2e7 * v)] for v in values])
        for name, values in rounds.items()
    }
    session = read_session(Timed(samples, {name: {"peak_rss_bytes": 7} for name in rounds}, {}))
    for clock in ("wall", "cpu"):
        assert math.exp(session.new[clock]) == pytest.approx(1.2 / math.sqrt(1.01), rel=1e-4)
        assert math.exp(session.control[clock]) == pytest.approx(1.01, rel=1e-4)
    assert session.base_ms["cpu"] == pytest.approx(2 * session.base_ms["wall"], rel=1e-4)


def test_what_ci_reads(tmp_path: Path) -> None:
    verdict = judged(sessions(1.1, 0.003), max_memory=1.5)
    noisy = judged(sessions(1.0, 0.3))
    write_junit(verdict, "model", tmp_path / "deep" / "gate.xml")
    cases = ElementTree.parse(tmp_path / "deep" / "gate.xml").getroot().findall(".//testcase")
    assert [(c.get("name"), c.find("failure") is not None) for c in cases] == [("slowdown", True), ("memory", False)]
    write_junit(noisy, "model", tmp_path / "noisy.xml")
    assert ElementTree.parse(tmp_path / "noisy.xml").getroot().find(".//error") is not None
    text = as_markdown(verdict, "model")
    assert "model: **failed**" in text
    assert "| slowdown | **failed** | The new model takes 1.09" in text
    (line,) = github_annotations(verdict, "model")
    assert line.startswith("::error title=Latency gate model%2C slowdown::The new model takes")  # a comma ends a title
    assert [a.split()[0] for a in github_annotations(noisy, "m")] == ["::warning"]
    for found in (verdict, noisy, judged(sessions(1.0, 0.003))):
        append_history(found, "model", tmp_path / "history.jsonl")
    entries = read_history(tmp_path / "history.jsonl")
    assert [e["outcome"] for e in entries] == ["failed", "too noisy", "passed"]
    assert entries[0]["checks"]["slowdown"]["low"] < entries[0]["checks"]["slowdown"]["found"]
    draw_trend(tmp_path / "history.jsonl", tmp_path / "trend.svg")
    assert "</svg>" in (tmp_path / "trend.svg").read_text()
    append_history(judged(sessions(1.0, 0.003), base=None, max_latency_ms=50.0), "model", tmp_path / "latency.jsonl")
    draw_trend(tmp_path / "latency.jsonl", tmp_path / "none.svg")
    assert "no run of this history was compared" in (tmp_path / "none.svg").read_text()
    good = (tmp_path / "history.jsonl").read_text().splitlines()[0]
    for bad in ("nonsense", "{}", '{"name": "m", "checks": {"slowdown": {"found": 1}}}', '"text"'):
        (tmp_path / "history.jsonl").write_text(f"{good}\n{bad}\n")
        with pytest.raises(InputError, match="line 2"):
            read_history(tmp_path / "history.jsonl")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    bundle = exported_bundle(tmp_path_factory.mktemp("gate"))
    bundle.manifest.quality = {
        "dense": {"metric": "accuracy", "value": 0.9},
        "sliced": {"metric": "accuracy", "value": 0.88},
    }
    bundle.commit()
    return bundle


def test_a_check_says_the_sessions_and_the_clock_that_decided_it() -> None:
    """The first to be decided was once told with the number of sessions that the other one took."""
    measure = sessions(1.0, 0.01)

    def session(seconds: float) -> Session:
        made = measure(seconds)
        return replace(
            made,
            new={"wall": 0.7 + made.new["wall"], "cpu": 0.7 + made.new["cpu"] / 9},
            control={"wall": made.control["wall"], "cpu": made.control["cpu"] / 9},
        )

    slowdown, latency = judged(session, max_latency_ms=10.0).checks
    assert (slowdown.outcome, slowdown.details["sessions"], slowdown.details["clock"]) == ("failed", 4, "cpu")
    assert "4 sessions" in slowdown.text
    assert (latency.details["sessions"], latency.details["clock"]) == (24, "wall")


def test_models_of_two_tasks_are_not_compared(bundle: Bundle, tmp_path: Path) -> None:
    """A classifier of images once passed against one of texts."""
    shutil.copytree(bundle.root, tmp_path / "b")
    other = Bundle.open(tmp_path / "b")
    other.manifest.task["name"] = "digits"
    other.commit()
    with pytest.raises(InputError, match="of two tasks"):
        gate_paths(other.root, GateSettings(base=str(bundle.root)))


@pytest.mark.parametrize("limit", ["max_slowdown", "max_memory", "max_quality_loss"])
def test_a_limit_that_needs_a_base_is_not_passed_over(bundle: Bundle, limit: str) -> None:
    """`--max-slowdown` without a base was once ignored."""
    with pytest.raises(InputError, match=f"--{limit.replace('_', '-')} compares with a base"):
        gate_paths(bundle.root, GateSettings(max_bytes=1000, **{limit: 1.0}))


def test_a_base_that_differs_from_itself_gives_no_verdict() -> None:
    """The A/A check: two processes of one model that surely differ by more than is allowed."""
    measure = sessions(1.5, 0.003)

    def biased(seconds: float) -> Session:
        session = measure(seconds)
        return replace(session, control={clock: value - 0.1 for clock, value in session.control.items()})

    verdict = judged(biased)
    assert verdict.outcome == "too noisy"
    assert "two processes of the base differ 1.1" in verdict.checks[0].text
    assert judged(biased, max_slowdown=1.2).outcome == "failed"  # by less than is allowed: no matter


def test_a_new_model_that_cannot_be_run_fails_and_the_base_does_not(
    bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It once was exit 4, as a noisy machine is, and no report was written."""
    good = bundle.path(next(a.path for a in bundle.manifest.artifacts if a.variant == "sliced"))
    bad = tmp_path / "bad.onnx"
    proto = onnx.load(good)
    proto.graph.node[0].op_type = "NoSuchOperator"
    onnx.save(proto, bad)
    junit = tmp_path / "g.xml"
    flags = ["--seq", "12", "--max-seconds", "20", "--junit", str(junit)]
    assert invoke(["gate", str(bad), "--base", str(good), *flags, "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["outcome"] == "failed"
    assert "cannot be run" in junit.read_text()
    junit.unlink()
    assert invoke(["gate", str(good), "--base", str(bad), *flags]) == 4
    assert not junit.exists()
    long = ["--seq", "9999", "--max-seconds", "20"]
    assert invoke(["gate", str(bundle.root), "--base", str(bundle.root), *long]) == 4  # neither can


def test_the_quality_is_that_of_the_file_that_is_timed(tmp_path: Path) -> None:
    """It once was that of the first file in the precision, whatever opened it."""
    bundle = exported_bundle(tmp_path)
    export_bundle(bundle, formats=["onnx", "openvino"], precisions=["fp16"], variants=["sliced"]).check()
    for artifact in bundle.manifest.artifacts:
        value = {"onnx": 0.8, "openvino": 0.7}[artifact.format]
        artifact.quality = {"metric": "accuracy", "value": value, "to_fp32": {"agreement": 0.9}}
    bundle.commit()
    assert recorded_quality(bundle, "sliced:fp16", "ort-cpu") == ("accuracy", 0.8)
    assert recorded_quality(bundle, "sliced:fp16", "openvino") == ("accuracy", 0.7)


def test_a_file_is_never_slower_than_itself_and_a_slower_one_fails(bundle: Bundle, tmp_path: Path) -> None:
    sliced = bundle.path(next(a.path for a in bundle.manifest.artifacts if a.variant == "sliced"))
    settings = {"max_seconds": 60.0, "seq": 12, "resolution": 0.5, "max_slowdown": 1.3}
    same = gate_paths(sliced, GateSettings(base=str(sliced), **settings))
    assert same.outcome != "failed"
    slow = gate_paths(slow_down(sliced, tmp_path / "slow.onnx", 20_000), GateSettings(base=str(sliced), **settings))
    assert slow.outcome == "failed", slow.checks
    assert slow.seconds < 60
    assert set(slow.sessions[0].peak_bytes) == {"new", "base", "control"}


def test_slowing_down_changes_no_answer(bundle: Bundle, tmp_path: Path) -> None:
    sliced = bundle.path(next(a.path for a in bundle.manifest.artifacts if a.variant == "sliced"))
    slow = slow_down(sliced, tmp_path / "slow.onnx", 10)
    case = bundle.golden()[1]
    answers = []
    for path in (sliced, slow):
        with open_onnx(path) as runner:
            answers.append(runner.infer({name: case.inputs[name] for name in runner.input_names}))
    assert all((answers[0][name] == answers[1][name]).all() for name in answers[0])


def test_the_command_writes_everything_and_exits_with_the_verdict(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "summary.md"))
    files = {name: tmp_path / file for name, file in (("junit", "g.xml"), ("out", "g.json"), ("history", "h.jsonl"))}
    flags = [part for name, path in files.items() for part in (f"--{name}", str(path))]
    arguments = ["gate", str(bundle.root), *flags, "--trend", str(tmp_path / "t.svg")]
    assert invoke([*arguments, "--max-bytes", "1000"]) == 1
    assert "bytes: failed" in capsys.readouterr().out
    assert "**failed**" in (tmp_path / "summary.md").read_text()
    assert json.loads(files["out"].read_text())["checks"][0]["name"] == "bytes"
    assert "<failure" in files["junit"].read_text()
    assert len(files["history"].read_text().splitlines()) == 1
    base = ["--base", str(bundle.root), "--model", "dense", "--max-seconds", "60", "--max-slowdown", "5"]
    assert (
        invoke([*arguments, *base, "--max-quality-loss", "0.5", "--max-memory", "1.5", "--max-bytes", "9000000"]) == 0
    )
    said = capsys.readouterr().out
    assert [line.split(":")[0] for line in said.splitlines()] == ["slowdown", "memory", "bytes", "quality"]
    assert len(files["history"].read_text().splitlines()) == 2
    assert (tmp_path / "t.svg").is_file()


def test_make_regress(bundle: Bundle) -> None:
    if Path(sys.prefix) != ROOT / ".venv":
        pytest.skip("not run from the environment that make set up")
    flags = f"--max-seconds 60 --max-slowdown 5 --history {bundle.root}/h.jsonl --trend {bundle.root}/t.svg"
    command = ["make", "regress", f"BASE={bundle.root}", f"NEW={bundle.root}", f"FLAGS={flags}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "slowdown: passed" in done.stdout
    assert (bundle.root / "t.svg").is_file()
    without = subprocess.run(["make", "regress"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert without.returncode == 2
    assert "make regress BASE=" in without.stdout


def test_what_cannot_be_written_is_told_before_measuring(
    bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deploy_prune.runtime_bench.gate.judge", lambda *_: pytest.fail("it measured"))
    monkeypatch.setattr("deploy_prune.cli_gate.find_spec", lambda package: None)
    (tmp_path / "h.jsonl").write_text("{}\n")
    trend = ["--history", str(tmp_path / "h.jsonl"), "--trend", str(tmp_path / "t.svg")]
    monkeypatch.setattr("deploy_prune.cli_gate.find_spec", lambda package: True)
    assert invoke(["gate", str(bundle.root), "--max-bytes", "9", *trend]) == 2  # it once lost the verdict
    monkeypatch.setattr("deploy_prune.cli_gate.find_spec", lambda package: None)
    assert invoke(["gate", str(bundle.root), "--max-bytes", "9", "--junit", str(tmp_path / "g.xml")]) == 3
    assert "'junitparser', which is not installed" in " ".join(capsys.readouterr().err.split())


def test_the_workflow_gates_two_artifacts(bundle: Bundle, tmp_path: Path) -> None:
    """Run the commands of latency.yml as its runner would, installation and artifacts apart."""
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "latency.yml").read_text())
    inputs = workflow[True]["workflow_call"]["inputs"]  # YAML reads "on" as a truth value
    (job,) = workflow["jobs"].values()
    used = set(re.findall(r"inputs\.(\w+)", json.dumps(job)))
    assert used == set(inputs)
    for folder in ("new/model", "base"):
        shutil.copytree(bundle.root, tmp_path / folder)
    tools = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    flags = "--max-seconds 60 --max-slowdown 5"
    env = os.environ | {"NAME": "model", "FLAGS": flags, "GITHUB_STEP_SUMMARY": str(tmp_path / "s.md"), "PATH": tools}
    commands = [step["run"] for step in job["steps"] if "run" in step and "pip install" not in step["run"]]
    for command in commands:
        shell = ["bash", "-ec", command]
        done = subprocess.run(shell, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    assert "Latency gate, model: passed" in (tmp_path / "s.md").read_text()
    uploaded = [step["with"]["path"] for step in job["steps"] if "upload-artifact" in step.get("uses", "")]
    written = {"junit.xml", "verdict.json", "history.jsonl", "trend.svg"}
    assert uploaded == ["gate"]
    assert {p.name for p in (tmp_path / "gate").iterdir()} == written


def test_bad_settings_are_refused(bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = str(bundle.root)
    file = str(bundle.path(bundle.manifest.artifacts[0].path))
    for arguments, words in (
        ([root], "Nothing to check"),
        ([root, "--base", file], "cannot be compared"),
        ([file, "--base", file, "--max-quality-loss", "1"], "records no quality"),
        ([file, "--max-latency-ms", "9", "--runtime", "torch"], "No runtime 'torch'"),
        ([root, "--base", root, "--model", "half"], "No variant 'half'"),
        ([root, "--max-bytes", "9", "--max-quality-loss", "1"], "compares with a base"),
        ([root, "--base", root, "--model", "virtual", "--max-quality-loss", "1"], "no measured quality of virtual"),
        ([root, "--max-bytes", "9", "--runtime", "torch"], "opens no exported file"),
        ([root, "--max-bytes", "9", "--trend", "t.svg"], "drawn from a history"),
        ([root, "--max-bytes", "9", "--trend", "t.jpg", "--history", "h"], "SVG or PNG, not '.jpg'"),
        ([root, "--max-bytes", "9", "--junit", str(tmp_path)], "is a folder"),
        ([str(tmp_path / "none.onnx"), "--max-bytes", "9"], "No ONNX file"),
        ([root, "--max-bytes", "-1"], "max_bytes = '-1'"),
    ):
        assert invoke(["gate", *arguments]) == 2, arguments
        assert words in " ".join(capsys.readouterr().err.split()), arguments
