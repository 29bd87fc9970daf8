"""The server against HTTP clients that are slow, foreign, greedy or malformed: it answers, forgets them and goes on."""

from __future__ import annotations

import asyncio
import json
import logging
import random
import socket
import ssl
import struct
import time
import tracemalloc
import urllib.error
import urllib.request
from collections.abc import AsyncIterator
from contextlib import ExitStack
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
from fuzz.mutation import mutate

pytest.importorskip("tritonclient", reason="the extra 'serve' is not installed")
import grpc
import schemathesis
import trustme
from hypothesis import HealthCheck, given, settings
from servers_tiny import GOOD, PATH, ask, client_of, closed_after, infer, running, wait_until
from starlette.datastructures import URL
from starlette.requests import Request
from tritonclient.utils import InferenceServerException

from deploy_prune.config import ServeSettings
from deploy_prune.errors import InputError, SystemStateError
from deploy_prune.server.connections import TimedProtocol, WebServer, is_loopback
from deploy_prune.server.engine import Engine, Held
from deploy_prune.server.errors import BusyError
from deploy_prune.server.http import Bodies, foreign, make_app
from deploy_prune.server.models import Models
from deploy_prune.server.run import Listening, Server
from deploy_prune.server.tensors import from_json
from deploy_prune.server.versions import Serving, Version

SHORT = settings(
    max_examples=25, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
)


def connect(server: Server) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.port), timeout=20)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TimedProtocol, "client_seconds", 0.5)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("begun", [b"", b"POST /v2 HTTP/1.1\r\nhost: localhost\r\n"])
def test_heads_that_never_end_are_cut_off(server: Server, begun: bytes) -> None:
    with connect(server) as connection:
        connection.sendall(begun)
        assert closed_after(connection) < 10
    assert ask(server)[0] == 200


@pytest.mark.usefixtures("impatient")
def test_a_second_head_that_never_ends_is_cut_off(server: Server) -> None:
    with connect(server) as connection:
        connection.sendall(b"GET /v2/health/live HTTP/1.1\r\nhost: localhost\r\n\r\n")
        assert b"200 OK" in connection.recv(1 << 16)
        connection.sendall(b"G")  # uvicorn's own timer ends with the first byte
        assert closed_after(connection) < 10


@pytest.mark.usefixtures("impatient")
def test_slow_clients_do_not_keep_others_out(root: Path) -> None:
    with running({"m": root}, connections=4, grpc_port=None) as server, ExitStack() as stack:
        slow = [stack.enter_context(connect(server)) for _ in range(6)]
        for connection in slow:
            connection.sendall(b"GET / HT")
        for connection in slow:
            closed_after(connection)
        assert ask(server)[0] == 200


def test_a_body_that_drips_is_given_up(server: Server) -> None:
    with connect(server) as connection:
        connection.sendall(f"POST {PATH} HTTP/1.1\r\nhost: localhost\r\ncontent-length: 1000\r\n\r\n".encode())
        connection.settimeout(0.05)
        answer = b""
        for _ in range(200):
            connection.sendall(b" ")
            try:
                answer = connection.recv(1 << 16)
                break
            except TimeoutError:
                continue
        connection.settimeout(20)
        while b"seconds" not in answer and (more := connection.recv(1 << 16)):
            answer += more
    assert answer.startswith(b"HTTP/1.1 504")
    assert b"did not arrive within" in answer


