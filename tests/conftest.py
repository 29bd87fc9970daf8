"""Fixtures that several files share; a file's own of the same name stand before them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of an exported bundle, a copy for each file."""
    from bundles_tiny import exported_bundle

    return exported_bundle(tmp_path_factory.mktemp("exported")).root


@pytest.fixture(scope="module")
def server(root: Path) -> Iterator[Any]:
    """Yield a server that gives a body half a second and a megabyte; its model is called m."""
    from servers_tiny import running

    with running({"m": root}, body_seconds=0.5, most_bytes=1 << 20) as started:
        yield started
