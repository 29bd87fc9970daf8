"""What well-kept servers do of the protocol: both encodings over HTTP, gRPC, versions, gathering of requests.

R=recipes/serving/ready_servers.py
python $R kserve kserve_env/bin/python          # which has `pip install kserve`
python $R mlserver mlserver_env/bin/python      # which has `pip install mlserver`
Prints a line of JSON. Each serves one model, m, that doubles `x` and says in how many rows `rows` its run had.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

HTTP, GRPC = 18180, 18181
TOGETHER = 16  # requests at one time
KSERVE = f"""
import asyncio, importlib.metadata
import numpy as np
from kserve import InferOutput, InferResponse, Model, ModelServer

class Twice(Model):
    async def predict(self, payload, headers=None, response_headers=None):
        x = payload.inputs[0].as_numpy()
        await asyncio.sleep(0.05)
        outputs = []
        for name, array in (("y", 2 * x), ("rows", np.full(x.shape, len(x), np.int64))):
            output = InferOutput(name, list(array.shape), "INT64")
            output.set_data_from_numpy(array, binary_data=bool(payload.use_binary_outputs))
            outputs.append(output)
        return InferResponse(payload.id or "", self.name, outputs)

model = Twice("m")
model.ready = True
print(importlib.metadata.version("kserve"), flush=True)
ModelServer(http_port={HTTP}, grpc_port={GRPC}, workers=1).start([model])
"""
MLSERVER = f"""
import asyncio, importlib.metadata, json, sys
import numpy as np
from mlserver import MLModel, MLServer, ModelSettings, Settings
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceResponse

class Twice(MLModel):
    async def predict(self, payload):
        x = NumpyCodec.decode_input(payload.inputs[0])
        await asyncio.sleep(0.05)
        outputs = [NumpyCodec.encode_output("y", 2 * x), NumpyCodec.encode_output("rows", np.full(x.shape, len(x)))]
        return InferenceResponse(model_name=self.name, model_version=self.version, outputs=outputs)

sys.modules["twice"] = sys.modules["__main__"]
model = {{"name": "m", "implementation": "twice.Twice", "max_batch_size": 8, "max_batch_time": 0.01}}
settings = Settings(parallel_workers=0, host="127.0.0.1", http_port={HTTP}, grpc_port={GRPC}, metrics_port=18182)
print(importlib.metadata.version("mlserver"), flush=True)
asyncio.run(MLServer(settings).start([ModelSettings(**model, parameters={{"version": "1"}})]))
"""
PROGRAMS = {"kserve": KSERVE, "mlserver": MLSERVER}


def asked(
    module: Any, port: int, binary: bool | None, version: str = "", headers: dict[str, str] | None = None
) -> np.ndarray:
    """Return how many rows the run had that answered a request; raises what the client raises."""
    client = module.InferenceServerClient(f"127.0.0.1:{port}")
    try:
        tensor = module.InferInput("x", [1, 3], "INT64")
        x = np.array([[1, 2, 3]])
        if binary is None:
            tensor.set_data_from_numpy(x)
            found = client.infer("m", [tensor], version)
        else:
            tensor.set_data_from_numpy(x, binary_data=binary)
            outputs = [module.InferRequestedOutput(name, binary_data=binary) for name in ("y", "rows")]
            found = client.infer("m", [tensor], version, outputs, headers=headers)
        if not np.array_equal(found.as_numpy("y"), 2 * x):
            raise ValueError(f"another answer: {found.as_numpy('y')}")
        return np.asarray(found.as_numpy("rows"))
    finally:
        client.close()


def tried(ask: Callable[[], Any]) -> str:
    """Return "yes", or what went wrong."""
    try:
        ask()
    except Exception as error:
        return f"no: {type(error).__name__}: {error}"[:160]
    return "yes"


def main() -> None:
    """Start a server and ask it."""
    import tritonclient.grpc as grpc
    import tritonclient.http as http

    name, python = sys.argv[1:3]
    with tempfile.TemporaryDirectory() as folder:
        program, log = Path(folder) / "program.py", Path(folder) / "log.txt"
        program.write_text(PROGRAMS[name])
        with log.open("w") as out:
            process = subprocess.Popen(
                [python, str(program)], cwd=folder, stdout=subprocess.PIPE, stderr=out, text=True
            )
        try:
            assert process.stdout is not None
            said: dict[str, Any] = {"server": name, "version": process.stdout.readline().strip()}
            ready, until = f"http://127.0.0.1:{HTTP}/v2/models/m/ready", time.monotonic() + 60
            while tried(lambda: urllib.request.urlopen(ready, timeout=5)) != "yes":
                if time.monotonic() > until or process.poll() is not None:
                    raise SystemExit(log.read_text()[-3000:])
                time.sleep(0.2)
            typed = {"content-type": "application/json"}
            said["JSON as tritonclient sends it"] = tried(lambda: asked(http, HTTP, False))
            said["JSON with a content type"] = tried(lambda: asked(http, HTTP, False, headers=typed))
            said["binary"] = tried(lambda: asked(http, HTTP, True))
            said["gRPC"] = tried(lambda: asked(grpc, GRPC, None))
            binary = said["binary"] == "yes"
            said["a version in the address"] = tried(lambda: asked(http, HTTP, binary, "1"))
            with ThreadPoolExecutor(TOGETHER) as pool:
                rows = list(pool.map(lambda _: int(asked(grpc, GRPC, None).max()), range(TOGETHER)))
            said["most rows in a run"] = max(rows)
            print(json.dumps(said))
        finally:
            process.kill()
            process.wait()


if __name__ == "__main__":
    main()
