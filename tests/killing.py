"""Kill -9 whole runs of the command line at random moments, and say what each kill left and how the rerun ended.

A tiny server imports everything once and forks a process for each run, so that kills meet the run itself instead of
its imports. As a program it does a campaign: `python tests/killing.py 50 > result.json` (about half a minute a kill).
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from runs_tiny import checkpoint, data

from deploy_prune.bundle import Bundle
from deploy_prune.resume import resume_folder

SERVER = """
import json, os, sys
import onnxruntime, onnxscript, torch.onnx, transformers.models.bert.modeling_bert
import deploy_prune.export, deploy_prune.pipeline, deploy_prune.runtime_bench.bench
from deploy_prune.cli import invoke
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
print("ready", file=answers, flush=True)
for line in sys.stdin:
    pid = os.fork()
    if not pid:
        os._exit(invoke(json.loads(line)))
    print(pid, file=answers, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), file=answers, flush=True)
"""
SLICED = "sliced/model.safetensors"


class Runs:
    """Start runs of one small model, in processes that can be killed."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.out = folder, folder / "b"
        self.errors = folder / "stderr.txt"
        checkpoint(folder / "model", num_hidden_layers=1)
        data(folder / "data", evaluation=200)

    def __enter__(self) -> Runs:
        threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        with open(self.errors, "wb") as errors:
            self.server = subprocess.Popen(
                [sys.executable, "-c", SERVER],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env={**os.environ, **threads},
            )
        self._answer()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self.server.stdin is not None
        self.server.stdin.close()
        self.server.wait(timeout=60)

    def run(self, out: Path | None = None, *, keep: float = 0.6, kill_after: float | None = None) -> tuple[int, float]:
        """Run, perhaps kill after some seconds; return the exit code (-9 if killed) and the seconds."""
        words = ["run", str(self.folder / "model"), "--data", str(self.folder / "data"), "--out", str(out or self.out)]
        words += ["--task", "text-classification", "--formats", "onnx", "--keep-flops", str(keep), "--steps", "2"]
        words += ["--runtimes", "ort-cpu", "--bench-seconds", "0.1"]
        assert self.server.stdin is not None
        self.server.stdin.write(json.dumps(words) + "\n")
        self.server.stdin.flush()
        pid, started = int(self._answer()), time.monotonic()
        if kill_after is not None:
            time.sleep(kill_after)
            with contextlib.suppress(ProcessLookupError):  # it was faster: the server has waited for it
                os.kill(pid, signal.SIGKILL)
        return int(self._answer()), time.monotonic() - started

    def said(self) -> str:
        """Return what all runs have printed so far."""
        return " ".join(self.errors.read_text("utf-8", "replace").split())

    def _answer(self) -> str:
        assert self.server.stdout is not None
        line = self.server.stdout.readline()
        if not line:
            raise RuntimeError(f"The server died: {self.errors.read_text('utf-8', 'replace')[-2000:]}")
        return line


def identity(bundle: Bundle) -> tuple[str, str]:
    """Return the hashes of a bundle's plan and weights."""
    return bundle.manifest.plan["hash"], bundle.manifest.files[SLICED]


def stages_of(bundle: Bundle) -> list[str]:
    """Return the stages that were taken from a killed run."""
    found = [s.model_dump() for s in bundle.manifest.stages]
    return [s["name"] for s in found if s.get("resumed") or s.get("reused")]


def kept_files(destination: Path) -> int:
    """Return how many stages' results lie beside a bundle."""
    return len(list(resume_folder(destination).glob("*/*-*.safetensors")))


def campaign(kills: int, seed: int, folder: Path) -> dict[str, Any]:
    """Kill so many runs at random moments, by turns over an old bundle and over none, and rerun each to its end.

    Raises AssertionError for a bundle that is neither the old nor the new one, or a rerun that ends differently.
    """
    rng, lines = random.Random(seed), []
    with Runs(folder) as runs:
        assert runs.run(folder / "old", keep=0.8)[0] == 0
        code, seconds = runs.run(folder / "new")
        assert code == 0
        old, new = (identity(Bundle.open(folder / name)) for name in ("old", "new"))
        assert old != new
        for number in range(kills):
            shutil.rmtree(runs.out, ignore_errors=True)
            if there := number % 2 == 0:
                shutil.copytree(folder / "old", runs.out)
            after = rng.uniform(0, seconds * rng.choice((0.25, 1.0)))  # the stages before the export are short
            code, _ = runs.run(kill_after=after)
            assert code in (-signal.SIGKILL, 0)
            state = "none"
            if runs.out.exists():
                state = {old: "old", new: "new"}[identity(Bundle.open(runs.out))]  # every file's hash is checked
            assert state == "new" or (code != 0 and state == ("old" if there else "none")), state
            kept = kept_files(runs.out)
            before = runs.said().count("Resumed: ")
            again, took = runs.run()
            assert again == 0, runs.said()[-2000:]
            bundle = Bundle.open(runs.out)
            assert identity(bundle) == new
            assert runs.said().count("Resumed: ") - before == kept
            left = sorted(p.name for p in folder.iterdir() if p.name.startswith(".b."))
            assert left == [".b.lock"], left
            line = {"after": round(after, 2), "killed": code != 0, "left": state, "kept": kept}
            lines.append({**line, "resumed": stages_of(bundle), "rerun": round(took, 2)})
            print(number, lines[-1], file=sys.stderr, flush=True)
    return {"seconds": round(seconds, 2), "plan": new[0], "weights": new[1], "seed": seed, "kills": lines}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="deploy-prune-kills-") as name:
        print(json.dumps(campaign(int(sys.argv[1]), 0, Path(name)), indent=1))
