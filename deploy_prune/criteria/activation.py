"""How strongly a unit fires, and how strongly that is read."""

from __future__ import annotations

import numpy as np
import torch

from .base import Evidence, Scores


def activation(evidence: Evidence) -> Scores:
    """Return the root mean square over tokens of a unit's activations (units,)."""
    stats = evidence.calibrated
    tokens = float(stats.tokens)
    return {name: np.sqrt(squares.cpu().numpy() / tokens) for name, squares in stats.activation_squares.items()}


def activation_weight(evidence: Evidence) -> Scores:
    """Return the root mean square of a unit's activations times the norm of the weights that read them (units,).

    Source: Sun et al. 2024, A Simple and Effective Pruning Approach for Large Language Models, equation 1, per unit.
    """
    scores = {}
    for g in evidence.groups:
        norms = torch.linalg.vector_norm(evidence.reading(g), dim=1)
        scores[g.name] = activation(evidence)[g.name] * norms.numpy()
    return scores
