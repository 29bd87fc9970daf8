"""What runs inside a measurement's fresh process: open variants, feed them, time them or watch memory."""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..bundle import Bundle, Variant
from ..errors import InputError
from ..runtimes import Runner, open_runner
from .memory import peak_rss_bytes, rss_bytes
from .timing import interleaved

SEED = 0  # of the token ids
MEMORY_RUNS = 3


def time_cell(
    *,
    models: Mapping[str, Mapping[str, Any]],
    runtime: str,
    batch: int,
    seq: int,
    threads: int | None,
    max_seconds: float,
    min_rounds: int,
) -> dict[str, Any]:
    """Load models together and time them interleaved; `models` gives each its bundle's "root" and "variant".

    Returns {"samples": {name: {"wall_ns", "cpu_ns", "provider"}}, "failures": {name: {...}}}: a
    model that cannot be opened or run does not stop the others.
    """
    failures: dict[str, dict[str, str]] = {}
    functions: dict[str, Callable[[], object]] = {}
    runners: dict[str, Runner] = {}
    with ExitStack() as stack:
        for name, model in models.items():
            try:
                bundle = Bundle.open(model["root"], verify=False)  # the parent has checked the hashes
                runner = stack.enter_context(open_runner(bundle, runtime, model["variant"], threads=threads))
                feeds = make_feeds(bundle, runner, batch, seq)
                runner.infer(feeds)
            except Exception as error:  # whatever a runtime raises: this model alone has failed
                failures[name] = describe_failure(error)
                continue
            runners[name] = runner
            functions[name] = partial(runner.infer, feeds)
        samples = interleaved(functions, min_rounds=min_rounds, max_seconds=max_seconds) if functions else {}
        return {
            "samples": {
                name: {"wall_ns": s.wall_ns, "cpu_ns": s.cpu_ns, "provider": runners[name].provider}
                for name, s in samples.items()
            },
            "failures": failures,
        }


def memory_cell(
    *, root: str, runtime: str, variant: Variant, batch: int, seq: int, threads: int | None
) -> dict[str, int]:
    """Load one variant, run it a few times and return the process's peak and first memory in bytes."""
    bundle = Bundle.open(root, verify=False)
    baseline = rss_bytes()
    with open_runner(bundle, runtime, variant, threads=threads) as runner:
        feeds = make_feeds(bundle, runner, batch, seq)
        for _ in range(MEMORY_RUNS):
            runner.infer(feeds)
    return {"peak_rss_bytes": peak_rss_bytes(), "baseline_rss_bytes": baseline}


def make_feeds(bundle: Bundle, runner: Runner, batch: int, seq: int) -> dict[str, np.ndarray]:
    """Return random token ids (batch, seq) within the vocabulary, without padding, always the same.

    Raises InputError for a length the model has no positions for, or an input unknown here.
    """
    config = json.loads(Path(bundle.path("sliced/config.json")).read_text("utf-8"))
    longest = config.get("max_position_embeddings")
    if longest is not None and seq > longest:
        raise InputError(f"The model has {longest} positions, not {seq}.", hint="Bench at a shorter length.")
    ids = np.random.default_rng(SEED).integers(0, config["vocab_size"], (batch, seq), dtype=np.int64)
    if (pad := config.get("pad_token_id")) is not None:  # some models count positions by it
        ids[ids == pad] = (pad + 1) % config["vocab_size"]
    known = {
        "input_ids": ids,
        "attention_mask": np.ones_like(ids),
        "token_type_ids": np.zeros_like(ids),
    }
    if unknown := [name for name in runner.input_names if name not in known]:
        raise InputError(f"The bench does not know how to fill the inputs {', '.join(unknown)}.")
    return {name: known[name] for name in runner.input_names}


def describe_failure(error: Exception) -> dict[str, str]:
    """Return an exception as JSON-able text."""
    message = getattr(error, "message", None) or str(error) or type(error).__name__
    return {"kind": type(error).__name__, "reason": message, "traceback": traceback.format_exc()}
