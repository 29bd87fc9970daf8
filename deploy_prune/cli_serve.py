"""The command that serves bundles."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .bundle import Bundle
from .config import ServeSettings
from .errors import InputError
from .flags import settings_command

app = typer.Typer()


@app.command()
@settings_command(
    ServeSettings, "serve", file=typer.Option("--config", "-c", help="The settings as a TOML file; flags override it.")
)
def serve(
    bundles: Annotated[
        list[str], typer.Argument(metavar="[NAME=]BUNDLE...", help="Bundles, or folders of them named 1, 2, ...")
    ],
    settings: ServeSettings,
) -> None:
    """Answer requests over HTTP and gRPC by the Open Inference Protocol (V2); try the model at http://HOST:PORT/.

    Every model is there twice: NAME takes raw tensors, NAME.answers texts or image files. SIGTERM lets what waits be
    answered first.

    [bold]Examples[/bold]

      deploy-prune serve bundles/demo

      deploy-prune serve sentiment=bundles/sst2 --precision int8 --compare --port 8080
    """
    import asyncio

    from .server.connections import is_loopback
    from .server.run import Server, structured_logs

    structured_logs()
    sources = named(bundles, key_path(settings.public_key))
    token = read_token(settings.token_file)
    server = Server(sources, serving_of(settings), listening_of(settings, token), settings.compare)
    if token is None and not is_loopback(settings.host):
        import logging

        logging.getLogger("deploy_prune.server").warning("listening beyond this machine without a token")
    asyncio.run(server.run())


def key_path(path: str | None) -> Path | None:
    """Return the path of a public key that can be read. Raises InputError."""
    if path is None:
        return None
    from .signing import read_public_key

    read_public_key(Path(path))
    return Path(path)


def named(bundles: list[str], public_key: Path | None = None) -> dict[str, Path]:
    """Return sources by name; NAME=PATH names one, else the folder does. Raises InputError for a name used twice."""
    found: dict[str, Path] = {}
    for given in bundles:
        name, equals, path = given.rpartition("=")
        source = Path(path)
        name = name if equals else source.resolve().name
        if name in found:
            raise InputError(f"Two models are named {name}.", hint="Name them: one=bundles/a two=bundles/b")
        if (source / "manifest.json").is_file():
            Bundle.open(source, public_key=public_key)
        found[name] = source
    return found


def read_token(path: str | None) -> str | None:
    """Return the token in a file's first line. Raises InputError for one that is missing or too short."""
    if path is None:
        return None
    try:
        token = (Path(path).read_text("utf-8").splitlines() or [""])[0].strip()
    except OSError as error:
        raise InputError(f"Could not read the token from {path}: {error.strerror}.") from error
    if len(token) < 16:
        raise InputError(f"The token in {path} has fewer than 16 characters.", hint="openssl rand -hex 32 makes one.")
    return token


def serving_of(settings: ServeSettings) -> Any:
    """Return how bundles are opened."""
    from .server.versions import Serving

    return Serving(
        variant=settings.variant,
        runtime=settings.runtime,
        precision=settings.precision,
        threads=settings.threads,
        most_rows=settings.batch_rows,
        queue_rows=settings.queue_rows,
        wait=settings.wait_ms / 1000,
        request_rows=settings.request_rows,
        public_key=key_path(settings.public_key),
    )


def listening_of(settings: ServeSettings, token: str | None) -> Any:
    """Return where to listen."""
    from .server.run import Listening

    return Listening(
        host=settings.host,
        port=settings.port,
        grpc_port=None if settings.grpc_port < 0 else settings.grpc_port,
        token=token,
        certificate=Path(settings.tls_cert) if settings.tls_cert else None,
        key=Path(settings.tls_key) if settings.tls_key else None,
        most_bytes=settings.max_bytes,
        request_seconds=settings.request_seconds,
        drain_seconds=settings.drain_seconds,
        poll=settings.poll,
    )
