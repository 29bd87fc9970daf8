"""Diagonal of the empirical Fisher information of the mask variables."""

from __future__ import annotations

from .base import Evidence, Scores

PAPER_BATCH_ROWS = 32


def fisher(evidence: Evidence) -> Scores:
    """Return mean_n g_{n,u}^2 per unit (units,), g the gradient of sample n's loss.

    Source: Kwon et al. 2022, equation 6.
    """
    gradients = evidence.calibrated.gradients
    return {name: g.double().square().mean(0).cpu().numpy() for name, g in gradients.items()}


def fisher_batch(evidence: Evidence, batch_rows: int = PAPER_BATCH_ROWS) -> Scores:
    """Return sum_b g_{b,u}^2 per unit (units,), g_b the gradient of mini-batch b's mean loss.

    This is what the paper's published code computes; it averages within a batch before squaring.
    """
    stats = evidence.calibrated
    return {
        name: stats.batch_gradients(name, batch_rows).double().square().sum(0).cpu().numpy() for name in stats.gradients
    }
