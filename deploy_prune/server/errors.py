"""What a request can end with, and what each protocol calls it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import DeployPruneError, InputError, SystemStateError


class NotFoundError(DeployPruneError):
    """There is no such model, version or output."""


class BusyError(DeployPruneError):
    """The queue is full, or the server is going down: try again later, or elsewhere."""


class LateError(DeployPruneError):
    """The request's time is over."""


class TooLargeError(InputError):
    """The request is larger than the server takes."""


class UnopenedError(DeployPruneError):
    """A bundle of the server cannot be opened: none of the client's mistakes, and its log alone says why."""


HTTP_STATUS: tuple[tuple[type[Exception], int], ...] = (
    (NotFoundError, 404),
    (BusyError, 503),
    (LateError, 504),
    (TooLargeError, 413),
    (InputError, 400),
    (UnopenedError, 500),
)
GRPC_STATUS: tuple[tuple[type[Exception], str], ...] = (
    (NotFoundError, "NOT_FOUND"),
    (BusyError, "RESOURCE_EXHAUSTED"),
    (LateError, "DEADLINE_EXCEEDED"),
    (InputError, "INVALID_ARGUMENT"),
    (UnopenedError, "FAILED_PRECONDITION"),
)


def http_status(error: Exception) -> int | None:
    """Return the HTTP status of an error whose message is for clients; None where it is about the server's insides."""
    return next((status for kind, status in HTTP_STATUS if isinstance(error, kind)), None)


def grpc_status(error: Exception) -> str | None:
    """Return the name of the gRPC status of an error whose message is for clients; None as `http_status` does."""
    return next((status for kind, status in GRPC_STATUS if isinstance(error, kind)), None)


@contextmanager
def readable(source: Path) -> Iterator[None]:
    """Raise SystemStateError where the disk does not give what is asked of a source."""
    try:
        yield
    except OSError as error:
        raise SystemStateError(
            f"{error.filename or source} cannot be read: {error.strerror or error}.",
            hint="The server's user needs the permission to read it.",
        ) from error
