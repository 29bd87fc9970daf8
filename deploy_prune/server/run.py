"""Start both protocols on one event loop, and end them without losing a request."""

from __future__ import annotations

import asyncio
import logging
import math
import signal
import ssl
from collections.abc import Coroutine, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import uvicorn
from pythonjsonlogger.core import RESERVED_ATTRS
from pythonjsonlogger.json import JsonFormatter

from ..errors import InputError, SystemStateError
from . import rpc
from .connections import MOST_HEADER_BYTES, TimedProtocol, WebServer, is_loopback
from .engine import Engine, Held
from .http import make_app
from .models import Models
from .versions import Serving

log = logging.getLogger("deploy_prune.server")
KEEP_ALIVE = 5  # seconds an idle connection stays open
DENSE = "-dense"  # behind the name of a dense model that is served beside another
POLL = 2.0  # seconds between looks at the bundles on disk
HELD_TOGETHER = 8  # requests of the largest size, whose bytes are held at one time


@dataclass(frozen=True)
class Listening:
    """Say where a server listens and what it lets in."""

    host: str = "127.0.0.1"
    port: int = 8000
    grpc_port: int | None = 8001
    token: str | None = None
    certificate: Path | None = None
    key: Path | None = None
    most_bytes: int = 1 << 26
    body_seconds: float = 10.0
    request_seconds: float = 30.0
    drain_seconds: float = 30.0
    connections: int = 512
    poll: bool = False

    def __post_init__(self) -> None:
        if (self.certificate is None) != (self.key is None):
            raise InputError("TLS needs a certificate and its key.", hint="Give both --tls-cert and --tls-key.")
        for path in (self.certificate, self.key):
            if path is not None and not path.is_file():
                raise InputError(f"There is no file {path}.")
        if self.certificate is not None and self.key is not None:
            tls_files_fit(self.certificate, self.key)


