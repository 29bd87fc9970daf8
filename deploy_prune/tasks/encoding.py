"""Turn texts into model inputs without padding."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..errors import InputError
from ..signature import token_inputs
from .base import Row, Split
from .spec import LoadRequest

TEXT_LENGTH = 512
QA_LENGTH = 384
_CHUNK = 1000  # examples per call of the tokenizer
# Positions of these models start after the padding index, so two of the table's rows are never used.
_POSITION_OFFSET = {"roberta", "xlm-roberta", "xlm-roberta-xl", "roberta-prelayernorm", "camembert", "mpnet"}


class EncodedSplit(Split):
    """Tokenise examples that give exactly one row each, in chunks; the whole split is tokenised once."""

    def __init__(self, request: LoadRequest) -> None:
        if request.tokenizer is None:
            raise InputError(f"The task '{request.task}' needs the model's tokenizer.", hint="Give it as tokenizer=.")
        self._tokenizer = request.tokenizer
        self._config = request.config
        self._max_length = resolve_length(request.tokenizer, request.config, request.max_length)
        self._rows: list[Row] | None = None

    @abstractmethod
    def _tokenize(self, indices: Sequence[int]) -> Any:
        """Return the tokenizer's encoding of the named examples."""

    @abstractmethod
    def _label(self, encoding: Any, row: int, index: int) -> Any:
        """Return the label of example `index`, which is row `row` of the encoding."""

    def encode(self, indices: Sequence[int]) -> list[Row]:
        rows: list[Row] = []
        for start in range(0, len(indices), _CHUNK):
            chunk = [int(i) for i in indices[start : start + _CHUNK]]
            encoding = self._tokenize(chunk)
            names = token_inputs(encoding, self._config)
            rows += [Row(features(encoding, names, r), self._label(encoding, r, i)) for r, i in enumerate(chunk)]
        return rows

    def rows(self) -> list[Row]:
        if self._rows is None:
            self._rows = self.encode(range(len(self)))
        return self._rows


def resolve_length(tokenizer: Any, config: Any, requested: int | None, default: int = TEXT_LENGTH) -> int:
    """Return the longest row in tokens: `requested`, else the default, within the model's own limit.

    Raises InputError when `requested` is more than the model takes, or too few to hold a text.
    """
    limits = [int(getattr(tokenizer, "model_max_length", 10**9))]
    positions = getattr(config, "max_position_embeddings", None)
    if positions:
        offset = getattr(config, "model_type", "") in _POSITION_OFFSET
        limits.append(int(positions) - ((config.pad_token_id or 0) + 1 if offset else 0))
    limit = limits[-1] if requested else min(limits)  # the positions are a hard limit, the tokenizer's is not
    if requested is None:
        return min(limit, default)
    if not 8 <= requested <= limit:
        raise InputError(
            f"The sequence length {requested} is outside 8..{limit} for this model.",
            hint="Give a length in that range, or leave it out.",
        )
    return requested


def require_fast(tokenizer: Any, task: str) -> None:
    """Raise InputError for a tokenizer that cannot say which word or characters a token comes from."""
    if not getattr(tokenizer, "is_fast", False):
        raise InputError(
            f"The task '{task}' needs a fast tokenizer (tokenizer.json); this one is {type(tokenizer).__name__}.",
            hint="Load it with AutoTokenizer and save it again, so that the model has a tokenizer.json.",
        )


def require_words(tokenizer: Any) -> None:
    """Raise InputError for a tokenizer that reads words given one by one unlike the same words in a text.

    Byte-level BPE does so without add_prefix_space: transformers 4 refuses it, transformers 5 does not.
    """
    try:
        words = tokenizer(["a", "a"], is_split_into_words=True)["input_ids"]
    except AssertionError:
        words = None
    if words != tokenizer("a a")["input_ids"] and words != tokenizer(" a a")["input_ids"]:
        raise InputError(
            "The tokenizer reads single words otherwise than words in a text (add_prefix_space is off).",
            hint="Load it with add_prefix_space=True and save it with the model.",
        )


def features(encoding: Mapping[str, Any], names: Sequence[str], row: int) -> dict[str, np.ndarray]:
    """Return one row of a batch encoding as int64 arrays (T,)."""
    return {name: np.asarray(encoding[name][row], dtype=np.int64) for name in names}
