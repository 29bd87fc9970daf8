"""Readers of strangers' bytes, as functions of bytes that may refuse but never crash; see `targets` and `campaign`."""
