"""Every reader of strangers' bytes on its corpus, whole, and with bytes and values changed."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from fuzz import targets
from fuzz.mutation import mutate
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("tritonclient", reason="the extra 'serve' is not installed")
CORPUS = {name: sorted((Path(__file__).parent / "fuzz" / "corpus" / name).iterdir()) for name in targets.TARGETS}
SHORT = settings(
    max_examples=100, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
)


@pytest.mark.parametrize("name", targets.TARGETS)
def test_the_corpus_is_read_or_refused(name: str) -> None:
    for path in CORPUS[name]:
        targets.run(name, path.read_bytes())


@pytest.mark.parametrize("name", targets.TARGETS)
def test_the_corpus_holds_something_to_read(name: str) -> None:
    """Fail where a target refuses all its seeds: it would test its first check alone."""
    read = []
    for path in CORPUS[name]:
        try:
            targets.TARGETS[name](path.read_bytes())
        except targets.DeployPruneError:
            continue
        read.append(path)
    assert read


@pytest.mark.parametrize("name", targets.TARGETS)
def test_changed_seeds_are_read_or_refused(name: str) -> None:
    @SHORT
    @given(st.sampled_from(CORPUS[name]), st.integers(0, 2**32), st.binary(max_size=8), st.floats(0, 1))
    def check(path: Path, seed: int, other: bytes, where: float) -> None:
        data = path.read_bytes()
        at = round(where * len(data))
        changed = mutate(data, random.Random(seed)) if seed % 2 else None
        targets.run(name, changed if changed is not None else data[:at] + other + data[at + len(other) :])

    check()


@pytest.mark.parametrize("name", targets.TARGETS)
def test_any_bytes_are_read_or_refused(name: str) -> None:
    @SHORT
    @given(st.binary(max_size=200))
    def check(data: bytes) -> None:
        targets.run(name, data)

    check()
