"""A fresh Python process that holds one object and answers calls, JSON in and out, its traceback carried back."""

from __future__ import annotations

import contextlib
import json
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from types import TracebackType
from typing import Any

from ..errors import SystemStateError

TIMEOUT_SECONDS = 600.0
_STDERR_KEPT = 4000  # characters


class WorkerError(SystemStateError):
    """A call in a fresh process failed; `kind` is the exception's class, `traceback` its text."""

    def __init__(self, message: str, *, kind: str, traceback: str = "", hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.kind = kind
        self.traceback = traceback

    def to_dict(self) -> dict[str, str]:
        return {"kind": self.kind, "reason": self.message, "traceback": self.traceback}


class Worker:
    """Hold a process that makes `factory` ("package.module:name") with JSON-able arguments.

    `with Worker("package.cells:Cell", {...}) as worker: worker.call("run", count=3)`. The process starts at
    once and makes its object meanwhile; the first call, or `ready`, waits for it. Every wait raises WorkerError
    when the other side raises, dies or takes longer than `timeout_seconds`.
    """

    def __init__(self, factory: str, arguments: dict[str, Any], *, timeout_seconds: float = TIMEOUT_SECONDS) -> None:
        self.factory = factory
        self.timeout_seconds = timeout_seconds
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  (closed by `close`)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "deploy_prune.runtime_bench.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            encoding="utf-8",
        )
        self._answers: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._listen, daemon=True).start()
        self._made = False  # whether the object is there
        self._busy = False  # whether it owes an answer
        self._write({"factory": factory, "arguments": arguments})

    @property
    def pid(self) -> int:
        return self._process.pid

    def ready(self) -> None:
        """Wait until the object is made."""
        if not self._made:
            self._read(self.factory)
            self._made = True

    def call(self, method: str, *, within: float | None = None, **arguments: Any) -> Any:
        """Call a method of the object and return its JSON-able result; `within` replaces `timeout_seconds`."""
        self.ready()
        self._write({"method": method, "arguments": arguments})
        return self._read(f"{self.factory}.{method}", within)

    def close(self) -> None:
        """End the process; closing twice does nothing."""
        if self._process.stdin is not None and not self._process.stdin.closed:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()  # its loop ends
        try:
            self._process.wait(timeout=0.0 if self._busy else 5.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._errors.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._answers.put(line)
        self._answers.put("")

    def _write(self, request: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        self._busy = True
        with contextlib.suppress(BrokenPipeError):  # it is dead: reading its answer says why
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()

    def _read(self, what: str, within: float | None = None) -> Any:
        within = within or self.timeout_seconds
        try:
            line = self._answers.get(timeout=within)
        except queue.Empty:
            self._process.kill()
            raise WorkerError(f"{what} did not end within {within:.0f} s.", kind="TimeoutError") from None
        if not line:
            raise self._died(what)
        self._busy = False
        answer = json.loads(line)
        if "error" in answer:
            failure = answer["error"]
            raise WorkerError(failure["message"], kind=failure["kind"], traceback=failure["traceback"])
        return answer["result"]

    def _died(self, what: str) -> WorkerError:
        code = self._process.wait()
        self._answers.put("")  # for the next question
        self._errors.seek(0)
        return WorkerError(
            f"The process of {what} died ({signal.Signals(-code).name if code < 0 else f'exit code {code}'}).",
            kind="Died",
            traceback=self._errors.read().decode("utf-8", "replace")[-_STDERR_KEPT:],
            hint="Killed by the system, it was probably out of memory." if code == -signal.SIGKILL else "",
        )
