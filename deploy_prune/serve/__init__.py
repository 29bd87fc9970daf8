"""Run an exported bundle without torch: `load(BUNDLE)` gives a predictor, from texts to labels, spans or vectors."""

from __future__ import annotations

from .loader import Predictor, load

__all__ = ["Predictor", "load"]
