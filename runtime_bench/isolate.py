"""Run a function in a fresh process, JSON in and out, its traceback carried back. No torch."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from ..errors import SystemStateError


class WorkerError(SystemStateError):
    """A function in a fresh process failed; `kind` is the exception's class, `traceback` its text."""

    def __init__(self, message: str, *, kind: str, traceback: str = "", hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.kind = kind
        self.traceback = traceback


def run_isolated(function: str, arguments: dict[str, Any], *, timeout_seconds: float = 600.0) -> Any:
    """Call `function` ("package.module:name") with JSON-able keyword arguments in a fresh process.

    Raises WorkerError when it raises, dies or takes longer than `timeout_seconds`.
    """
    with tempfile.TemporaryDirectory(prefix="deploy-prune-") as folder:
        reply = Path(folder) / "reply.json"  # not stdout: libraries print there
        request = json.dumps({"function": function, "arguments": arguments, "reply": str(reply)})
        command = [sys.executable, "-m", "deploy_prune.runtime_bench.worker"]
        try:
            done = subprocess.run(
                command, input=request, capture_output=True, text=True, timeout=timeout_seconds, check=False
            )
        except subprocess.TimeoutExpired as error:
            raise WorkerError(f"{function} did not end within {timeout_seconds:.0f} s.", kind="TimeoutError") from error
        if not reply.is_file():
            raise WorkerError(
                f"The process of {function} died ({_death(done.returncode)}).",
                kind="Died",
                traceback=done.stderr[-4000:],
                hint="Killed by the system, it was probably out of memory." if done.returncode == -9 else "",
            )
        answer = json.loads(reply.read_text("utf-8"))
    if "error" in answer:
        failure = answer["error"]
        raise WorkerError(failure["message"], kind=failure["kind"], traceback=failure["traceback"])
    return answer["result"]


def _death(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"
