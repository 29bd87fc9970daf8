"""The repository that `export --format triton` writes, served by a real Triton.

`make triton` makes the environment that DEPLOY_PRUNE_TRITON names: nvidia-pytriton, which brings the server and its
Python back end, and what the models need there: tokenizers, numpy below 2 (with 2 this Triton's back end dies at the
first text) and onnxruntime. As the ONNX Runtime back end is not in that package, the model is run from a Python model,
under the very configuration that was written but for its back end.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles_tiny import make_exported

pytest.importorskip("tritonclient", reason="the extra 'serve' is not installed")
import tritonclient.http as http
from google.protobuf import text_format

from deploy_prune.bundle import Bundle
from deploy_prune.export.serving.triton import settings_of, write_triton
from deploy_prune.serve import load

STARTS_WITHIN = 60  # seconds
TEXTS = ["a fine film", "dull, dull plot! " * 40, ""]
ONNX_MODEL = """
import os
import numpy as np
import onnxruntime
import triton_python_backend_utils as triton

class TritonPythonModel:
    def initialize(self, args):
        path = os.path.join(args["model_repository"], args["model_version"], "model.onnx")
        self.session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def execute(self, requests):
        names = [i.name for i in self.session.get_inputs()]
        outputs = [o.name for o in self.session.get_outputs()]
        answers = []
        for request in requests:
            feeds = {n: triton.get_input_tensor_by_name(request, n).as_numpy() for n in names}
            found = self.session.run(None, feeds)
            tensors = [triton.Tensor(n, array) for n, array in zip(outputs, found)]
            answers.append(triton.InferenceResponse(output_tensors=tensors))
        return answers
"""


@dataclass(frozen=True)
class Triton:
    """Name a server's program, its back ends, its libraries, and the Python whose packages its models see."""

    program: Path
    backends: Path
    libraries: Path
    python: Path


def place_triton(environment: Path, folder: Path) -> Triton:
    """Copy the server of an environment's pytriton to a folder, with the back end for that environment's Python."""
    (package,) = environment.glob("lib/python3.*/site-packages/pytriton/tritonserver")
    version = package.parents[2].name.removeprefix("python")
    shutil.copytree(package / "backends", folder / "backends")
    program = Path(shutil.copy(package / "bin/tritonserver", folder))
    stub = package / "python_backend_stubs" / version / "triton_python_backend_stub"
    stub = Path(shutil.copy(stub, folder / "backends/python"))
    for path in (program, stub):
        path.chmod(0o755)
    linked = subprocess.run(["ldd", stub], capture_output=True, text=True, check=True).stdout
    if missing := [line.split()[0] for line in linked.splitlines() if "libpython" in line and "not found" in line]:
        pytest.skip(f"Triton's Python back end needs {missing[0]}, which is not on this machine")
    return Triton(program, folder / "backends", package.parents[1] / "nvidia_pytriton.libs", environment / "bin")


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make_exported(tmp_path_factory.mktemp("triton") / "tiny", variants=("sliced",))


@pytest.fixture(scope="module")
def client(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    if not (environment := os.environ.get("DEPLOY_PRUNE_TRITON")):
        pytest.skip("DEPLOY_PRUNE_TRITON names no environment with Triton: `make triton` makes one")
    folder = tmp_path_factory.mktemp("server")
    triton = place_triton(Path(environment).resolve(), folder)
    repository = folder / "repository"
    for _ in range(3):  # three versions, of which Triton serves the newest two
        write_triton(bundle, repository, name="m")
    if not (triton.backends / "onnxruntime").is_dir():
        config = settings_of(repository / "m/config.pbtxt")
        config.backend, config.default_model_filename = "python", "model.py"
        (repository / "m/config.pbtxt").write_text(text_format.MessageToString(config), "utf-8")
        for version in (repository / "m").glob("[0-9]*"):
            (version / "model.py").write_text(ONNX_MODEL, "utf-8")
    port, log = free_port(), folder / "log.txt"
    variables = os.environ | {
        "LD_LIBRARY_PATH": os.pathsep.join(filter(None, (str(triton.libraries), os.environ.get("LD_LIBRARY_PATH")))),
        "PATH": os.pathsep.join((str(triton.python), os.environ["PATH"])),
    }
    command = [
        *(str(triton.program), f"--model-repository={repository}", f"--backend-directory={triton.backends}"),
        *("--http-address=127.0.0.1", f"--http-port={port}", "--allow-grpc=false", "--allow-metrics=false"),
        "--strict-readiness=true",
    ]
    with log.open("wb") as out:
        server = subprocess.Popen(command, env=variables, stdout=out, stderr=subprocess.STDOUT)
    try:
        client, until = http.InferenceServerClient(f"127.0.0.1:{port}"), time.monotonic() + STARTS_WITHIN
        while not _ready(client):
            if server.poll() is not None or time.monotonic() > until:
                pytest.fail(f"Triton does not start:\n{log.read_text('utf-8', 'replace')[-6000:]}")
            time.sleep(0.1)
        yield client
        client.close()
    finally:
        server.terminate()
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            server.kill()


def _ready(client: Any) -> bool:
    try:
        return bool(client.is_server_ready())
    except OSError:
        return False


def ask(client: Any, texts: list[str], model: str = "m-texts", version: str = "") -> np.ndarray:
    given = http.InferInput("TEXT", [len(texts), 1], "BYTES")
    given.set_data_from_numpy(np.array([[text.encode()] for text in texts], dtype=object))
    return np.asarray(client.infer(model, [given], model_version=version).as_numpy("logits"))


def test_triton_loads_what_was_written(client: Any) -> None:
    found = {(m["name"], m["version"]): m["state"] for m in client.get_model_repository_index()}
    ready = {key for key, state in found.items() if state == "READY"}
    assert ready == {(name, version) for name in ("m", "m-tokenizer") for version in "23"} | {("m-texts", "3")}
    statistics = client.get_inference_statistics("m", "3")["model_stats"][0]
    assert int(statistics["inference_count"]) == 1  # of the warm-up
    assert client.get_model_config("m")["max_batch_size"] == 32


def test_texts_get_the_edge_loaders_answers(client: Any, bundle: Bundle) -> None:
    with load(bundle.root, threads=1) as predictor:
        wanted = predictor.outputs(TEXTS)["logits"]
    np.testing.assert_allclose(ask(client, TEXTS), wanted, atol=1e-5)
    np.testing.assert_allclose(ask(client, TEXTS[:1]), wanted[:1], atol=1e-5)


def test_a_text_that_is_not_utf8_is_refused(client: Any) -> None:
    given = http.InferInput("TEXT", [1, 1], "BYTES")
    given.set_data_from_numpy(np.array([[b"\xff\xfe"]], dtype=object))
    with pytest.raises(Exception, match="UTF-8"):
        client.infer("m-texts", [given])
