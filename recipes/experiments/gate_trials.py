"""Measure the gate itself: calibrated slow-downs, live trials, and replays of recorded sessions.

G=recipes/experiments/gate_trials.py
python $G model MODEL.onnx                             # MiniLM's shape, half its neurons
python $G make MODEL.onnx FOLDER                       # base.onnx and slower copies, calibrated (quiet machine)
python $G copies MODEL.onnx FOLDER --inner 0,1500,6000 # or slower copies of given sizes, calibrated by their trials
python $G trials FOLDER quiet.jsonl --count 40         # live trials of every kind; goes on where it stopped
python $G record FOLDER quiet-sessions.jsonl --count 200
python $G table quiet.jsonl                            # rates with exact binomial intervals
python $G replay quiet-sessions.jsonl                  # the power curve, by block bootstrap of sessions
python $G replay quiet.jsonl                           # or of those of the trials at the limit, which run longest
`--load 2` keeps two processes busy meanwhile, in bursts.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from scipy.stats import binomtest

from deploy_prune.config import GateSettings
from deploy_prune.runtime_bench.bench import Place
from deploy_prune.runtime_bench.gate import Session, choose_clock, doubts, judge, measure_session
from deploy_prune.runtime_bench.machine import describe_machine
from deploy_prune.runtime_bench.sequential import Plan, run_plan
from deploy_prune.runtime_bench.slowdown import slow_down
from deploy_prune.runtime_bench.subjects import Subject, file_subject

KINDS = {"same": 0.0, "at the limit": 0.02, "5 %": 0.05, "10 %": 0.10}
PLACE = Place("ort-cpu", 1, 128, 1)
SETTINGS = GateSettings(max_slowdown=1.02)
PLAN = Plan()
SESSION_SECONDS = 1.5
BLOCK = 4  # sessions that stay together in a replay
BURSTS = """
import os, random, time
import numpy as np
a, parent = np.random.rand(400, 400), os.getppid()
while os.getppid() == parent:  # a killed parent cannot end it
    end = time.time() + random.uniform(0.05, 0.5)
    while time.time() < end: a @ a
    time.sleep(random.uniform(0.0, 0.3))
"""
app = typer.Typer(help=__doc__, pretty_exceptions_enable=False)
Load = Annotated[int, typer.Option(help="Processes that keep the machine busy, in bursts.")]


@app.command()
def model(path: Path, seed: int = 0) -> None:
    """Write a classifier of MiniLM's shape (6 x 384) with half its neurons and random weights as ONNX."""
    import torch
    import transformers

    from deploy_prune.export.onnx import onnx_from_torch
    from deploy_prune.heads import Head

    torch.manual_seed(seed)
    config = transformers.BertConfig(
        vocab_size=1000, hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=768
    )
    bert = transformers.BertForSequenceClassification(config)
    onnx_from_torch(bert, Head("classification"), path, input_names=("input_ids", "attention_mask"))


@app.command()
def copies(model: Path, folder: Path, inner: str = "0,1200,1500,1800,2100,6000,12000") -> None:
    """Copy the base and write a slower copy for each size of the extra product, 8,192 x inner FLOPs a run."""
    folder.mkdir(parents=True, exist_ok=True)
    base = Path(shutil.copy(model, folder / "base.onnx"))
    kinds = {}
    for size in map(int, inner.split(",")):
        path = folder / f"inner-{size}.onnx"
        if size:
            slow_down(base, path, size)
        else:
            shutil.copy(base, path)
        kinds["same" if size == 0 else f"+{size}"] = {"file": path.name}
    truth = {"machine": describe_machine(PLACE.threads), "place": asdict(PLACE), "kinds": kinds}
    (folder / "truth.json").write_text(json.dumps(truth, indent=1) + "\n")


