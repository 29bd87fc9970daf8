"""A tiny tokenizer and configs for the task tests: no hub, no torch."""

from __future__ import annotations

import string
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.normalizers import Lowercase
from tokenizers.pre_tokenizers import BertPreTokenizer
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast


def tiny_tokenizer(words: str = "", **kwargs: Any) -> PreTrainedTokenizerFast:
    """Make a lower-casing WordPiece tokenizer: these words are one token each, others go by letters."""
    letters = string.ascii_lowercase + string.digits + string.punctuation
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *dict.fromkeys(words.lower().split())]
    pieces += [c for c in letters if c not in pieces] + [f"##{c}" for c in letters]
    backend = Tokenizer(WordPiece({p: i for i, p in enumerate(pieces)}, unk_token="[UNK]"))
    backend.normalizer = Lowercase()
    backend.pre_tokenizer = BertPreTokenizer()
    backend.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    options = {"model_max_length": 512, "model_input_names": inputs, **special, **kwargs}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **options)


def tiny_config(head: str = "SequenceClassification", labels: int | Sequence[str] = 2, **extra: Any) -> SimpleNamespace:
    """Make the part of a transformers config that tasks read."""
    names = [f"LABEL_{i}" for i in range(labels)] if isinstance(labels, int) else list(labels)
    values = {
        "architectures": [f"BertFor{head}" if head else "BertModel"],
        "model_type": "bert",
        "num_labels": len(names),
        "id2label": dict(enumerate(names)),
        "label2id": {n: i for i, n in enumerate(names)},
        "problem_type": None,
        "max_position_embeddings": 512,
        "type_vocab_size": 2,
        "pad_token_id": 0,
    }
    return SimpleNamespace(**{**values, **extra})
