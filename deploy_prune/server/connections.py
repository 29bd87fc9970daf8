"""Connections over HTTP that do not wait for their clients without end, so that slow ones cannot hold them all."""

from __future__ import annotations

import asyncio
import ipaddress
from collections.abc import Iterator
from contextlib import contextmanager
from socket import socket

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

CLIENT_SECONDS = 10.0  # for a TLS handshake, a request's head with the pause before it, and to take a waiting answer
MOST_HEADER_BYTES = 1 << 14


class TimedProtocol(H11Protocol):
    """Cut off a client that takes `client_seconds` for a request's head, or to take what was written to it.

    uvicorn itself bounds only the pause between two requests. Bodies have a limit of their own (`http.Bodies`).
    """

    client_seconds = CLIENT_SECONDS
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait()

    def data_received(self, data: bytes) -> None:
        before = self.cycle
        super().data_received(data)
        if self.cycle is not before:  # a head is complete
            self._stop_waiting()

    def on_response_complete(self) -> None:
        before = self.cycle
        super().on_response_complete()
        if self.cycle is before:  # no other request was there already
            self._wait()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._wait()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop_waiting()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def _wait(self) -> None:
        self._stop_waiting()
        self._timer = self.loop.call_later(self.client_seconds, self.transport.abort)

    def _stop_waiting(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class WebServer(uvicorn.Server):
    """Leave signals to who runs both protocols, and bound TLS handshakes, for which asyncio has a minute."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket] | None = None) -> None:
        loop = asyncio.get_running_loop()
        config = self.config
        seconds = TimedProtocol.client_seconds if config.ssl else None

        def protocol() -> asyncio.Protocol:
            return TimedProtocol(config=config, server_state=self.server_state, app_state={}, _loop=loop)

        self.servers = [
            await loop.create_server(
                protocol,
                sock=given,
                ssl=config.ssl,
                backlog=config.backlog,
                ssl_handshake_timeout=seconds,
                ssl_shutdown_timeout=seconds,
            )
            for given in sockets or ()
        ]
        self.started = True


def is_loopback(host: str) -> bool:
    """Say whether an address is reached from this machine alone."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name: 127.example.com is somebody else's
        return False
