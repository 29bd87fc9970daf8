"""The servers that load.py asks, each in a process of its own: deploy-prune's, and mlserver with the same file."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

START_SECONDS = 120.0
MLSERVER_MODEL = """
import onnxruntime as ort
from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceResponse


class Onnx(MLModel):
    async def load(self):
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = ort.InferenceSession(self.settings.parameters.uri, options, providers=["CPUExecutionProvider"])
        self.names = [o.name for o in self.session.get_outputs()]
        return True

    async def predict(self, payload):
        feeds = {i.name: NumpyCodec.decode_input(i) for i in payload.inputs}
        found = self.session.run(self.names, feeds)
        outputs = [NumpyCodec.encode_output(n, a) for n, a in zip(self.names, found)]
        return InferenceResponse(model_name=self.name, outputs=outputs)
"""


@dataclass
class Running:
    """Hold a server that runs in a process of its own."""

    process: subprocess.Popen[str]
    port: int
    grpc_port: int

    def cpu_seconds(self) -> float:
        """Return the processor time of the server, its workers included."""
        parent = psutil.Process(self.process.pid)
        times = [p.cpu_times() for p in (parent, *parent.children(recursive=True))]
        return sum(t.user + t.system for t in times)

    def resident_bytes(self) -> int:
        """Return the memory that the server holds."""
        return int(psutil.Process(self.process.pid).memory_info().rss)

    def counts(self) -> tuple[float, float]:
        """Return how many runs there were, and how many rows went into them."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=30) as response:
            lines = response.read().decode().splitlines()
        sums = {
            word: sum(float(x.split()[-1]) for x in lines if x.startswith(f"deploy_prune_run_rows_{word}{{"))
            for word in ("count", "sum")
        }
        return sums["count"], sums["sum"]


@contextmanager
def served(source: Path, *flags: str) -> Iterator[Running]:
    """Start `deploy-prune serve` on free ports; its model is called m."""
    command = [sys.executable, "-m", "deploy_prune", "serve", f"m={source}", "--threads", "1", *flags]
    process = subprocess.Popen([*command, "--port", "0", "--grpc-port", "0"], stderr=subprocess.PIPE, text=True)
    try:
        yield _ready(process)
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)


def _ready(process: subprocess.Popen[str]) -> Running:
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("{") and (said := json.loads(line))["message"] == "ready":
            return Running(process, said["port"], said["grpc_port"])
    raise SystemExit(f"The server ended with code {process.wait()}.")


@contextmanager
def mlserver(program: Path, onnx: Path, batch_rows: int) -> Iterator[Running]:
    """Start mlserver on an ONNX file, with its own gathering of requests, in one process."""
    with tempfile.TemporaryDirectory() as folder:
        ports = {"http_port": 18080, "grpc_port": 18081, "metrics_port": 18082}
        (Path(folder) / "onnx_model.py").write_text(MLSERVER_MODEL)
        (Path(folder) / "settings.json").write_text(json.dumps({"parallel_workers": 0, "host": "127.0.0.1", **ports}))
        batching = {"max_batch_size": batch_rows, "max_batch_time": 0.001}
        model = {"name": "m", "implementation": "onnx_model.Onnx", "parameters": {"uri": str(onnx.resolve())}}
        (Path(folder) / "model-settings.json").write_text(json.dumps(model | batching))
        process = subprocess.Popen([program.resolve(), "start", "."], cwd=folder, stderr=subprocess.DEVNULL, text=True)
        try:
            until = time.monotonic() + START_SECONDS
            while not _answers(f"http://127.0.0.1:{ports['http_port']}/v2/models/m/ready"):
                if time.monotonic() > until or process.poll() is not None:
                    raise SystemExit("mlserver did not become ready.")
                time.sleep(0.2)
            yield Running(process, ports["http_port"], ports["grpc_port"])
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2):
            return True
    except OSError:
        return False
