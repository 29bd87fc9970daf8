"""The server against clients that are slow, foreign, greedy or malformed: it answers, forgets them and goes on."""

from __future__ import annotations

import asyncio
import json
import random
import socket
import ssl
import struct
import threading
import time
import tracemalloc
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
from bundles_tiny import exported_bundle
from fuzz.mutation import mutate

pytest.importorskip("tritonclient", reason="the extra 'serve' is not installed")
import grpc
import schemathesis
import trustme
from hypothesis import HealthCheck, given, settings
from servers_tiny import running
from tritonclient.grpc import service_pb2 as pb

from deploy_prune.config import ServeSettings
from deploy_prune.errors import InputError
from deploy_prune.server import rpc
from deploy_prune.server.connections import TimedProtocol, is_loopback
from deploy_prune.server.engine import Held
from deploy_prune.server.errors import BusyError
from deploy_prune.server.http import Bodies, foreign
from deploy_prune.server.models import Serving, Version
from deploy_prune.server.run import Listening, Server
from deploy_prune.server.tensors import from_json

SHORT = settings(
    max_examples=25, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
PATH = "/v2/models/m/infer"
IDS = {n: {"name": n, "datatype": "INT64", "shape": [1, 3], "data": [1, 1, 1]} for n in ("input_ids", "attention_mask")}
GOOD = {"inputs": [*IDS.values(), {**IDS["input_ids"], "name": "token_type_ids", "data": [0, 0, 0]}]}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported_bundle(tmp_path_factory.mktemp("hostile")).root


@pytest.fixture(scope="module")
def server(root: Path) -> Iterator[Server]:
    with running({"m": root}, body_seconds=0.5, most_bytes=1 << 20) as started:
        yield started


def ask(
    server: Server, path: str = PATH, body: Any = GOOD, headers: dict[str, str] | None = None
) -> tuple[int, dict[str, Any]]:
    raw = None if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{server.port}{path}", raw, headers or {})
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            return response.status, json.loads(response.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def connect(server: Server) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.port), timeout=20)


def closed_after(connection: socket.socket) -> float:
    """Read until the other side ends the connection; return the seconds that took."""
    started = time.monotonic()
    try:
        while connection.recv(1 << 16):
            pass
    except ConnectionResetError:
        pass
    return time.monotonic() - started


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


def grpc_request(most: int = 0) -> bytes:
    """Return the good request as a message, with an id that fills it up to `most` bytes."""
    request = pb.ModelInferRequest(model_name="m")
    for entry in GOOD["inputs"]:
        tensor = request.inputs.add(name=entry["name"], datatype="INT64", shape=[1, 3])
        tensor.contents.int64_contents.extend(entry["data"])
    request.id = "x" * max(0, most - request.ByteSize() - 4)
    return request.SerializeToString()


@contextmanager
def calling(server: Server, method: str = "ModelInfer") -> Iterator[Callable[..., bytes]]:
    """Yield a method of the server that takes and gives messages as they are on the wire."""
    with grpc.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel:
        yield channel.unary_unary(f"/inference.GRPCInferenceService/{method}", lambda x: x, lambda x: x)


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_requests_are_counted_until_they_are_answered(root: Path, protocol: str) -> None:
    """Let each take nearly all that one may have: of twelve, no more than eight wait at one time."""
    serving = Serving(threads=1, wait=1.0)
    with running({"m": root}, serving=serving, most_bytes=1000) as server, calling(server) as call:
        raw, message = json.dumps(GOOD).encode().ljust(950), grpc_request(950)

        def one(_: int) -> str:
            if protocol == "http":
                status, said = ask(server, PATH, raw)
                return "" if status == 200 else f"{status} {said['error']}"
            try:
                call(message, timeout=20)
            except grpc.RpcError as error:
                return f"{error.code().name} {error.details()}"
            return ""

        with ThreadPoolExecutor(12) as pool:
            found = list(pool.map(one, range(12)))
        status = {"http": "503", "grpc": "RESOURCE_EXHAUSTED"}[protocol]
        assert found.count("") == 8
        assert found.count(f"{status} The server holds too many other requests. Ask again later.") == 4
        assert one(0) == ""  # all was given back


