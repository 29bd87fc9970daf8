"""Measure the latency of every head count and FFN width of a model, for searches under a latency budget."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch import nn

from .archs import check_config, is_convolutional, max_positions
from .checkpoint import load_config, load_dense
from .errors import InputError
from .heads import Head
from .latency_table import LatencyTable
from .measuring import Candidate, Stage, time_bundles
from .progress import Progress
from .runtime_bench.bench import Place
from .runtime_bench.machine import default_threads, describe_machine
from .runtime_bench.probe import Point, grid, kind_tables
from .runtime_bench.stats import Ratio, ratio_of_medians, summarise_ms
from .runtimes import available_runtimes
from .slicing import slice_model
from .tasks.registry import model_head
from .units import MaskSet, SlicePlan, UnitGroup

TOGETHER = 4  # points that are measured beside the dense model


def probe(
    model: str,
    *,
    runtime: str = "ort-cpu",
    batch: int = 1,
    seq: int = 128,
    widths: int = 8,
    threads: int | None = None,
    seconds: float = 2.0,
    progress: Progress = lambda share: None,
) -> LatencyTable:
    """Measure a checkpoint's latency over the number of heads and of FFN neurons.

    In every point all layers are cut alike, so that caches and memory behave as in the whole model. A few
    points at a time take turns with the dense model, each in a process of its own, `seconds` for each, and count
    by their ratio to it. Raises InputError for a runtime, length or architecture that cannot be probed.
    """
    if runtime not in available_runtimes():
        raise InputError(f"No runtime '{runtime}'.", hint=f"There are: {', '.join(sorted(available_runtimes()))}.")
    if min(batch, seq, widths) < 1:
        raise InputError("Batch, sequence length and number of widths must be 1 or more.")
    source = str(Path(model).resolve()) if Path(model).is_dir() else model
    head = Head(model_head(load_config(source)))
    dense = load_dense(source, head.kind)
    if is_convolutional(dense.model):
        raise InputError("Latency tables of convolutional networks are not there.", hint="Use a budget of FLOPs.")
    if (tokens := dense.signature.tokens) is not None:
        seq = tokens
    elif seq > (limit := max_positions(dense.model)):
        raise InputError(f"The model has {limit} positions, not {seq}.", hint="Probe at a shorter length.")
    groups = check_config(dense.model.config).groups(dense.model)
    attention, ffn = one_shape(groups, "head"), one_shape(groups, "neuron")
    full = Point(attention.size, ffn.size)
    place = Place(runtime, batch, seq, default_threads() if threads is None else threads)
    points = [p for p in grid(*full, widths) if p != full]

    def cut(point: Point) -> Candidate:
        return Candidate(cut_alike(dense.model, groups, point), dense.processor, dense.signature)

    found, dense_ns = {full: Ratio(1.0, 1.0, 1.0)}, []
    with tempfile.TemporaryDirectory(prefix="deploy-prune-probe-") as folder:
        whole = Stage(Path(folder), head, runtime).write("dense", cut(full))
        for start in range(0, len(points), TOGETHER):
            roots = {"dense": whole}
            with tempfile.TemporaryDirectory(dir=folder) as beside:
                stage = Stage(Path(beside), head, runtime)
                for number, point in enumerate(points[start : start + TOGETHER]):
                    roots[str(number)] = stage.write(str(number), cut(point))
                    progress((start + 0.9 * (number + 1)) / len(points))
                samples = time_bundles(roots, place, seconds)
            dense_ns += samples["dense"]
            for number, point in enumerate(points[start : start + TOGETHER]):
                found[point] = ratio_of_medians(samples[str(number)], samples["dense"])
            progress(min(1.0, (start + TOGETHER) / len(points)))
    dense_ms = summarise_ms(dense_ns)["median"]
    layers = 1 + max(g.layer for g in groups)
    kinds, base_ms = kind_tables(found, dense_ms, layers, attention.size, attention.width, ffn.size)
    return LatencyTable(
        runtime=runtime,
        batch=batch,
        seq=seq,
        threads=place.threads,
        hidden=attention.hidden,
        layers=layers,
        base_ms=base_ms,
        dense_ms=dense_ms,
        kinds=kinds,
        machine=describe_machine(place.threads),
    )


def one_shape(groups: Sequence[UnitGroup], kind: str) -> UnitGroup:
    """Return a group of the kind; all must be of one shape. Raises InputError otherwise."""
    alike = [g for g in groups if g.kind == kind]
    if len({(g.size, g.width, g.hidden) for g in alike}) != 1:
        raise InputError(f"The layers' {kind}s differ in number or width: one table cannot stand for them all.")
    return alike[0]


def cut_alike(model: nn.Module, groups: Sequence[UnitGroup], point: Point) -> nn.Module:
    """Return the model with the first units of every layer, as many as the point says."""
    masks = MaskSet({g.name: np.zeros(g.size) for g in groups})
    for g in groups:
        masks[g.name][: point.heads if g.kind == "head" else point.neurons] = 1.0
    return slice_model(model, groups, SlicePlan.from_masks(groups, masks))
