"""The ways to prune that experiments compare, by name."""

from __future__ import annotations

from dataclasses import replace

from ..stages import Options

SEARCH = Options(criterion="fisher", search="paper", rearrange="none", compensate="none")
REARRANGE = Options(criterion="fisher", search="paper", rearrange="sample", compensate="none")
PAPER = Options(criterion="fisher", search="paper", rearrange="sample", compensate="mask-tuning")
FISHER_REFIT = Options(criterion="fisher")
DEFAULT = Options()

STAGES = {
    "search": SEARCH,
    "+rearrange": REARRANGE,
    "+mask tuning": PAPER,
    "fisher, refit": FISHER_REFIT,
    "obs, refit (default)": DEFAULT,
}

# What came after the paper, each reduced to what differs from the default: how units are chosen, within which
# budgets, and what the projections are fitted on.
SUCCESSORS = {
    "default": DEFAULT,
    "default units, parallel refit": Options(compensate="refit-parallel"),
    "reconstruction, global (ZipLM)": Options(criterion="reconstruction"),
    "reconstruction, local (OSSCAR)": Options(criterion="reconstruction", scope="local"),
    "label-free Fisher (K-prune)": Options(criterion="fisher", label_free=True),
    "activation x weight, local, parallel refit (GRAIL, CORP)": Options(
        criterion="activation-weight", scope="local", compensate="refit-parallel"
    ),
}

# Convolutional networks: the field's ways to mend what is left, and the refit. There is no rearrangement of channels.
CHANNEL_SEARCH = Options(criterion="fisher", rearrange="none", compensate="none")
CHANNEL_STAGES = {
    "search (Fisher)": CHANNEL_SEARCH,
    "+ batch norm": replace(CHANNEL_SEARCH, compensate="batch-norm"),
    "+ mask tuning": replace(CHANNEL_SEARCH, compensate="mask-tuning"),
    "+ fold": replace(CHANNEL_SEARCH, compensate="fold"),
    "+ fold, batch norm": replace(CHANNEL_SEARCH, compensate="fold+batch-norm"),
    "+ refit of cut layers": replace(CHANNEL_SEARCH, compensate="refit-cut"),
    "+ refit": replace(CHANNEL_SEARCH, compensate="refit"),
    "obs, refit of cut layers": Options(compensate="refit-cut"),
    "obs with labels, refit": Options(label_free=False),
    "obs label-free, refit": Options(label_free=True),
}
CHANNEL_TRADEOFF = ("search (Fisher)", "+ batch norm", "obs with labels, refit", "obs label-free, refit")
