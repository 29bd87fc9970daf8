"""The audit of packages never passes for one that was not made."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from tools import audit

UNKNOWN = "ERROR:pip_audit._cli:{0}: Dependency not found on PyPI and could not be audited: {0}"


def answering(stderr: str, code: int) -> subprocess.CompletedProcess[str]:
    return subprocess.CompletedProcess([], code, "", stderr)


def test_it_says_that_it_was_not_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(audit, "audit", lambda pins: answering(UNKNOWN.format("idna"), 1))
    monkeypatch.delenv("CI", raising=False)
    assert audit.main() == 0
    assert "not run" in capsys.readouterr().out
    monkeypatch.setenv("CI", "true")
    assert audit.main() == 1


@pytest.mark.parametrize(
    ("stderr", "code"),
    [
        ("No known vulnerabilities found", 0),
        ("Found 1 known vulnerability in 1 package", 1),
        (UNKNOWN.format("ours"), 1),
    ],
)
def test_its_outcome_is_that_of_the_pins(monkeypatch: pytest.MonkeyPatch, stderr: str, code: int) -> None:
    def audited(pins: Path) -> subprocess.CompletedProcess[str]:
        return answering(stderr, code) if pins == audit.PINS else answering("No known vulnerabilities found", 0)

    monkeypatch.setattr(audit, "audit", audited)
    assert audit.main() == code
