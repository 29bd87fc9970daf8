"""Fuzz one target under the guidance of its coverage: python -m fuzz.campaign TARGET [--runs N] [libFuzzer's flags].

A crash, an input that takes five seconds of the processor, a hang of two minutes, or more than 2 GB of memory is a
finding: its input is left in the current folder, and the exit code is not 0. The corpus in the repository is read,
never written. Needs atheris.
"""

from __future__ import annotations

import random
import sys
import tempfile
import time
from pathlib import Path

import atheris

with atheris.instrument_imports(
    include=["deploy_prune", "PIL", "zipfile", "json", "tomllib", "csv", "numpy.lib.format", "numpy.lib._format_impl"]
):
    import PIL.Image

    import deploy_prune.server.rpc
    import deploy_prune.units  # noqa: F401
    from fuzz import targets
    from fuzz.mutation import mutate

    PIL.Image.init()  # imports the readers of formats

CORPUS = Path(__file__).with_name("corpus")
MOST_SECONDS = 5.0  # of the processor: on a busy machine the clock says nothing
LIMITS = ["-timeout=120", "-rss_limit_mb=2048", "-max_len=4096", "-print_final_stats=1", "-seed=1"]


def mutator(data: bytes, most: int, seed: int) -> bytes:
    """Change a document by its values half of the time, by its bytes otherwise."""
    random_ = random.Random(seed)
    found = mutate(data, random_) if random_.random() < 0.5 else None
    return found if found is not None and len(found) <= most else atheris.Mutate(data, most)


def run(name: str, data: bytes) -> None:
    """Run a target, and see to it that it ends soon."""
    started = time.process_time()
    targets.run(name, data)
    if (seconds := time.process_time() - started) > MOST_SECONDS:
        raise RuntimeError(f"{len(data)} bytes took {seconds:.1f} s")


def main(arguments: list[str]) -> None:
    """Run libFuzzer over a target."""
    name, *flags = arguments
    with tempfile.TemporaryDirectory(prefix="corpus-") as grown:
        seeds = [str(CORPUS / name)] if (CORPUS / name).is_dir() else []
        atheris.Setup(
            [sys.argv[0], *LIMITS, *flags, grown, *seeds],
            lambda data: run(name, data),
            custom_mutator=mutator,
        )
        atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv[1:])
