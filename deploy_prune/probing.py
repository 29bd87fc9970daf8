"""Measure a model's latency over what is kept of its heads and neurons, or channels, for latency budgets."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from .archs import max_positions
from .channel_costs import work_classes
from .checkpoint import Dense, load_config, load_dense
from .errors import InputError
from .heads import Head
from .latency_table import AnyLatency, ChannelLatency, ChannelPoint, LatencyTable, LatencyTables
from .measuring import Candidate, Stage, time_bundles
from .progress import Progress
from .runtime_bench.bench import Place
from .runtime_bench.machine import default_threads, describe_machine
from .runtime_bench.probe import Point, grid, kind_tables
from .runtime_bench.stats import Ratio, ratio_of_medians, summarise_ms
from .runtimes import available_runtimes
from .signature import Signature
from .surgery import ChannelSurgery, Surgery, surgery_of
from .tasks.registry import model_head
from .units import MaskSet, SlicePlan, UnitGroup, Units

TOGETHER = 4  # points that are measured beside the dense model
Measured = tuple[list[Ratio], float]  # of each plan, to the dense model, and that one's median in ms
Ratios = Callable[[Sequence[Mapping[str, int]]], list[Measured]]  # of plans, as counts per group; one per place


def probe(
    model: str,
    *,
    runtime: str = "ort-cpu",
    batch: int | Sequence[int] = 1,
    seq: int | Sequence[int] = 128,
    widths: int = 8,
    threads: int | None = None,
    align: int = 1,
    seconds: float = 2.0,
    progress: Progress = lambda share: None,
) -> AnyLatency:
    """Measure a checkpoint's latency over the number of heads and of FFN neurons, or over its channels.

    A few cut models at a time take turns with the dense one, each in a process of its own, `seconds` for each, and
    count by their ratio to it. Several batches or lengths give a table each, of the same cut models. Of transformers
    every point cuts all layers alike, so that caches and memory behave as in the whole model; of convolutional networks
    see `channel_table`; `align` cuts them to multiples, for plans that do so too.
    Raises InputError for a runtime, length or architecture that cannot be probed.
    """
    if runtime not in available_runtimes():
        raise InputError(f"No runtime '{runtime}'.", hint=f"There are: {', '.join(sorted(available_runtimes()))}.")
    batches, seqs = ([x] if isinstance(x, int) else sorted(set(x)) for x in (batch, seq))
    if min(*(batches or [0]), *(seqs or [0]), widths) < 1:
        raise InputError("Batch, sequence length and number of widths must be 1 or more.")
    source = str(Path(model).resolve()) if Path(model).is_dir() else model
    head = Head(model_head(load_config(source)))
    dense = load_dense(source, head.kind)
    if (tokens := dense.signature.tokens) is not None:
        if len(seqs) > 1:
            raise InputError(f"The model makes {tokens} tokens of every image.", hint="Leave the lengths out.")
        seqs = [tokens]
    elif max(seqs) > (limit := max_positions(dense.model)):
        raise InputError(f"The model has {limit} positions, not {max(seqs)}.", hint="Probe at a shorter length.")
    places = [Place(runtime, b, n, default_threads() if threads is None else threads) for b in batches for n in seqs]
    surgery = surgery_of(dense.model, dense.signature.image, residual=True)
    ratios = partial(cut_ratios, dense, head, surgery, places, seconds, progress)
    if isinstance(surgery, ChannelSurgery):
        if len(places) > 1:
            raise InputError("A convolutional network's table is of one batch.", hint="Probe each into its own file.")
        return channel_table(surgery, dense.signature, places[0], widths, ratios, align)
    if align > 1:
        raise InputError(
            "align is for channels; widths of a transformer between measured ones are interpolated.",
            hint="Leave --align out, for plans of any --align.",
        )
    tables = unit_tables(surgery.groups, places, widths, ratios)
    return tables[0] if len(tables) == 1 else LatencyTables.of(tables)


def unit_tables(
    groups: Sequence[UnitGroup], places: Sequence[Place], widths: int, ratios: Ratios
) -> list[LatencyTable]:
    """Measure models whose layers all keep the same, and split their latency into that of heads and of neurons."""
    attention, ffn = one_shape(groups, "head"), one_shape(groups, "neuron")
    full = Point(attention.size, ffn.size)
    points = [p for p in grid(*full, widths) if p != full]
    measured = ratios([{g.name: p.heads if g.kind == "head" else p.neurons for g in groups} for p in points])
    return [unit_table(groups, place, points, *m) for place, m in zip(places, measured, strict=True)]


def unit_table(
    groups: Sequence[UnitGroup], place: Place, points: Sequence[Point], found: Sequence[Ratio], dense_ms: float
) -> LatencyTable:
    """Return the table that the ratios of models cut to `points` give."""
    attention, ffn = one_shape(groups, "head"), one_shape(groups, "neuron")
    full = Point(attention.size, ffn.size)
    layers = 1 + max(g.layer for g in groups)
    measured = {full: Ratio(1.0, 1.0, 1.0)} | dict(zip(points, found, strict=True))
    kinds, base_ms = kind_tables(measured, dense_ms, layers, attention.size, attention.width, ffn.size)
    return LatencyTable(
        runtime=place.runtime,
        batch=place.batch,
        seq=place.seq,
        threads=place.threads,
        hidden=attention.hidden,
        layers=layers,
        base_ms=base_ms,
        dense_ms=dense_ms,
        kinds=kinds,
        machine=describe_machine(place.threads),
    )


def channel_table(
    surgery: ChannelSurgery, signature: Signature, place: Place, widths: int, ratios: Ratios, align: int = 1
) -> ChannelLatency:
    """Measure networks cut alike and raggedly, and fit ms = base + sum over classes (a FLOPs + b elements), a, b >= 0.

    A class are the layers alike in positions and kernel; elements are those that they read and write. Counts are
    multiples of `align`. Every fourth network, or of fewer the last, is held out of a first fit to tell the error.
    """
    assert signature.image is not None
    works, class_of = work_classes(surgery.graph)
    whole = {g.name: g.size for g in surgery.groups}
    plans = [whole, *channel_plans(surgery.groups, class_of, widths, align)]
    ((found, dense_ms),) = ratios(plans[1:])
    ms = dense_ms * np.array([1.0, *(r.value for r in found)])
    features = np.array([[1.0, *(t.cost(p) for w in works for t in (w.flops, w.elements))] for p in plans])
    held = np.arange(len(plans)) % 4 == min(3, len(plans) - 1)
    trial = fit_rates(features[~held], ms[~held])
    errors = np.abs(features[held] @ trial / ms[held] - 1)
    rates = fit_rates(features, ms)
    table = ChannelLatency(
        runtime=place.runtime,
        batch=place.batch,
        threads=place.threads,
        align=align,
        image=signature.image,
        sizes=whole,
        base_ms=float(rates[0]),
        dense_ms=dense_ms,
        single={},
        double=[],
        points=[
            ChannelPoint(flops=surgery.flops_of(p) / surgery.flops(1), ms=t, fitted_ms=f)
            for p, t, f in zip(plans, ms.tolist(), (features @ rates).tolist(), strict=True)
        ],
        mean_error=float(errors.mean()),
        largest_error=float(errors.max()),
        machine=describe_machine(place.threads),
    )
    double: dict[tuple[str, str], float] = {}
    for rate, term in zip(rates[1:], (t for w in works for t in (w.flops, w.elements)), strict=True):
        table.base_ms += float(rate) * term.base
        for name, cost in term.single.items():
            table.single[name] = table.single.get(name, 0.0) + float(rate) * cost
        for pair, cost in term.double.items():
            double[pair] = double.get(pair, 0.0) + float(rate) * cost
    table.double = [(*pair, cost) for pair, cost in double.items()]
    return table


def channel_plans(
    groups: Sequence[Units], class_of: Mapping[str, str], widths: int, align: int = 1
) -> list[dict[str, int]]:
    """Return counts per group of `widths` - 1 networks cut alike, and of twice `widths` ragged ones (seed 0).

    Counts are multiples of `align`, one at least, or all that a group has.
    """
    rng = np.random.default_rng(0)
    shares = [dict.fromkeys(class_of, i / widths) for i in range(1, widths)]
    for _ in range(2 * widths):
        level = {name: rng.uniform(0.1, 1.0) for name in dict.fromkeys(class_of.values())}
        shares.append({name: level[kind] * rng.uniform(0.6, 1.4) for name, kind in class_of.items()})
    return [{g.name: min(g.size, align * max(1, round(s[g.name] * g.size / align))) for g in groups} for s in shares]


def fit_rates(features: np.ndarray, ms: np.ndarray) -> np.ndarray:
    """Return rates >= 0 (K,) by which features (N, K) give ms (N,), relative errors least squared."""
    from scipy.optimize import nnls

    scale = features.max(axis=0)
    scale[scale == 0] = 1.0
    rates, _ = nnls(features / scale / ms[:, None], np.ones(len(ms)))
    return np.asarray(rates / scale)


def cut_ratios(
    dense: Dense,
    head: Head,
    surgery: Surgery,
    places: Sequence[Place],
    seconds: float,
    progress: Progress,
    plans: Sequence[Mapping[str, int]],
) -> list[Measured]:
    """Return what models that keep each group's first units take at every place, all of one runtime."""
    runtime = places[0].runtime

    def cut(counts: Mapping[str, int]) -> Candidate:
        masks = MaskSet({g.name: np.zeros(g.size) for g in surgery.groups})
        for name, count in counts.items():
            masks[name][:count] = 1.0
        model = surgery.slice(SlicePlan.from_masks(surgery.groups, masks))
        return Candidate(model, dense.processor, dense.signature)

    found: list[list[Ratio]] = [[] for _ in places]
    dense_ns: list[list[float]] = [[] for _ in places]
    with tempfile.TemporaryDirectory(prefix="deploy-prune-probe-") as folder:
        whole = Stage(Path(folder), head, [runtime]).write("dense", cut({g.name: g.size for g in surgery.groups}))
        for start in range(0, len(plans), TOGETHER):
            roots = {"dense": whole}
            with tempfile.TemporaryDirectory(dir=folder) as beside:
                stage = Stage(Path(beside), head, [runtime])
                for number, counts in enumerate(plans[start : start + TOGETHER]):
                    roots[str(number)] = stage.write(str(number), cut(counts))
                    progress((start + 0.5 * (number + 1)) / len(plans))
                for at, place in enumerate(places):
                    samples = time_bundles(roots, place, seconds)
                    beside_them = samples.pop("dense")
                    found[at] += [ratio_of_medians(times, beside_them) for times in samples.values()]
                    dense_ns[at] += beside_them
            progress(min(1.0, (start + TOGETHER) / len(plans)))
    return [(ratios, summarise_ms(ns)["median"]) for ratios, ns in zip(found, dense_ns, strict=True)]


def one_shape(groups: Sequence[UnitGroup], kind: str) -> UnitGroup:
    """Return a group of the kind; all must be of one shape. Raises InputError otherwise."""
    alike = [g for g in groups if g.kind == kind]
    if len({(g.size, g.width, g.hidden) for g in alike}) != 1:
        raise InputError(f"The layers' {kind}s differ in number or width: one table cannot stand for them all.")
    return alike[0]
