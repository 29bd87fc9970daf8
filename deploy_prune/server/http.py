"""The protocol over HTTP: JSON, and JSON followed by raw tensors."""

from __future__ import annotations

import asyncio
import hmac
import logging
import re
import uuid
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from importlib.resources import files
from typing import Annotated, Any, TypeVar

import orjson
from fastapi import FastAPI, Path, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from .. import __version__
from ..errors import DeployPruneError, InputError
from .batching import Arrays
from .connections import is_loopback
from .engine import Answer, Engine, Held
from .errors import BusyError, LateError, TooLargeError, http_status
from .tensors import MOST_TENSORS, check_shape, datatype_of, from_bytes, from_json, json_of, parameter, to_bytes
from .versions import ANSWERS

log = logging.getLogger("deploy_prune.server")
HEADER_LENGTH = "inference-header-content-length"  # of the JSON before raw tensors
EXTENSIONS = ["binary_tensor_data", "model_repository"]
LONG_BYTES = 1 << 18  # of a body, beyond which it is decoded beside the event loop
OPEN = ("/v2/health/live", "/v2/health/ready", "/")  # what needs no token
PAGE_POLICY = (  # the page asks this server alone
    "default-src 'none'; connect-src 'self'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
Asked = TypeVar("Asked", bound=BaseModel)
Name = Annotated[str, Path(max_length=200)]
Number = Annotated[str, Path(max_length=20)]


class Tensor(BaseModel):
    """Describe one tensor of a request."""

    model_config = ConfigDict(extra="ignore")

    name: str = Field(max_length=200)
    shape: list[int] = Field(min_length=1, max_length=8)
    datatype: str = Field(max_length=20)
    parameters: dict[str, Any] | None = None
    data: list[Any] | None = None


class Wanted(BaseModel):
    """Name one output that is asked for."""

    name: str = Field(max_length=200)
    parameters: dict[str, Any] | None = None


class InferRequest(BaseModel):
    """Describe a request to run a model."""

    id: str | None = Field(None, max_length=200)
    parameters: dict[str, Any] | None = None
    inputs: list[Tensor] = Field(min_length=1, max_length=MOST_TENSORS)
    outputs: list[Wanted] | None = Field(None, max_length=MOST_TENSORS)


class LoadRequest(BaseModel):
    """Ask for a version."""

    parameters: dict[str, Any] | None = None


def make_app(
    engine: Engine,
    *,
    token: str | None = None,
    most_bytes: int = 1 << 26,
    body_seconds: float = 10.0,
    loopback: bool = False,
) -> FastAPI:
    """Return the application. Bodies have `most_bytes` at most, and must have arrived after `body_seconds`.

    `loopback` says that it is reached from this machine alone: requests by another name are then refused.
    """
    app = FastAPI(title="deploy_prune", version=__version__, docs_url=None, redoc_url=None, strict_content_type=False)
    failures: dict[int | str, dict[str, Any]] = {400: {}, 401: {}, 403: {}, 404: {}, 413: {}, 503: {}, 504: {}}
    bodies = Bodies(most_bytes, body_seconds, engine.held)

    @app.middleware("http")
    async def guard(request: Request, call_next: Any) -> Response:
        if reason := foreign(request.headers, loopback):
            return _said(403, reason)
        if token is not None and request.scope["path"] not in OPEN:  # request.url has the Host header in it
            given = request.headers.get("authorization", "").removeprefix("Bearer ").encode()
            if not hmac.compare_digest(given, token.encode()):
                return _said(401, "This server wants a token: Authorization: Bearer ...")
        try:
            return await call_next(request)
        except ClientDisconnect:
            log.debug("a client went away before its request was there")
            return _said(400, "The request is not complete.")  # which nobody reads
        except Exception as error:
            return _failed(error)

    @app.exception_handler(DeployPruneError)
    async def refused(request: Request, error: DeployPruneError) -> Response:
        return _failed(error)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        return _said(400, f"{'.'.join(map(str, first['loc']))}: {first['msg']}"[:300])

    @app.exception_handler(HTTPException)
    async def other(request: Request, error: HTTPException) -> Response:
        return _said(error.status_code, str(error.detail), headers=error.headers)

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        html = files(__package__).joinpath("page.html").read_bytes()
        return Response(html, headers={"content-security-policy": PAGE_POLICY}, media_type="text/html; charset=utf-8")

    @app.get("/metrics", include_in_schema=False)
    async def metrics() -> Response:
        return Response(engine.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/v2")
    async def server() -> dict[str, Any]:
        return {"name": "deploy_prune", "version": __version__, "extensions": EXTENSIONS}

    @app.get("/v2/health/live")
    async def live() -> dict[str, bool]:
        return {"live": True}

    @app.get("/v2/health/ready", responses={503: {}})
    async def ready() -> Response:
        return _json({"ready": engine.models.ready}, 200 if engine.models.ready else 503)

    @app.get("/v2/models")
    async def models() -> dict[str, list[str]]:
        return {"models": [m for name in engine.models.entries for m in (name, name + ANSWERS)]}

    @app.get("/v2/models/{name}", responses=failures)
    async def model(name: Name) -> dict[str, Any]:
        return engine.metadata(name, None)

    @app.get("/v2/models/{name}/versions/{version}", responses=failures)
    async def model_version(name: Name, version: Number) -> dict[str, Any]:
        return engine.metadata(name, version)

    @app.get("/v2/models/{name}/ready", responses=failures)
    async def model_ready(name: Name) -> Response:
        return _ready(name, engine.ready(name, None))

    @app.get("/v2/models/{name}/versions/{version}/ready", responses=failures)
    async def version_ready(name: Name, version: Number) -> Response:
        return _ready(name, engine.ready(name, version))

    @app.post("/v2/models/{name}/infer", responses=failures, openapi_extra=body_of(InferRequest))
    async def infer(request: Request, name: Name) -> Response:
        return await run(request, name, None)

    @app.post("/v2/models/{name}/versions/{version}/infer", responses=failures, openapi_extra=body_of(InferRequest))
    async def infer_version(request: Request, name: Name, version: Number) -> Response:
        return await run(request, name, version)

    async def run(request: Request, name: str, version: str | None) -> Response:
        async with bodies.read(request) as raw:
            most = engine.models.serving.request_elements
            if len(raw) > LONG_BYTES:  # others are answered meanwhile
                asked, feeds = await asyncio.to_thread(decode, raw, request.headers, most)
            else:
                asked, feeds = decode(raw, request.headers, most)
            # Still inside: raw tensors are views of the body, which is held as long as they wait.
            answer = await engine.infer("http", name, version, feeds, [w.name for w in asked.outputs or ()])
            return encode(answer, asked)

    @app.post("/v2/repository/index")
    async def index() -> list[dict[str, str]]:
        return engine.index()

    @app.post(
        "/v2/repository/models/{name}/load",
        responses={**failures, 500: {}},
        openapi_extra=body_of(LoadRequest, required=False),
    )
    async def load(request: Request, name: Name) -> dict[str, str]:
        async with bodies.read(request) as raw:
            asked = parse(LoadRequest, raw) if raw.strip() else LoadRequest()
        version = await engine.load(name, asked.parameters)
        return {"name": name, "version": str(version.number)}

    @app.post("/v2/repository/models/{name}/unload", responses=failures)
    async def unload(name: Name) -> dict[str, str]:
        await engine.models.unload(name)
        return {"name": name}

    return app


def foreign(headers: Mapping[str, str], loopback: bool) -> str:
    """Say why a request comes from another site's page in a browser of this machine, or "" where it does not.

    Such a page may send requests to any address, and reach this one by a name of its own (DNS rebinding).
    """
    host = headers.get("host", "")
    origin = headers.get("origin")
    if origin is not None and origin.partition("://")[2] != host:
        return "Pages of other sites may not ask this server."
    name = host.rpartition(":")[0] if host.rpartition(":")[2].isdecimal() else host
    if loopback and host and not is_loopback(name.strip("[]")):
        return "This server is reached as localhost alone."
    return ""


class Bodies:
    """Read the bodies of requests: each of `most_bytes` at most, in `seconds`, all that are held counted in `held`."""

    def __init__(self, most_bytes: int, seconds: float, held: Held) -> None:
        self.most_bytes, self.seconds, self.held = most_bytes, seconds, held

    @asynccontextmanager
    async def read(self, request: Request) -> AsyncIterator[bytes]:
        """Hold a request's body.

        Raises TooLargeError, before it is read where its length is known, LateError, and BusyError where the bodies of
        others take all the memory that there is for them.
        """
        length = request.headers.get("content-length", "")
        if re.fullmatch("[0-9]{1,18}", length) and int(length) > self.most_bytes:  # h11 takes no longer numbers either
            raise TooLargeError(f"The body has {int(length):,} bytes; at most {self.most_bytes:,} are taken.")
        parts: list[bytes] = []
        size = 0

        async def read() -> None:
            nonlocal size
            async for part in request.stream():
                self.held.take(len(part))
                size += len(part)
                parts.append(part)
                if size > self.most_bytes:
                    raise TooLargeError(f"The body has more than {self.most_bytes:,} bytes.")

        try:
            try:
                await asyncio.wait_for(read(), self.seconds)
            except TimeoutError as error:
                raise LateError(f"The body did not arrive within {self.seconds:g} seconds.") from error
            raw = b"".join(parts)
            parts.clear()
            yield raw
        finally:
            self.held.give_back(size)


def body_of(model: type[BaseModel], required: bool = True) -> dict[str, Any]:
    """Return what OpenAPI says of a body that clients send under any content type."""
    schema = model.model_json_schema(ref_template="{model}")
    kinds = schema.pop("$defs", {})

    def whole(part: Any) -> Any:  # OpenAPI would look for the definitions elsewhere
        if isinstance(part, dict):
            return whole(kinds[part["$ref"]]) if "$ref" in part else {k: whole(v) for k, v in part.items()}
        return [whole(x) for x in part] if isinstance(part, list) else part

    schema = whole(schema)
    return {"requestBody": {"required": required, "content": {"application/json": {"schema": schema}}}}


def parse(model: type[Asked], raw: bytes) -> Asked:
    """Return a body of JSON. Raises InputError."""
    try:
        return model.model_validate(orjson.loads(raw))
    except ValueError as error:  # pydantic's is one
        raise InputError(f"The request is not one of the protocol: {_first_line(error)}") from error


def decode(raw: bytes, headers: Mapping[str, str], most_elements: int) -> tuple[InferRequest, Arrays]:
    """Read a request to run a model: JSON alone, or JSON followed by raw tensors. Raises InputError."""
    given = headers.get(HEADER_LENGTH)
    if given is not None and (not re.fullmatch("[0-9]{1,18}", given) or int(given) > len(raw)):
        raise InputError(f"{HEADER_LENGTH} {given!r:.40} does not fit a body of {len(raw)} bytes.")
    at = len(raw) if given is None else int(given)
    asked = parse(InferRequest, raw[:at])
    feeds: Arrays = {}
    rest = memoryview(raw)
    for tensor in asked.inputs:
        shape = check_shape(tensor.name, tensor.datatype, tensor.shape, most_elements)
        size = parameter(tensor.parameters, "binary_data_size")
        if tensor.name in feeds:
            raise InputError(f"The input {tensor.name} is given twice.")
        if size is not None:
            if type(size) is not int or not 0 <= size <= len(raw) - at:
                raise InputError(f"Input {tensor.name}: binary_data_size {size!r:.40} is beyond the body's end.")
            feeds[tensor.name] = from_bytes(tensor.name, tensor.datatype, shape, rest[at : at + size])
            at += size
        elif tensor.data is None:
            raise InputError(f"Input {tensor.name} has no data.")
        else:
            feeds[tensor.name] = from_json(tensor.name, tensor.datatype, shape, tensor.data)
            tensor.data = None  # many times as large as the array, while the request waits
    if at != len(raw):
        raise InputError(f"{len(raw) - at} bytes are left over behind the inputs.")
    return asked, feeds


def encode(answer: Answer, asked: InferRequest) -> Response:
    """Return the response, each output as JSON or raw, as the request asks."""
    default = bool(parameter(asked.parameters, "binary_data_output", False))
    binary = {w.name: bool(parameter(w.parameters, "binary_data", default)) for w in asked.outputs or ()}
    outputs, tail = [], []
    for name, array in answer.outputs.items():
        entry: dict[str, Any] = {"name": name, "datatype": datatype_of(array), "shape": list(array.shape)}
        if binary.get(name, default):
            raw = to_bytes(array)
            entry["parameters"] = {"binary_data_size": len(raw)}
            tail.append(raw)
        else:
            entry["data"] = json_of(array)
        outputs.append(entry)
    document = {"model_name": answer.model, "model_version": str(answer.version), "outputs": outputs}
    head = orjson.dumps(document | ({"id": asked.id} if asked.id is not None else {}))
    if not tail:
        return Response(head, media_type="application/json")
    headers = {HEADER_LENGTH: str(len(head))}
    return Response(b"".join([head, *tail]), headers=headers, media_type="application/octet-stream")


def _json(document: Any, status: int = 200) -> Response:
    return Response(orjson.dumps(document), status, media_type="application/json")


def _ready(name: str, ready: bool) -> Response:
    return _json({"name": name, "ready": ready}, 200 if ready else 503)


def _said(status: int, message: str, headers: Mapping[str, str] | None = None) -> Response:
    return Response(orjson.dumps({"error": message}), status, headers=headers, media_type="application/json")


def _failed(error: Exception) -> Response:
    """Return what the client is told: the reason of its own mistakes, and a number for the server's."""
    if isinstance(error, DeployPruneError) and (status := http_status(error)) is not None:
        hint = f" {error.hint}" if error.hint else ""
        retry = {"retry-after": "1"} if isinstance(error, BusyError) else None
        return _said(status, f"{error.message}{hint}", retry)
    number = uuid.uuid4().hex[:12]
    log.error("internal error", extra={"error_id": number}, exc_info=error)
    return _said(500, f"Internal error {number}.")


def _first_line(error: Exception) -> str:
    errors = getattr(error, "errors", None)
    if callable(errors):
        first = errors()[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"[:200]
    return str(error).splitlines()[0][:200]
