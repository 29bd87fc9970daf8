"""The ways to prune that experiments compare, by name."""

from __future__ import annotations

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
