"""First-order criteria: what the gradient of the loss to a unit's mask says."""

from __future__ import annotations

import numpy as np

from .base import Evidence, Scores


def taylor(evidence: Evidence) -> Scores:
    """Return mean_n |g_{n,u}| per unit (units,): the first-order change of a sample's loss when u is cut.

    Source: Molchanov et al. 2017, Pruning Convolutional Neural Networks, equation 7; You et al. 2019, Gate Decorator.
    """
    gradients = evidence.calibrated.gradients
    return {name: g.double().abs().mean(0).cpu().numpy() for name, g in gradients.items()}


def head_sensitivity(evidence: Evidence) -> Scores:
    """Return mean_n |g_{n,u}| divided by its L2 norm over the layer's units (units,).

    Source: Michel et al. 2019, Are Sixteen Heads Really Better than One?, equation 2 and section 4.1.
    """
    scores = taylor(evidence)
    return {name: s / max(float(np.linalg.norm(s)), 1e-30) for name, s in scores.items()}


def snip(evidence: Evidence) -> Scores:
    """Return |mean_n g_{n,u}| as a share of the sum over all units (units,).

    Source: Lee et al. 2019, SNIP, equation 5, with one connection per unit.
    """
    means = {n: g.double().mean(0).abs().cpu().numpy() for n, g in evidence.calibrated.gradients.items()}
    total = max(sum(float(m.sum()) for m in means.values()), 1e-30)
    return {name: m / total for name, m in means.items()}
