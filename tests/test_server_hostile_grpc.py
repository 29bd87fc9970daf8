"""The server against gRPC clients that are slow, foreign, greedy or malformed: it answers, forgets them and goes on."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
import tracemalloc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("tritonclient", reason="the extra 'serve' is not installed")
import grpc
from servers_tiny import GOOD, PATH, ask, calling, closed_after, running
from tritonclient.grpc import service_pb2 as pb

from deploy_prune.errors import InputError
from deploy_prune.server import rpc
from deploy_prune.server.run import Server
from deploy_prune.server.versions import Serving, Version


def grpc_request(most: int = 0) -> bytes:
    """Return the good request as a message, with an id that fills it up to `most` bytes."""
    request = pb.ModelInferRequest(model_name="m")
    for entry in GOOD["inputs"]:
        tensor = request.inputs.add(name=entry["name"], datatype="INT64", shape=[1, 3])
        tensor.contents.int64_contents.extend(entry["data"])
    request.id = "x" * max(0, most - request.ByteSize() - 4)
    return request.SerializeToString()


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


def test_grpc_garbage_is_refused(server: Server) -> None:
    with calling(server) as call:
        random_ = np.random.default_rng(0)
        for size in (1, 10, 1000):
            with pytest.raises(grpc.RpcError) as caught:
                call(random_.bytes(size), timeout=10)
            assert "Traceback" not in str(caught.value.details())
        with pytest.raises(grpc.RpcError) as caught:
            call(b"\0" * (1 << 21), timeout=10)
        assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert ask(server)[0] == 200


@pytest.mark.parametrize("compression", [grpc.Compression.Gzip, grpc.Compression.Deflate])
def test_compressed_messages_are_bounded_while_they_are_unpacked(server: Server, compression: Any) -> None:
    with calling(server) as call:
        answer = pb.ModelInferResponse.FromString(call(grpc_request(), timeout=20, compression=compression))
        assert answer.outputs[0].name == "logits"
        with pytest.raises(grpc.RpcError) as caught:
            call(grpc_request() + b"\0" * (1 << 26), timeout=20, compression=compression)
    assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "Decompressed message larger than max" in caught.value.details()  # not after it took 64 MiB


def test_grpc_connections_that_say_nothing_are_cut_off(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rpc, "HANDSHAKE_MS", 500)
    with running({"m": root}) as server:
        address = ("127.0.0.1", server.grpc_port)
        with socket.create_connection(address, timeout=20) as silent, socket.create_connection(address, 20) as half:
            half.sendall(b"PRI * HTTP/2.0\r\n")
            assert closed_after(silent) < 10
            assert closed_after(half) < 10
        with calling(server, "ServerLive") as call:
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
        with calling(server, "ServerLive") as call:
            assert call(b"", timeout=10) == b"\x08\x01"  # its only place is free again