@pytest.mark.parametrize(
    ("axes", "values", "inputs", "words"),
    [
        (1, 1_000_000, 1, "1000000 values, its shape 1"),
        (1_000_000, 1, 1, "is no shape"),
        (1, 1, 20_000, "more than 64 inputs"),
    ],
)
def test_what_a_message_repeats_is_counted_before_it_becomes_objects(
    axes: int, values: int, inputs: int, words: str
) -> None:
    request = pb.ModelInferRequest()
    for number in range(inputs):
        tensor = request.inputs.add(name=f"x{number}", datatype="INT64", shape=[1] * axes)
        tensor.contents.int64_contents.extend([1] * values)
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match=words):
            rpc.decode(request, 1 << 24)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


def test_long_messages_are_decoded_beside_the_event_loop(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    threads = []

    def seen(request: Any, most: int) -> Any:
        threads.append(threading.current_thread().name)
        raise InputError("seen")

    monkeypatch.setattr(rpc, "decode", seen)
    with calling(server) as call:
        for size in (0, 1 << 19):
            with pytest.raises(grpc.RpcError, match="seen"):
                call(grpc_request(size), timeout=10)
    assert [name.startswith("asyncio") for name in threads] == [False, True]


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


def test_grpc_garbage_is_refused(server: Server) -> None:
    with grpc.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel:
        call = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer", lambda x: x, lambda x: x)
        random_ = np.random.default_rng(0)
        for size in (1, 10, 1000):
            with pytest.raises(grpc.RpcError) as caught:
                call(random_.bytes(size), timeout=10)
            assert "Traceback" not in str(caught.value.details())
        with pytest.raises(grpc.RpcError) as caught:
            call(b"\0" * (1 << 21), timeout=10)
        assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert ask(server)[0] == 200


def test_grpc_connections_that_say_nothing_are_cut_off(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rpc, "HANDSHAKE_MS", 500)
    with running({"m": root}) as server:
        address = ("127.0.0.1", server.grpc_port)
        with socket.create_connection(address, timeout=20) as silent, socket.create_connection(address, 20) as half:
            half.sendall(b"PRI * HTTP/2.0\r\n")
            assert closed_after(silent) < 10
            assert closed_after(half) < 10
        with grpc.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel:
            call = channel.unary_unary("/inference.GRPCInferenceService/ServerLive", lambda x: x, lambda x: x)
            assert call(b"", timeout=10) == b"\x08\x01"


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    """Return a frame of HTTP/2: its length, kind, flags and stream before the payload."""
    return len(payload).to_bytes(3, "big") + bytes((kind, flags)) + stream.to_bytes(4, "big") + payload


def field(name: bytes, value: bytes) -> bytes:
    """Return a header as HTTP/2 packs it, without a table: literal name and value."""
    return b"\0" + bytes((len(name),)) + name + bytes((len(value),)) + value


@contextmanager
def half_a_call(server: Server) -> Iterator[socket.socket]:
    """Yield a connection that has begun a call, whose message of 1000 bytes does not come."""
    path = b"/inference.GRPCInferenceService/ModelInfer"
    asked = {b":method": b"POST", b":scheme": b"http", b":path": path, b":authority": b"localhost"}
    asked |= {b"content-type": b"application/grpc", b"te": b"trailers"}
    headers = b"".join(field(name, value) for name, value in asked.items())
    with socket.create_connection(("127.0.0.1", server.grpc_port), timeout=20) as connection:
        connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0) + frame(4, 1, 0))
        connection.sendall(frame(1, 4, 1, headers) + frame(0, 0, 1, b"\0" + (1000).to_bytes(4, "big")))
        yield connection


def drip(connection: socket.socket) -> None:
    """Send fewer bytes of the message than it announced, one at a time, for 20 seconds."""
    for _ in range(400):
        connection.sendall(frame(0, 0, 1, b" "))
        time.sleep(0.05)


def call_ended_after(connection: socket.socket) -> float:
    """Read frames until stream 1 is ended, by trailers or a reset; return the seconds that took."""
    started, raw = time.monotonic(), b""
    while True:
        while len(raw) < 9 or len(raw) < 9 + int.from_bytes(raw[:3], "big"):
            more = connection.recv(1 << 16)
            assert more, "the connection ended, not the call"
            raw += more
        kind, flags, stream = raw[3], raw[4], int.from_bytes(raw[5:9], "big")
        if stream == 1 and (kind == 3 or (kind == 1 and flags & 1)):
            return time.monotonic() - started
        raw = raw[9 + int.from_bytes(raw[:3], "big") :]


