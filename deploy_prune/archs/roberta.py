"""RoBERTa (Liu et al. 2019) and XLM-R: BERT's layers, position ids offset by the padding index."""

from dataclasses import replace

from .bert import ARCH as BERT

ARCH = replace(BERT, name="roberta", model_types=("roberta", "xlm-roberta"))