def send_on(connection: socket.socket, data: bytes) -> None:
    """Send without reading, up to 64 MB; blocks where the server reads no more, until it cuts off."""
    for _ in range((1 << 26) // len(data)):
        connection.sendall(data)


@pytest.mark.usefixtures("impatient")
def test_answers_that_nobody_takes_are_dropped(server: Server) -> None:
    head = b"GET /openapi.json HTTP/1.1\r\nhost: localhost\r\n\r\n"
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", server.port))
        connection.settimeout(20)
        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            send_on(connection, head * 100)
    assert ask(server)[0] == 200


def test_every_body_is_bounded(server: Server) -> None:
    for path in (PATH, "/v2/repository/models/m/load"):
        with connect(server) as connection:  # told before it is sent
            connection.sendall(f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-length: 1048577\r\n\r\n".encode())
            answer = b""
            while b"at most 1,048,576" not in answer and (more := connection.recv(1 << 16)):
                answer += more
        assert answer.startswith(b"HTTP/1.1 413")
        assert b"at most 1,048,576" in answer
    with connect(server) as connection:  # chunks name no length
        connection.sendall(f"POST {PATH} HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\n".encode())
        chunk = b"10000\r\n" + b" " * 65536 + b"\r\n"
        try:
            for _ in range(17):
                connection.sendall(chunk)
            answer = connection.recv(1 << 16)
        except (BrokenPipeError, ConnectionResetError):
            answer = b"HTTP/1.1 413"  # cut off while we wrote
    assert answer.startswith(b"HTTP/1.1 413")


def test_bodies_together_are_bounded() -> None:
    class Slow:
        headers = MappingProxyType({"host": "localhost"})

        async def stream(self) -> AsyncIterator[bytes]:
            yield b" " * 100
            await asyncio.sleep(0.05)

    async def main() -> list[Any]:
        bodies = Bodies(100, 5.0, Held(800))

        async def one() -> None:
            async with bodies.read(Slow()):  # type: ignore[arg-type]
                pass

        results = await asyncio.gather(*(one() for _ in range(12)), return_exceptions=True)
        assert bodies.held.bytes == 0
        return results

    results = asyncio.run(main())
    assert [type(r) for r in results].count(BusyError) == 12 - 8


def test_texts_among_numbers_take_no_memory() -> None:
    # numpy would make room for the longest text in the place of each: 20 GB here.
    data = ["x" * 1_000_000, *([""] * 5_000)]
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match="str values"):
            from_json("x", "FP32", (len(data),), data)
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("path", "body", "headers", "status"),
    [
        (PATH, GOOD, {"inference-header-content-length": "²"}, 400),
        (PATH, GOOD, {"inference-header-content-length": "9" * 5000}, 400),
        (PATH, GOOD, {"inference-header-content-length": "-1"}, 400),
        ("/v2/models/m/versions/²/infer".replace("²", "%C2%B2"), GOOD, {}, 404),
        ("/v2/repository/models/m/load", {"parameters": {"version": "²"}}, {}, 400),
        ("/v2/repository/models/m/load", {"parameters": {"version": "9" * 5000}}, {}, 400),
        ("/v2/repository/models/m/load", {"parameters": 3}, {}, 400),
        ("/v2/repository/models/m/load", b"[" * 100_000, {}, 400),
        (PATH, b"[" * 100_000, {}, 400),
        ("/v2/models/..%2f..%2fetc/infer", GOOD, {}, 404),
    ],
)
def test_odd_requests_are_the_clients_fault(
    server: Server, path: str, body: Any, headers: dict[str, str], status: int
) -> None:
    assert ask(server, path, body, headers)[0] == status


def test_nan_is_refused(server: Server) -> None:
    entry = {"name": "input_ids", "datatype": "FP32", "shape": [1], "parameters": {"binary_data_size": 4}}
    head = json.dumps({"inputs": [entry]}).encode()
    length = {"inference-header-content-length": str(len(head))}
    status, said = ask(server, PATH, head + struct.pack("<f", float("nan")), length)
    assert (status, "NaN" in said["error"]) == (400, True)


def test_requests_with_other_values_never_break_the_server(server: Server) -> None:
    random_, counts = random.Random(0), {}
    for _ in range(150):
        raw = mutate(json.dumps(GOOD).encode(), random_)
        assert raw is not None
        status, said = ask(server, PATH, raw)
        counts[status] = counts.get(status, 0) + 1
        assert status in (200, 400, 404, 413), (raw, said)
    assert counts[400] > 50


def test_the_servers_own_faults_show_nothing_of_it(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail(self: Version, feeds: Any) -> Any:
        raise RuntimeError("secret of /etc/secret")

    monkeypatch.setattr(Version, "infer", fail)
    status, said = ask(server)
    assert (status, sorted(said)) == (500, ["error"])
    assert said["error"].startswith("Internal error ")
    with client_of(server, "grpc") as (client, module), pytest.raises(InferenceServerException) as caught:
        infer(client, module, "m", {"input_ids": np.ones((1, 1), np.int64)})
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"origin": "http://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"host": "evil.example:8000"}, 403),  # a name that was rebound to this machine
        ({"host": "127.0.0.1.evil.example"}, 403),
        ({"host": "localhost:8000", "origin": "http://localhost:8000"}, 200),
    ],
)
def test_pages_of_other_sites_may_not_ask(server: Server, headers: dict[str, str], status: int) -> None:
    assert ask(server, PATH, GOOD, headers)[0] == status


def test_only_loopback_insists_on_its_name() -> None:
    assert foreign({"host": "models.example"}, loopback=False) == ""
    assert foreign({"host": "[::1]:8000", "origin": "http://[::1]:8000"}, loopback=True) == ""
    assert foreign({"host": "models.example", "origin": "https://models.example"}, loopback=False) == ""


