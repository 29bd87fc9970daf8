"""Hold what a checkpoint describes against its files, so that a few bytes of config.json never ask for any memory."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from .documents import read_json
from .errors import BundleError

SMALL = 1 << 26  # weights that are no matter of concern
LARGEST_CUT = 200  # times its own weights a sliced model's dense one may have had
MOST_TENSORS = 1 << 16  # of a model: each takes memory of its own, however small it is
MOST_COUNT = 1_000_000  # of layers or labels: configs make lists of them
_COUNTED = re.compile("num_labels|layer|depth|block")


def check_counts(path: str | Path) -> None:
    """Raise BundleError for a config.json with so many layers or labels that reading it would fill the memory.

    Raises OSError or ValueError for what is no JSON.
    """
    places: list[tuple[str, Any]] = [("", read_json(path))]
    while places:
        key, value = places.pop()
        if isinstance(value, dict):
            places += value.items()
        elif isinstance(value, list):
            places += [(key, part) for part in value]
        elif isinstance(value, int | float) and value > MOST_COUNT and _COUNTED.search(key):
            raise BundleError(f"{path} asks for more than {MOST_COUNT:,} in {key!r:.40}.", hint="Use another model.")


@contextmanager
def bounded_weights(source: str | Path, most: int) -> Iterator[None]:
    """Let modules be built that have `most` weights at most, or `SMALL` ones where that is more.

    Every module of this process counts meanwhile, as its parameters come; values that take their place do not. What is
    built on torch's meta device is thus refused before it has any memory. Raises BundleError.
    """
    most = max(most, SMALL)
    weights = tensors = 0

    def count(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
        nonlocal weights, tensors
        if module._parameters.get(name) is not None:
            return
        weights, tensors = weights + parameter.numel(), tensors + 1
        if weights > most or tensors > MOST_TENSORS:
            raise BundleError(
                f"{source} describes a model that its files do not hold: more than {most:,} weights, or more than "
                f"{MOST_TENSORS:,} tensors.",
                hint="Use an intact one.",
            )

    hook = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        hook.remove()
