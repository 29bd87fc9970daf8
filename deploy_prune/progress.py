"""How a run reports where it is; the command line draws bars, the Python API is silent by default."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

Progress = Callable[[float], None]  # called with the finished share 0..1


class Reporter(Protocol):
    """Show the stages of a run."""

    def stage(self, name: str) -> AbstractContextManager[Progress]:
        """Open a stage; the yielded callable takes the finished share 0..1."""
        ...

    def note(self, text: str) -> None:
        """Show one line."""
        ...


class Silent:
    """Report nothing."""

    @contextmanager
    def stage(self, name: str) -> Iterator[Progress]:
        yield lambda share: None

    def note(self, text: str) -> None:
        pass
