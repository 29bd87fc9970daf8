"""How close a model's outputs are to the dense model's: KL in nats, agreement 0..1. No torch here."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.special import log_softmax

from .tasks.base import HeadKind, RowOutput


def fidelity(head: HeadKind, dense: Sequence[RowOutput], other: Sequence[RowOutput]) -> dict[str, float | None]:
    """Compare two models' outputs of the same rows, averaged over the rows.

    kl: KL(dense || other) in nats (QA: start plus end; tagging: mean over a row's tokens); null for
    regression and embeddings. agreement: share of equal predictions; null likewise. rmse for
    regression, mean cosine similarity for embeddings. max_abs: largest difference of any output.
    """
    out: dict[str, float | None] = {"kl": None, "agreement": None}
    pairs = list(zip(dense, other, strict=True))
    if head == "regression":
        a, b = (np.array([r["logits"].reshape(-1)[0] for r in rows], dtype=np.float64) for rows in (dense, other))
        out["rmse"] = float(np.sqrt(np.mean((a - b) ** 2)))
    elif head == "embedding":
        out["cosine"] = float(np.mean([_cosine(a["embedding"], b["embedding"]) for a, b in pairs]))
    else:
        names = ("start_logits", "end_logits") if head == "qa" else ("logits",)
        kls = [[np.mean(_kl(a[n], b[n])) for n in names] for a, b in pairs]
        same = [np.all([a[n].argmax(-1) == b[n].argmax(-1) for n in names], axis=0).mean() for a, b in pairs]
        out["kl"] = float(np.mean(np.sum(kls, axis=1)))
        out["agreement"] = float(np.mean(same))
    out["max_abs"] = float(max(np.abs(a[n] - b[n]).max(initial=0.0) for a, b in pairs for n in a))
    return out


def _kl(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return KL(softmax a || softmax b) over the last axis."""
    log_p, log_q = log_softmax(a.astype(np.float64), axis=-1), log_softmax(b.astype(np.float64), axis=-1)
    return np.maximum((np.exp(log_p) * (log_p - log_q)).sum(-1), 0.0)


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a.astype(np.float64), b.astype(np.float64)
    return float(a @ b / max(float(np.linalg.norm(a) * np.linalg.norm(b)), 1e-30))