@app.command()
def make(model: Path, folder: Path, sessions: int = 12) -> None:
    """Copy the base and write its slower copies; measure how much slower each really is."""
    folder.mkdir(parents=True, exist_ok=True)
    base = Path(shutil.copy(model, folder / "base.onnx"))
    subject = file_subject("base", base)
    inner, ratio = 0.0, 1.0
    for guess in (10_000, None):  # the second guess aims at the largest kind
        more = guess or round(inner * max(KINDS.values()) / (ratio - 1))
        more_ratio, _ = _ratio(file_subject("guess", slow_down(base, folder / "guess.onnx", more)), subject, sessions)
        start, inner, ratio = (inner, ratio), more, more_ratio
    per_inner = (ratio - start[1]) / (inner - start[0])  # the rest is what the added nodes take by themselves
    fixed = ratio - 1 - per_inner * inner
    truth: dict[str, Any] = {"machine": describe_machine(PLACE.threads), "place": asdict(PLACE), "kinds": {}}
    for kind, wanted in KINDS.items():
        path = folder / f"{round(100 * wanted)}.onnx"
        missed = 0.0
        for _ in range(2 if wanted else 1):  # the second try makes up for what the first one missed
            if wanted:
                slow_down(base, path, max(round((wanted - fixed - missed) / per_inner), 1))
            else:
                shutil.copy(base, path)
            value, error = _ratio(file_subject(kind, path), subject, 2 * sessions)
            missed += value - 1 - wanted
        truth["kinds"][kind] = {"file": path.name, "wanted": 1 + wanted, "ratio": value, "standard_error": error}
        print(f"{kind}: {value:.4f} +- {error:.4f}")
    (folder / "guess.onnx").unlink()
    (folder / "truth.json").write_text(json.dumps(truth, indent=1) + "\n")


@app.command()
def trials(folder: Path, out: Path, count: int = 40, seconds: float = 60.0, load: Load = 0) -> None:
    """Run the gate on every kind so many times, the kinds in turn; a line of JSON a trial."""
    base = file_subject("base", folder / "base.onnx")
    kinds = json.loads((folder / "truth.json").read_text())["kinds"]
    settings = SETTINGS.model_copy(update={"max_seconds": seconds})
    done = [json.loads(line)["kind"] for line in out.read_text().splitlines()] if out.is_file() else []
    with _busy(load):
        for number in range(count):
            for kind, truth in kinds.items():
                if done.count(kind) > number:
                    continue
                verdict = judge(file_subject(kind, folder / truth["file"]), base, settings, PLACE, plan=PLAN)
                entry = {
                    "kind": kind,
                    **truth,
                    "load": load,
                    "load_average": round(os.getloadavg()[0], 2),
                    "allowed_seconds": seconds,
                    "outcome": verdict.outcome,
                    "clock": verdict.clock,
                }
                entry |= {"seconds": round(verdict.seconds, 1), "found": verdict.checks[0].found}
                entry["sessions"] = [_short(s) for s in verdict.sessions]
                _append(out, entry)


@app.command()
def record(folder: Path, out: Path, count: int = 200, load: Load = 0) -> None:
    """Record sessions of the base against itself, without stopping, for replays."""
    base = file_subject("base", folder / "base.onnx")
    with _busy(load):
        for _ in range(count):
            begun = time.monotonic()
            session = measure_session(base, base, PLACE, SESSION_SECONDS)
            _append(out, {"load": load, "seconds": round(time.monotonic() - begun, 2), **_short(session)})


@app.command()
def table(paths: list[Path]) -> None:
    """Print rates of live trials with exact 95 % binomial intervals; the true ratio is that of all their sessions."""
    print("| load | kind | true ratio | trials | failed | too noisy | median seconds | largest |")
    print("|---|---|---|---|---|---|---|---|")
    for path in paths:
        entries = [json.loads(line) for line in path.read_text().splitlines()]
        for load in sorted({e["load"] for e in entries}):
            for kind in dict.fromkeys(e["kind"] for e in entries):
                found = [e for e in entries if (e["load"], e["kind"]) == (load, kind)]
                if found:
                    seconds = [e["seconds"] for e in found]
                    rates = [_rate(sum(e["outcome"] == o for e in found), len(found)) for o in ("failed", "too noisy")]
                    logs = [s["new"][e["clock"]] for e in found for s in e["sessions"]]
                    error = np.std(logs, ddof=1) / np.sqrt(len(logs))
                    cells = [load, kind, f"{np.exp(np.mean(logs)):.4f} +- {error:.4f}", len(found), *rates]
                    print(f"| {' | '.join(map(str, cells))} | {np.median(seconds):.0f} | {max(seconds):.0f} |")


