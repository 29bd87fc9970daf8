"""The protocol over HTTP: JSON, and JSON followed by raw tensors."""

from __future__ import annotations

import asyncio
import hmac
import logging
import uuid
from collections.abc import Mapping
from importlib.resources import files
from typing import Annotated, Any

import orjson
from fastapi import Body, FastAPI, Path, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException

from .. import __version__
from ..errors import DeployPruneError, InputError
from .batching import Arrays
from .engine import Answer, Engine
from .errors import BusyError, LateError, TooLargeError, http_status
from .models import ANSWERS
from .tensors import check_shape, datatype_of, from_bytes, from_json, json_of, parameter, to_bytes

log = logging.getLogger("deploy_prune.server")
HEADER_LENGTH = "inference-header-content-length"  # of the JSON before raw tensors
EXTENSIONS = ["binary_tensor_data", "model_repository"]
OPEN = ("/v2/health/live", "/v2/health/ready", "/")  # what needs no token
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
    inputs: list[Tensor] = Field(min_length=1, max_length=64)
    outputs: list[Wanted] | None = Field(None, max_length=64)


class LoadRequest(BaseModel):
    """Ask for a version."""

    parameters: dict[str, Any] | None = None


def make_app(
    engine: Engine, *, token: str | None = None, most_bytes: int = 1 << 26, body_seconds: float = 10.0
) -> FastAPI:
    """Return the application. Bodies have `most_bytes` at most, and must have arrived after `body_seconds`."""
    app = FastAPI(title="deploy_prune", version=__version__, docs_url=None, redoc_url=None, strict_content_type=False)
    failures = {400: {}, 401: {}, 404: {}, 408: {}, 413: {}, 503: {}, 504: {}}

    @app.middleware("http")
    async def guard(request: Request, call_next: Any) -> Response:
        if token is not None and request.url.path not in OPEN:
            given = request.headers.get("authorization", "").removeprefix("Bearer ").encode()
            if not hmac.compare_digest(given, token.encode()):
                return _said(401, "This server wants a token: Authorization: Bearer ...")
        try:
            return await call_next(request)
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
        return Response(files(__package__).joinpath("page.html").read_bytes(), media_type="text/html; charset=utf-8")

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

    schema = InferRequest.model_json_schema(ref_template="#/components/schemas/{model}")
    schema.pop("$defs", None)
    body = {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}

    @app.post("/v2/models/{name}/infer", responses=failures, openapi_extra=body)
    async def infer(request: Request, name: Name) -> Response:
        return await run(request, name, None)

    @app.post("/v2/models/{name}/versions/{version}/infer", responses=failures, openapi_extra=body)
    async def infer_version(request: Request, name: Name, version: Number) -> Response:
        return await run(request, name, version)

    async def run(request: Request, name: str, version: str | None) -> Response:
        raw = await read_body(request, most_bytes, body_seconds)
        asked, feeds = decode(raw, request.headers, engine.models.serving.request_elements)
        answer = await engine.infer("http", name, version, feeds, [w.name for w in asked.outputs or ()])
        return encode(answer, asked)

    @app.post("/v2/repository/index")
    async def index() -> list[dict[str, str]]:
        return engine.index()

    @app.post("/v2/repository/models/{name}/load", responses=failures)
    async def load(name: Name, asked: Annotated[LoadRequest | None, Body()] = None) -> dict[str, str]:
        version = await engine.load(name, asked.parameters if asked else None)
        return {"name": name, "version": str(version.number)}

    @app.post("/v2/repository/models/{name}/unload", responses=failures)
    async def unload(name: Name) -> dict[str, str]:
        await engine.models.unload(name)
        return {"name": name}

    return app


async def read_body(request: Request, most_bytes: int, seconds: float) -> bytes:
    """Return a request's body. Raises TooLargeError, before it is read where its length is known, or LateError."""
    length = request.headers.get("content-length", "")
    if length.isdigit() and int(length) > most_bytes:
        raise TooLargeError(f"The body has {int(length):,} bytes; at most {most_bytes:,} are taken.")
    parts: list[bytes] = []

    async def read() -> None:
        size = 0
        async for part in request.stream():
            size += len(part)
            if size > most_bytes:
                raise TooLargeError(f"The body has more than {most_bytes:,} bytes.")
            parts.append(part)

    try:
        await asyncio.wait_for(read(), seconds)
    except TimeoutError as error:
        raise LateError(f"The body did not arrive within {seconds:g} seconds.") from error
    return b"".join(parts)


def decode(raw: bytes, headers: Mapping[str, str], most_elements: int) -> tuple[InferRequest, Arrays]:
    """Read a request to run a model: JSON alone, or JSON followed by raw tensors. Raises InputError."""
    given = headers.get(HEADER_LENGTH)
    if given is not None and (not given.isdigit() or int(given) > len(raw)):
        raise InputError(f"{HEADER_LENGTH} {given!r:.40} does not fit a body of {len(raw)} bytes.")
    at = len(raw) if given is None else int(given)
    try:
        asked = InferRequest.model_validate(orjson.loads(raw[:at]))
    except ValueError as error:  # pydantic's is one
        raise InputError(f"The request is not one of the protocol: {_first_line(error)}") from error
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
    if isinstance(error, DeployPruneError) and (status := http_status(error)) != 500:
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