def test_a_grpc_message_that_does_not_come_gives_its_place_back(root: Path) -> None:
    with (
        running({"m": root}, connections=1, body_seconds=1.5) as server,
        half_a_call(server) as slow,
        calling(server, "ServerLive") as call,
    ):
        time.sleep(0.3)  # until it has the only place
        with pytest.raises(grpc.RpcError) as caught:
            call(b"", timeout=10)
        assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert call_ended_after(slow) < 5
        assert call(b"", timeout=10) == b"\x08\x01"


def test_a_call_without_the_token_is_told_before_its_message(root: Path) -> None:
    with running({"m": root}, token="0123456789abcdef", body_seconds=60.0) as server, half_a_call(server) as slow:
        assert call_ended_after(slow) < 10


@pytest.mark.parametrize("method", ["ModelConfig", "ModelStatistics", "CudaSharedMemoryStatus", "ModelStreamInfer"])
def test_other_methods_are_unimplemented(server: Server, method: str) -> None:
    with calling(server, method) as call, pytest.raises(grpc.RpcError) as caught:
        call(b"", timeout=10)
    assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED


def test_calls_outlive_the_age_of_their_connection(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rpc, "AGE_MS", 300)
    monkeypatch.setattr(rpc, "GRACE_MS", 300)
    infer = Version.infer

    async def slow(self: Version, feeds: Any) -> Any:
        await asyncio.sleep(2)
        return await infer(self, feeds)

    monkeypatch.setattr(Version, "infer", slow)
    with running({"m": root}, request_seconds=20.0) as server, calling(server) as call:
        answer = pb.ModelInferResponse.FromString(call(grpc_request(), timeout=20))
    assert answer.outputs[0].name == "logits"


def test_grpc_messages_that_never_end_are_cut_off(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rpc, "AGE_MS", 1_000)
    monkeypatch.setattr(rpc, "GRACE_MS", 500)
    with running({"m": root}, connections=1, body_seconds=2.0, request_seconds=0.5) as server:
        with half_a_call(server) as dripping:
            started = time.monotonic()
            with pytest.raises((BrokenPipeError, ConnectionResetError)):
                drip(dripping)
            assert time.monotonic() - started > 0.8  # not for what it sent
        with grpc.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel:
            call = channel.unary_unary("/inference.GRPCInferenceService/ServerLive", lambda x: x, lambda x: x)
            assert call(b"", timeout=10) == b"\x08\x01"  # its only place is free again


def test_the_servers_own_faults_show_nothing_of_it(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail(self: Version, feeds: Any) -> Any:
        raise RuntimeError("secret of /etc/secret")

    monkeypatch.setattr(Version, "infer", fail)
    status, said = ask(server)
    assert (status, sorted(said)) == (500, ["error"])
    assert said["error"].startswith("Internal error ")
    import tritonclient.grpc as client_of
    from tritonclient.utils import InferenceServerException

    tensor = client_of.InferInput("input_ids", [1, 1], "INT64")
    tensor.set_data_from_numpy(np.ones((1, 1), np.int64))
    client = client_of.InferenceServerClient(f"127.0.0.1:{server.grpc_port}")
    with pytest.raises(InferenceServerException) as caught:
        client.infer("m", [tensor])
    client.close()
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


def test_tls(root: Path, tmp_path: Path) -> None:
    authority = trustme.CA()
    issued = authority.issue_cert("127.0.0.1", "localhost")
    issued.private_key_pem.write_to_path(tmp_path / "key.pem")
    for blob in issued.cert_chain_pems:
        blob.write_to_path(tmp_path / "cert.pem", append=True)
    context = ssl.create_default_context()
    authority.configure_trust(context)
    with running({"m": root}, certificate=tmp_path / "cert.pem", key=tmp_path / "key.pem") as server:
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


def test_the_description_of_the_service_holds(server: Server) -> None:
    schema = schemathesis.openapi.from_url(f"http://127.0.0.1:{server.port}/openapi.json")
    tried = []
    for result in schema.get_all_operations():
        operation = result.ok()
        if operation.path.endswith("/unload"):
            continue  # which would take the model from the others; a test of its own does it
        tried.append(operation.path)

        @given(case=operation.as_strategy())
        @settings(
            max_examples=25, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
        )
        def check(case: Any) -> None:
            response = case.call(base_url=f"http://127.0.0.1:{server.port}")
            assert response.status_code < 500 or response.status_code in (503, 504), response.content
            assert "Traceback" not in response.text

        check()
    assert len(tried) > 8
    assert ask(server)[0] == 200
