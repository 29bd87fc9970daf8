"""ELECTRA (Clark et al. 2020): BERT's layers behind an optional projection of narrow embeddings."""

from dataclasses import replace

from .bert import ARCH as BERT

ARCH = replace(BERT, name="electra", model_types=("electra",))
