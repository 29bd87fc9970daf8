"""The protocol over gRPC, by the stubs that Triton's client package has."""

from __future__ import annotations

import asyncio
import hmac
import logging
import math
import uuid
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc import service_pb2_grpc as stubs

from .. import __version__
from ..errors import DeployPruneError, InputError
from .batching import Arrays
from .connections import MOST_HEADER_BYTES
from .engine import Engine, Held
from .errors import LateError, grpc_status
from .http import EXTENSIONS, LONG_BYTES
from .tensors import BYTES, MOST_AXES, MOST_TENSORS, check_shape, datatype_of, from_bytes, from_json, to_bytes

log = logging.getLogger("deploy_prune.server")
CONTENTS = {
    "BOOL": "bool_contents",
    "INT8": "int_contents",
    "INT16": "int_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "UINT8": "uint_contents",
    "UINT16": "uint_contents",
    "UINT32": "uint_contents",
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    BYTES: "bytes_contents",
}
OPEN = ("/ServerLive", "/ServerReady")  # what needs no token
HANDSHAKE_MS = 10_000  # until a connection speaks HTTP/2, TLS included
PING_MS = 60_000  # a client that answers none is gone
AGE_MS = 600_000  # of a connection, whose next calls go through a new one
GRACE_MS = 60_000  # after that age, for the calls that run, at least


class Service(stubs.GRPCInferenceServiceServicer):
    """Answer the calls of the protocol; all others are unimplemented."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    async def ServerLive(self, request: Any, context: Any) -> Any:
        return pb.ServerLiveResponse(live=True)

    async def ServerReady(self, request: Any, context: Any) -> Any:
        return pb.ServerReadyResponse(ready=self.engine.models.ready)

    async def ServerMetadata(self, request: Any, context: Any) -> Any:
        return pb.ServerMetadataResponse(name="deploy_prune", version=__version__, extensions=EXTENSIONS)

    async def ModelReady(self, request: Any, context: Any) -> Any:
        return pb.ModelReadyResponse(ready=self.engine.ready(request.name, request.version))

    async def ModelMetadata(self, request: Any, context: Any) -> Any:
        said = self.engine.metadata(request.name, request.version)
        tensors = {
            k: [pb.ModelMetadataResponse.TensorMetadata(**t) for t in said.pop(k)] for k in ("inputs", "outputs")
        }
        return pb.ModelMetadataResponse(**said, **tensors)

    async def ModelInfer(self, request: Any, context: Any) -> Any:
        most = self.engine.models.serving.request_elements
        if request.ByteSize() > LONG_BYTES:  # others are answered meanwhile
            feeds = await asyncio.to_thread(decode, request, most)
        else:
            feeds = decode(request, most)
        wanted = [o.name for o in request.outputs]
        answer = await self.engine.infer("grpc", request.model_name, request.model_version, feeds, wanted)
        response = pb.ModelInferResponse(model_name=answer.model, model_version=str(answer.version), id=request.id)
        for name, array in answer.outputs.items():
            response.outputs.add(name=name, datatype=datatype_of(array), shape=array.shape)
            response.raw_output_contents.append(to_bytes(array))
        return response

    async def RepositoryIndex(self, request: Any, context: Any) -> Any:
        found = [pb.RepositoryIndexResponse.ModelIndex(**entry) for entry in self.engine.index()]
        return pb.RepositoryIndexResponse(models=[m for m in found if not request.ready or m.state == "READY"])

    async def RepositoryModelLoad(self, request: Any, context: Any) -> Any:
        version = request.parameters.get("version")
        asked = version.string_param or str(version.int64_param) if version else None
        await self.engine.load(request.model_name, {"version": asked})
        return pb.RepositoryModelLoadResponse()

    async def RepositoryModelUnload(self, request: Any, context: Any) -> Any:
        await self.engine.models.unload(request.model_name)
        return pb.RepositoryModelUnloadResponse()


def decode(request: Any, most_elements: int) -> Arrays:
    """Read the inputs of a request, raw or typed. Raises InputError."""
    feeds: Arrays = {}
    raw = request.raw_input_contents
    if len(request.inputs) > MOST_TENSORS or len(request.outputs) > MOST_TENSORS:
        raise InputError(f"The request has more than {MOST_TENSORS} inputs or outputs.")
    if raw and len(raw) != len(request.inputs):
        raise InputError(f"{len(request.inputs)} inputs come with {len(raw)} raw contents.")
    for number, tensor in enumerate(request.inputs):
        if tensor.name in feeds:
            raise InputError(f"The input {tensor.name} is given twice.")
        axes = tensor.shape[: MOST_AXES + 1]  # a shape of millions of them is told by these
        shape = check_shape(tensor.name, tensor.datatype, axes, most_elements)
        if raw:
            feeds[tensor.name] = from_bytes(tensor.name, tensor.datatype, shape, raw[number])
            continue
        if tensor.datatype not in CONTENTS:
            raise InputError(f"Input {tensor.name}: {tensor.datatype} comes as raw contents only.")
        values = getattr(tensor.contents, CONTENTS[tensor.datatype])
        if len(values) != math.prod(shape):  # before they become objects, which are many times as large
            raise InputError(f"Input {tensor.name} has {len(values)} values, its shape {math.prod(shape)}.")
        if tensor.datatype == BYTES:
            packed = b"".join(len(v).to_bytes(4, "little") + v for v in values)
            feeds[tensor.name] = from_bytes(tensor.name, BYTES, shape, packed)
        else:
            feeds[tensor.name] = from_json(tensor.name, tensor.datatype, shape, list(values))
    return feeds


class Guard(grpc.aio.ServerInterceptor):
    """Ask for the token, bound messages, and turn errors into statuses without a trace of the server's insides.

    Calls are taken as streams of one message, which are the same on the wire: only so can its time be bounded, and the
    token be asked for before it. grpc itself waits for a message as long as its connection lives.
    """

    def __init__(self, token: str | None, message_seconds: float, held: Held) -> None:
        self.token, self.message_seconds, self.held = token, message_seconds, held

    async def intercept_service(self, continuation: Callable[[Any], Awaitable[Any]], details: Any) -> Any:
        handler = await continuation(details)
        if handler is None or details.method.rpartition("/")[2] not in vars(Service):
            return None  # which grpc calls unimplemented
        given = dict(details.invocation_metadata or ()).get("authorization", "")
        allowed = self.token is None or details.method.endswith(OPEN) or self._knows(str(given))

        async def call(requests: Any, context: Any) -> Any:
            if not allowed:
                await context.abort(grpc.StatusCode.UNAUTHENTICATED, "Give a token: authorization: Bearer ...")
            try:
                request = await self._message(context)
                with self.held.holding(request.ByteSize()):
                    return await handler.unary_unary(request, context)
            except grpc.aio.AbortError:
                raise
            except Exception as error:
                if isinstance(error, DeployPruneError) and (status := grpc_status(error)) is not None:
                    hint = f" {error.hint}" if error.hint else ""
                    await context.abort(getattr(grpc.StatusCode, status), f"{error.message}{hint}")
                number = uuid.uuid4().hex[:12]
                log.error("internal error", extra={"error_id": number}, exc_info=error)
                await context.abort(grpc.StatusCode.INTERNAL, f"Internal error {number}.")

        return grpc.stream_unary_rpc_method_handler(call, handler.request_deserializer, handler.response_serializer)

    async def _message(self, context: Any) -> Any:
        """Return a call's message. Raises LateError, or InputError where there is none or it is none of its kind."""
        try:
            request = await asyncio.wait_for(context.read(), self.message_seconds)
        except TimeoutError as error:
            raise LateError(f"The message did not arrive within {self.message_seconds:g} seconds.") from error
        except DecodeError as error:
            raise InputError("The message is not one of the protocol.") from error
        if request is grpc.aio.EOF:
            raise InputError("The call has no message.")
        return request

    def _knows(self, given: str) -> bool:
        return hmac.compare_digest(given.removeprefix("Bearer ").encode(), str(self.token).encode())


