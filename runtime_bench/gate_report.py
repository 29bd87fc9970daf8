"""Hand a gate's verdict to CI: JUnit XML, Markdown for a step summary, annotations, and a history with its trend."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..disk import disk_errors
from ..documents import parse_json
from ..errors import InputError, MissingExtraError
from .gate import Verdict
from .results import place_title

MARKS = {"passed": "passed", "failed": "**failed**", "too noisy": "**too noisy to tell**"}


def write_junit(verdict: Verdict, name: str, path: Path) -> None:
    """Write one test case a check: a failure where it failed, an error where the machine was too noisy."""
    try:
        from junitparser import Error, Failure, JUnitXml, TestCase, TestSuite
    except ImportError as error:
        raise MissingExtraError("junitparser", "ci") from error
    suite = TestSuite(f"deploy-prune gate {name}")
    for check in verdict.checks:
        case = TestCase(check.name, classname=f"gate.{name}", time=verdict.seconds / len(verdict.checks))
        if check.outcome == "failed":
            case.result = [Failure(check.text)]
        elif check.outcome == "too noisy":
            case.result = [Error(check.text)]
        case.system_out = check.text
        suite.add_testcase(case)
    document = JUnitXml()
    document.add_testsuite(suite)
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        document.write(str(path), pretty=True)


def as_markdown(verdict: Verdict, name: str) -> str:
    """Return the verdict as a section with a table, for a pull request or a step summary."""
    place, machine = verdict.place, verdict.machine
    lines = [f"### Latency gate, {name}: {MARKS[verdict.outcome]}", "", "| check | | found |", "|---|---|---|"]
    lines += [f"| {c.name} | {MARKS[c.outcome]} | {c.text} |" for c in verdict.checks]
    base = f"Base: {verdict.models['base']}. " if verdict.models["base"] else ""
    where = f"{place_title(place)}; {machine['cpu']}, load {machine['load_1min']:.1f}; {verdict.seconds:.0f} s."
    lines += ["", base + where]
    return "\n".join(lines) + "\n"


def github_annotations(verdict: Verdict, name: str) -> Iterator[str]:
    """Yield a GitHub workflow command for every check that did not pass."""
    for check in verdict.checks:
        if check.outcome != "passed":
            level = "error" if check.outcome == "failed" else "warning"
            title = _escaped(f"Latency gate {name}, {check.name}").replace(":", "%3A").replace(",", "%2C")
            yield f"::{level} title={title}::{_escaped(check.text)}"


def _escaped(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def append_history(verdict: Verdict, name: str, path: Path) -> None:
    """Add one line of JSON: when, what, the outcome, and every check's value, limit and interval."""
    entry = {
        "created": verdict.created,
        "name": name,
        **verdict.models,
        "outcome": verdict.outcome,
        "cpu": verdict.machine["cpu"],
        "load_1min": verdict.machine["load_1min"],
        **verdict.place,
        "checks": {
            c.name: {"outcome": c.outcome, "found": c.found, "limit": c.limit}
            | {key: c.details[key] for key in ("low", "high") if key in c.details}
            for c in verdict.checks
        },
    }
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")


def read_history(path: Path) -> list[dict[str, Any]]:
    """Return a history's entries. Raises InputError for a line that `append_history` did not write."""
    entries = []
    for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
        try:
            entries.append(parse_json(line))
            _trend_of(entries[-1])
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{path}, line {number}, is no line of a gate's history: {error!r}.", hint="Mend or remove that line."
            ) from error
    return entries


def _trend_of(entry: Mapping[str, Any]) -> tuple[str, dict[str, Any]] | None:
    """Return the name and the check that a trend shows of an entry, or None where time was not compared."""
    name, checks = str(entry["name"]), dict(entry["checks"])
    if "slowdown" not in checks:
        return None
    check = dict(checks["slowdown"])
    return name, {key: float(check[key]) for key in ("found", "low", "high", "limit")} | {"outcome": check["outcome"]}


def draw_trend(path: Path, figure: Path) -> None:
    """Draw the ratio to the base over the runs of a history, with intervals, limits and outcomes (SVG or PNG)."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("matplotlib", "ci") from error
    canvas = Figure(figsize=(7, 3), layout="constrained")
    axes = canvas.subplots()
    runs: dict[str, list[tuple[int, dict[str, Any]]]] = {}
    for number, entry in enumerate(read_history(path)):
        if (shown := _trend_of(entry)) is not None:
            runs.setdefault(shown[0], []).append((number, shown[1]))
    for name, checks in runs.items():
        found = [c["found"] for _, c in checks]
        below = [c["found"] - c["low"] for _, c in checks]
        above = [c["high"] - c["found"] for _, c in checks]
        numbers = [n for n, _ in checks]
        axes.errorbar(numbers, found, yerr=[below, above], fmt="o-", capsize=3, label=name)
        axes.step(numbers, [c["limit"] for _, c in checks], where="mid", linestyle="--", color="0.5")
        bad = [(n, c["found"]) for n, c in checks if c["outcome"] != "passed"]
        axes.plot([n for n, _ in bad], [value for _, value in bad], "rx", markersize=10)
    axes.set_xlabel("run")
    axes.set_ylabel("ratio to the base (dashed: allowed)")
    if runs:
        axes.legend()
    else:
        axes.set_title("no run of this history was compared with a base")
    with disk_errors(figure):
        figure.parent.mkdir(parents=True, exist_ok=True)
        canvas.savefig(figure)