@dataclass
class Server:
    """Serve models until it is stopped; `port` and `grpc_port` are known once it has started."""

    models: Mapping[str, Path]
    serving: Serving
    listening: Listening
    compare: bool = False  # also serve the dense model of each bundle
    port: int = 0
    grpc_port: int = 0
    started: asyncio.Event = field(default_factory=asyncio.Event)
    stopping: asyncio.Event = field(default_factory=asyncio.Event)

    async def run(self) -> None:
        """Load all models, answer until `stop` or a signal, then let everything that waits be answered.

        Raises SystemStateError where a port is taken, or the HTTP server ends by itself.
        """
        loop = asyncio.get_running_loop()
        models = Models(self.serving)
        held = Held(HELD_TOGETHER * self.listening.most_bytes)
        engine = Engine(models, seconds=self.listening.request_seconds, held=held)
        for name, source in self.models.items():
            models.add(name, source)
            if self.compare:
                models.add(f"{name}{DENSE}", source, replace(self.serving, variant="dense", precision="fp32"))
        web = self._web(engine)
        http = asyncio.create_task(web.serve(sockets=[self._socket(web.config)]))
        grpc_server = await self._grpc(engine)
        for sign in (signal.SIGINT, signal.SIGTERM):
            try:
                loop.add_signal_handler(sign, self.stop)
            except (NotImplementedError, RuntimeError, ValueError):
                log.debug("no signal handler in this thread")
        try:
            await self._while_up(http, self._load(models))
            log.info("ready", extra={"port": self.port, "grpc_port": self.grpc_port, "models": list(models.entries)})
            self.started.set()
            watching = asyncio.create_task(self._watch(models)) if self.listening.poll else None
            try:
                await self._while_up(http, self.stopping.wait())
            finally:
                if watching:
                    watching.cancel()
        finally:
            log.info("stopping")
            models.closing = True  # new requests are refused
            web.should_exit = True
            draining = [grpc_server.stop(self.listening.drain_seconds)] if grpc_server else []
            await asyncio.gather(http, *draining, return_exceptions=True)
            await models.close()
            log.info("stopped")

    async def _load(self, models: Models) -> None:
        for name in models.entries:
            await models.load(name)

    async def _while_up(self, http: asyncio.Task[None], waited: Coroutine[Any, Any, Any]) -> None:
        """Wait for something. Raises SystemStateError where the HTTP server ends before it."""
        task = asyncio.create_task(waited)
        try:
            await asyncio.wait({http, task}, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return await task
        finally:
            task.cancel()
        log.error("the HTTP server has ended", exc_info=http.exception())
        raise SystemStateError(
            "The HTTP server has ended by itself.", hint="The log says why; start it again."
        ) from http.exception()

    def stop(self) -> None:
        """Begin to end."""
        self.stopping.set()

    async def _watch(self, models: Models) -> None:
        """Load what is new on disk; a bundle that cannot be opened is logged, and the old one goes on."""
        while True:
            await asyncio.sleep(POLL)
            for name in models.entries:
                try:
                    await models.load_new(name)
                except Exception as error:
                    log.warning("not loaded", extra={"model": name, "reason": str(error)})

    def _web(self, engine: Engine) -> uvicorn.Server:
        listening = self.listening
        app = make_app(
            engine,
            token=listening.token,
            most_bytes=listening.most_bytes,
            body_seconds=listening.body_seconds,
            loopback=is_loopback(listening.host),
        )
        config = uvicorn.Config(
            app,
            http=TimedProtocol,
            ws="none",
            lifespan="off",
            h11_max_incomplete_event_size=MOST_HEADER_BYTES,
            host=listening.host,
            port=listening.port,
            ssl_certfile=listening.certificate,
            ssl_keyfile=listening.key,
            log_config=None,
            access_log=False,
            timeout_keep_alive=KEEP_ALIVE,
            limit_concurrency=listening.connections,
            timeout_graceful_shutdown=math.ceil(listening.drain_seconds),  # uvicorn takes whole seconds
            server_header=False,
        )
        return WebServer(config)

    def _socket(self, config: uvicorn.Config) -> Any:
        import socket

        family = socket.AF_INET6 if ":" in self.listening.host else socket.AF_INET
        found = socket.socket(family)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            found.bind((self.listening.host, self.listening.port))
        except OSError as error:
            found.close()
            raise SystemStateError(
                f"Cannot listen on {self.listening.host}:{self.listening.port}: {error.strerror}.",
                hint="Choose another --port or --host.",
            ) from error
        self.port = found.getsockname()[1]
        return found

    async def _grpc(self, engine: Engine) -> Any:
        listening = self.listening
        if listening.grpc_port is None:
            return None
        credentials = None
        if listening.certificate and listening.key:
            import grpc

            pair = (listening.key.read_bytes(), listening.certificate.read_bytes())
            credentials = grpc.ssl_server_credentials([pair])
        host = f"[{listening.host}]" if ":" in listening.host else listening.host
        try:
            server, self.grpc_port = await rpc.start(
                engine,
                f"{host}:{listening.grpc_port}",
                token=listening.token,
                most_bytes=listening.most_bytes,
                most_calls=listening.connections,
                message_seconds=listening.body_seconds,
                credentials=credentials,
            )
        except RuntimeError as error:
            raise SystemStateError(
                f"Cannot listen on {host}:{listening.grpc_port} for gRPC.", hint="Choose another --grpc-port."
            ) from error
        return server


def log_formatter() -> JsonFormatter:
    """Return what makes a line of JSON of a log record, without the colours that uvicorn adds."""
    return JsonFormatter(
        "%(asctime)s %(levelname)s %(name)s %(message)s",
        rename_fields={"asctime": "time", "levelname": "level"},
        reserved_attrs=[*RESERVED_ATTRS, "color_message"],
    )


def structured_logs(level: str = "INFO") -> None:
    """Write each log record as one line of JSON to stderr."""
    handler = logging.StreamHandler()
    handler.setFormatter(log_formatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)


def tls_files_fit(certificate: Path, key: Path) -> None:
    """Raise InputError for a certificate and a key that do not belong together."""
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, password="")  # or it asks a person
    except (ssl.SSLError, OSError) as error:
        raise InputError(f"{certificate} and {key} are no certificate and its key: {error}.") from error
