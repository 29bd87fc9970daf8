"""A server of tiny bundles in a thread of this process, on free ports, and what asks it."""

from __future__ import annotations

import asyncio
import importlib
import json
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from deploy_prune.server.run import Listening, Server
from deploy_prune.server.versions import Serving

PATH = "/v2/models/m/infer"
IDS = {n: {"name": n, "datatype": "INT64", "shape": [1, 3], "data": [1, 1, 1]} for n in ("input_ids", "attention_mask")}
GOOD = {"inputs": [*IDS.values(), {**IDS["input_ids"], "name": "token_type_ids", "data": [0, 0, 0]}]}


@contextmanager
def running(
    models: Mapping[str, Path],
    *,
    serving: Serving | None = None,
    compare: bool = False,
    loaded: bool = True,
    **listening: Any,
) -> Iterator[Server]:
    """Yield a server, once its models answer or, unless `loaded`, once it listens, and stop it at the end.

    What it raised is raised here.
    """
    where = Listening(port=0, grpc_port=listening.pop("grpc_port", 0), **listening)
    server = Server(models, serving or Serving(threads=1), where, compare)
    ready, failed = threading.Event(), []

    async def listens() -> None:
        while not (server.port and (server.grpc_port or where.grpc_port is None)):
            await asyncio.sleep(0.01)

    def work() -> None:
        async def main() -> None:
            waiting = asyncio.create_task(server.started.wait() if loaded else listens())
            waiting.add_done_callback(lambda task: task.cancelled() or ready.set())
            server.loop = asyncio.get_running_loop()  # type: ignore[attr-defined]
            try:
                await server.run()
            finally:
                waiting.cancel()

        try:
            asyncio.run(main())
        except BaseException as error:
            failed.append(error)
        ready.set()

    thread = threading.Thread(target=work)
    server.thread = thread  # type: ignore[attr-defined]
    thread.start()
    assert ready.wait(60)
    if failed:
        raise failed[0]
    try:
        yield server
    finally:
        if thread.is_alive():
            server.loop.call_soon_threadsafe(server.stop)  # type: ignore[attr-defined]
        thread.join(60)
        assert not thread.is_alive()
    if failed:
        raise failed[0]


def ask(
    server: Server, path: str | None = None, body: Any = None, headers: dict[str, str] | None = None
) -> tuple[int, Any]:
    """Return the status and the document that the server answers over HTTP; without a path, to the good request."""
    if path is None:
        path, body = PATH, GOOD
    raw = None if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{server.port}{path}", raw, headers or {})
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, json.loads(response.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


@contextmanager
def calling(server: Server, method: str = "ModelInfer") -> Iterator[Callable[..., bytes]]:
    """Yield a method of the server that takes and gives messages as they are on the wire."""
    with grpc.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel:
        yield channel.unary_unary(f"/inference.GRPCInferenceService/{method}", lambda x: x, lambda x: x)


@contextmanager
def client_of(server: Server, protocol: str) -> Iterator[tuple[Any, Any]]:
    """Yield tritonclient's client of a server, for grpc or else for HTTP, and the module that it is from."""
    module: Any = importlib.import_module(f"tritonclient.{'grpc' if protocol == 'grpc' else 'http'}")
    port = server.grpc_port if protocol == "grpc" else server.port
    client = module.InferenceServerClient(f"127.0.0.1:{port}")
    try:
        yield client, module
    finally:
        client.close()


def wait_until(true: Callable[[], bool]) -> None:
    """Wait until something is so, 30 seconds at most."""
    until = time.monotonic() + 30
    while not true():
        assert time.monotonic() < until
        time.sleep(0.02)


def closed_after(connection: socket.socket) -> float:
    """Read until the other side ends the connection; return the seconds that took."""
    started = time.monotonic()
    try:
        while connection.recv(1 << 16):
            pass
    except ConnectionResetError:
        pass
    return time.monotonic() - started


def infer(client: Any, module: Any, name: str, given: Mapping[str, np.ndarray], **how: Any) -> Any:
    """Let a client of tritonclient's module grpc or http ask a model for its answer to arrays."""
    inputs = []
    for key, array in given.items():
        tensor = module.InferInput(key, list(array.shape), "BYTES" if array.dtype == object else "INT64")
        tensor.set_data_from_numpy(array, **how)
        inputs.append(tensor)
    return client.infer(name, inputs)