def test_loopback_is_the_default(server: Server) -> None:
    assert is_loopback(ServeSettings().host)
    assert is_loopback(Listening().host)
    assert [is_loopback(h) for h in ("::1", "127.8.8.8", "0.0.0.0", "127.evil.example", "::")] == [
        *(True, True, False, False, False)
    ]
    own = [a[4][0] for a in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)]
    for address in {a for a in own if not a.startswith("127.")}:
        with pytest.raises(OSError):
            socket.create_connection((address, server.port), timeout=2).close()


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(scope="module")
def pair(authority: trustme.CA, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return the files of a certificate and its key."""
    folder = tmp_path_factory.mktemp("tls")
    issued = authority.issue_cert("127.0.0.1", "localhost")
    issued.private_key_pem.write_to_path(folder / "key.pem")
    for blob in issued.cert_chain_pems:
        blob.write_to_path(folder / "cert.pem", append=True)
    return {"certificate": folder / "cert.pem", "key": folder / "key.pem"}


def test_tls(root: Path, authority: trustme.CA, pair: dict[str, Path]) -> None:
    context = ssl.create_default_context()
    authority.configure_trust(context)
    with running({"m": root}, **pair) as server:
        request = urllib.request.Request(f"https://127.0.0.1:{server.port}{PATH}", json.dumps(GOOD).encode())
        with urllib.request.urlopen(request, context=context, timeout=30) as response:
            assert response.status == 200
        with pytest.raises(urllib.error.URLError, match="CERTIFICATE_VERIFY_FAILED"):
            urllib.request.urlopen(request, timeout=30)
        with pytest.raises((OSError, urllib.error.URLError)):
            ask(server)  # without TLS
        trusted = grpc.ssl_channel_credentials(authority.cert_pem.bytes())
        with grpc.secure_channel(f"localhost:{server.grpc_port}", trusted) as channel:
            call = channel.unary_unary("/inference.GRPCInferenceService/ServerLive", lambda x: x, lambda x: x)
            assert call(b"", timeout=10) == b"\x08\x01"


def test_a_certificate_with_the_key_of_another_is_told(
    authority: trustme.CA, pair: dict[str, Path], tmp_path: Path
) -> None:
    authority.issue_cert("localhost").private_key_pem.write_to_path(tmp_path / "other.pem")
    with pytest.raises(InputError, match=r"other\.pem are no certificate and its key: .*MISMATCH"):
        Listening(certificate=pair["certificate"], key=tmp_path / "other.pem")


@pytest.mark.usefixtures("impatient")
def test_tls_handshakes_that_never_end_are_cut_off(root: Path, pair: dict[str, Path]) -> None:
    with running({"m": root}, grpc_port=None, **pair) as server, connect(server) as connection:
        assert closed_after(connection) < 10


@pytest.mark.parametrize("with_error", [True, False])
def test_an_http_server_that_dies_ends_the_process_with_an_error(
    root: Path, monkeypatch: pytest.MonkeyPatch, with_error: bool
) -> None:
    async def main_loop(self: WebServer) -> None:
        await asyncio.sleep(0.5)
        if with_error:
            raise RuntimeError("no more")

    monkeypatch.setattr(WebServer, "main_loop", main_loop)

    def wait() -> None:
        with running({"m": root}, loaded=False) as server:
            server.thread.join(30)  # type: ignore[attr-defined]
            assert not server.thread.is_alive()  # type: ignore[attr-defined]

    with pytest.raises(SystemStateError, match="has ended by itself") as raised:
        wait()
    assert isinstance(raised.value.__cause__, RuntimeError) == with_error


def test_clients_that_go_away_are_no_fault_of_the_server(server: Server) -> None:
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]
    log = logging.getLogger("deploy_prune.server")
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.DEBUG)
    try:
        with connect(server) as connection:
            connection.sendall(f"POST {PATH} HTTP/1.1\r\nhost: localhost\r\ncontent-length: 9\r\n\r\nhalf".encode())
            time.sleep(0.1)  # until it is read
        wait_until(lambda: bool(records))
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
    assert [(r.levelname, r.exc_info) for r in records] == [("DEBUG", None)]


@pytest.mark.parametrize("host", ["x/v2/health/live?", "x/v2/health/live#", "x"])
def test_a_host_header_does_not_pass_for_a_path_without_a_token(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def url(request: Request) -> URL:  # as Starlette had it before 1.0.1
        return URL(f"http://{request.headers['host']}{request.scope['path']}")

    monkeypatch.setattr(Request, "url", property(url))
    app = make_app(Engine(Models(Serving())), token="0123456789abcdef")
    scope = {"type": "http", "method": "GET", "path": "/v2/models", "query_string": b"", "root_path": ""}
    scope |= {"headers": [(b"host", host.encode())]}
    sent: list[Any] = []

    async def receive() -> Any:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(app(scope, receive, send))
    assert sent[0]["status"] == 401


def test_the_description_of_the_service_holds(server: Server) -> None:
    schema = schemathesis.openapi.from_url(f"http://127.0.0.1:{server.port}/openapi.json")
    tried = []
    for result in schema.get_all_operations():
        operation = result.ok()
        if operation.path.endswith("/unload"):
            continue  # which would take the model from the others; a test of its own does it
        tried.append(operation.path)

        @given(case=operation.as_strategy())
        @SHORT
        def check(case: Any) -> None:
            response = case.call(base_url=f"http://127.0.0.1:{server.port}")
            assert response.status_code < 500 or response.status_code in (503, 504), response.content
            assert "Traceback" not in response.text

        check()
    assert len(tried) > 8
    assert ask(server)[0] == 200