async def start(
    engine: Engine,
    address: str,
    *,
    token: str | None,
    most_bytes: int,
    most_calls: int,
    message_seconds: float = 10.0,
    credentials: Any = None,
) -> tuple[Any, int]:
    """Start the gRPC server on an address; return it and its port. Calls beyond `most_calls` at once are refused.

    A message has `most_bytes` at most, and must have arrived after `message_seconds`.
    """
    call_ms = math.ceil(1000 * (message_seconds + engine.seconds))
    options = [
        ("grpc.max_receive_message_length", most_bytes),
        ("grpc.max_send_message_length", most_bytes),
        ("grpc.max_metadata_size", MOST_HEADER_BYTES),
        ("grpc.server_handshake_timeout_ms", HANDSHAKE_MS),
        ("grpc.keepalive_time_ms", PING_MS),
        ("grpc.keepalive_timeout_ms", PING_MS),
        ("grpc.max_connection_age_ms", AGE_MS),
        ("grpc.max_connection_age_grace_ms", max(GRACE_MS, call_ms)),
    ]
    guard = Guard(token, message_seconds, engine.held)
    server = grpc.aio.server(interceptors=[guard], options=options, maximum_concurrent_rpcs=most_calls)
    stubs.add_GRPCInferenceServiceServicer_to_server(Service(engine), server)
    port = server.add_secure_port(address, credentials) if credentials else server.add_insecure_port(address)
    await server.start()
    return server, int(port)
