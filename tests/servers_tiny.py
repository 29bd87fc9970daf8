"""A server of tiny bundles in a thread of this process, on free ports."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from deploy_prune.server.models import Serving
from deploy_prune.server.run import Listening, Server


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
        while not (server.port and server.grpc_port):
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
