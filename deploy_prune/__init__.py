"""Prune a fine-tuned transformer without retraining, slice it, export it, measure it."""

__version__ = "0.1.0"
