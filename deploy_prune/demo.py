"""The embedded demos: small models that are trained once on this machine and cached, with their data."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import platformdirs
from filelock import FileLock

from .errors import SystemStateError
from .progress import Reporter, Silent

if TYPE_CHECKING:
    from .finetune import Learner
    from .tasks.base import Row


class DemoPaths(NamedTuple):
    """Where a demo's trained model and its train.* and validation.* lie."""

    model: Path
    data: Path


@dataclass(frozen=True)
class Demo:
    """Describe one demo; `build(folder, archives, reporter)` makes model/ and data/ and returns what it measured."""

    version: str  # of its recipe: a change of it makes a new cache folder
    task: str
    build: Callable[[Path, Path, Reporter], dict[str, Any]]
    samples: int | None = None  # calibration rows, where its training rows are fewer than a run's default


def _build_text(folder: Path, archives: Path, reporter: Reporter) -> dict[str, Any]:
    from .demo_text import build

    return build(folder, archives, reporter)


def _build_digits(folder: Path, archives: Path, reporter: Reporter) -> dict[str, Any]:
    from .demo_digits import build

    return build(folder, reporter)


DEMOS = {
    "demo": Demo("1", "text-classification", _build_text),
    "digits-vit": Demo("1", "image-classification", _build_digits, samples=1024),
}


def cache_dir() -> Path:
    """Return the cache folder: DEPLOY_PRUNE_CACHE, or the user's own."""
    return Path(os.environ.get("DEPLOY_PRUNE_CACHE") or platformdirs.user_cache_dir("deploy_prune"))


def demo_folder(name: str = "demo") -> Path:
    """Return where a demo is cached."""
    return cache_dir() / f"{name}-{DEMOS[name].version}"


def prepare_demo(name: str = "demo", reporter: Reporter | None = None) -> DemoPaths:
    """Return a demo's model and data; the first call trains it, and may download what it is made from.

    An interrupted call leaves nothing half-made.
    Raises: SystemStateError where it cannot be made, saying why.
    """
    root, final = cache_dir(), demo_folder(name)
    try:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / f"{name}.lock"):
            if not (final / "demo.json").is_file():
                _publish(name, final, root, reporter or Silent())
    except OSError as error:
        raise SystemStateError(
            f"Cannot prepare the demo in {root}: {error}",
            hint="Free some space there, or name another folder in DEPLOY_PRUNE_CACHE.",
        ) from error
    return DemoPaths(final / "model", final / "data")


def _publish(name: str, final: Path, root: Path, reporter: Reporter) -> None:
    """Build beside `final`, then rename: there is never a half-made demo. The caller holds the lock."""
    for stale in [*root.glob(f".{name}-*"), final]:  # left by killed runs
        shutil.rmtree(stale, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=root, prefix=f".{name}-") as temporary:
        folder = Path(temporary) / name
        summary = DEMOS[name].build(folder, root / "archives", reporter)
        (folder / "demo.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
        os.replace(folder, final)


def measured(learner: Learner, rows: Sequence[Row], least: float, reporter: Reporter, name: str) -> float:
    """Return the held-out accuracy of a trained demo. Raises SystemStateError when it is less than it must be."""
    with reporter.stage(f"{name}: measure accuracy") as progress:
        outputs = learner.predict(rows, progress)
    pairs = zip(outputs, rows, strict=True)
    accuracy = sum(int(output["logits"].argmax() == row.label) for output, row in pairs) / len(rows)
    if accuracy < least:
        raise SystemStateError(
            f"Training {name} gave an accuracy of {accuracy:.4f}, less than {least}.",
            hint="Check that the installed versions are those of constraints.txt, then run again.",
        )
    return accuracy