@app.command()
def replay(path: Path, count: int = 5000, seed: int = 0) -> None:
    """Print the power curve: sessions of the base against itself, slowed by a factor, in drawn blocks of four."""
    entries = recorded([json.loads(line) for line in path.read_text().splitlines()])
    seconds = float(np.mean([e["seconds"] for e in entries]))
    rng = np.random.default_rng(seed)
    print(f"{len(entries)} sessions of {seconds:.1f} s, {count} replays a row\n")
    print("| true ratio | failed | too noisy | median seconds |\n|---|---|---|---|")
    for ratio in (1.0, 1.01, 1.02, 1.03, 1.04, 1.05, 1.06, 1.08, 1.10):
        failed = noisy = 0
        used = []
        for _ in range(count):
            starts = rng.integers(0, len(entries), -(-PLAN.sessions // BLOCK))
            drawn = [entries[(start + i) % len(entries)] for start in starts for i in range(BLOCK)][: PLAN.sessions]
            clock = choose_clock([_long(e) for e in drawn[: PLAN.looks[0]]], "auto")
            logs = [e["new"][clock] + float(np.log(ratio)) for e in drawn]
            decision, sessions, found = run_plan(logs, SETTINGS.max_slowdown, PLAN)
            unsure = decision is None and found.visible > SETTINGS.max_slowdown * (1 + SETTINGS.resolution)
            unsure |= bool(doubts([_long(e) for e in drawn[:sessions]], clock, SETTINGS.max_slowdown, PLAN))
            failed += decision == "slower" and not unsure
            noisy += unsure
            used.append(sessions * seconds)
        print(f"| {ratio:g} | {_rate(failed, count)} | {_rate(noisy, count)} | {np.median(used):.0f} |")


def recorded(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return sessions of the base against itself, from `record` or from live trials.

    Of trials those "at the limit" count, which hardly ever stop early, so that stopping selects no sessions; their true
    ratio, the mean of them all, is taken out.
    """
    if "sessions" not in entries[0]:
        return entries
    trials = [e for e in entries if e["kind"] == "at the limit"]
    found = [{"seconds": e["seconds"] / len(e["sessions"]), **s} for e in trials for s in e["sessions"]]
    means = {clock: float(np.mean([s["new"][clock] for s in found])) for clock in found[0]["new"]}
    return [{**s, "new": {clock: value - means[clock] for clock, value in s["new"].items()}} for s in found]


def _ratio(new: Subject, base: Subject, sessions: int) -> tuple[float, float]:
    logs = [measure_session(new, base, PLACE, SESSION_SECONDS).new["wall"] for _ in range(sessions)]
    return float(np.exp(np.mean(logs))), float(np.std(logs, ddof=1) / np.sqrt(sessions))


def _rate(hits: int, of: int) -> str:
    interval = binomtest(hits, of).proportion_ci(method="exact")
    return f"{100 * hits / of:.1f} % [{100 * interval.low:.1f}, {100 * interval.high:.1f}]"


def _short(session: Session) -> dict[str, Any]:
    rounded = {name: {c: round(v, 6) for c, v in value.items()} for name, value in asdict(session).items()}
    return {name: rounded[name] for name in ("new", "control", "base_ms")}


def _long(entry: dict[str, Any]) -> Session:
    return Session(entry["new"], entry["control"], entry["base_ms"], entry["base_ms"], {})


def _append(path: Path, entry: dict[str, Any]) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")


@contextmanager
def _busy(load: int) -> Iterator[None]:
    workers = [subprocess.Popen([sys.executable, "-c", BURSTS]) for _ in range(load)]
    try:
        yield
    finally:
        for worker in workers:
            worker.kill()


if __name__ == "__main__":
    app()
