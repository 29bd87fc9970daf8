"""A whole tuning: load, probe, search, confirm, and write the winner's bundle through the pipeline."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .. import pipeline
from ..bundle import Bundle
from ..config import Recipe
from ..disk import disk_errors, locked, write_atomically
from ..errors import InputError, VerdictError
from ..experiments import Lab, Setting
from ..latency_table import AnyLatency, ChannelLatency, LatencyTable, LatencyTables, read_latency_table
from ..lengths import Lengths
from ..probing import probe
from ..progress import Progress, Reporter, Silent
from ..resolving import check_guards, check_kind, check_length, is_label_free, resolve
from ..resume import hash_inputs
from ..runtime_bench.machine import default_threads, describe_machine
from ..stages import Options
from .search import Hunt, open_study
from .settings import TuneSettings
from .space import Form, Space
from .verdict import Limits, front, near_misses, not_made, title, why
from .workbench import Workbench

SCHEMA_VERSION = "1.0"
TRIALS = "trials.json"


@dataclass
class Tuned:
    """Hold the document of all trials, its file, and the winner's bundle, None where nothing met both limits."""

    document: dict[str, Any]
    path: Path
    bundle: Bundle | None

    def check(self) -> None:
        """Raise VerdictError where no candidate met both limits."""
        if self.bundle is None:
            nearest = [*self.document["near_misses"], *self.document["not_made"]][:1]
            raise VerdictError(
                f"No candidate takes at most {self.document['target_ms']:g} ms and loses at most"
                f" {self.document['max_loss']:g} points; no bundle was written.",
                hint=f"Nearest: {nearest[0]}. All trials: {self.path}" if nearest else f"All trials: {self.path}",
            )


def tune(model: str, settings: TuneSettings, reporter: Reporter | None = None) -> Tuned:
    """Search for the candidate of the least loss within the target, and publish it as a bundle.

    Trials lie in OUT.tune beside the bundle; another call with the same settings, data and machine goes on with them.
    Raises DeployPruneError for what cannot be tuned; where nothing meets both limits, `Tuned.check` does.
    """
    reporter = reporter or Silent()
    space = Space.of(settings)
    given = read_latency_table(settings.lut) if settings.lut else None
    if given is not None and given.runtime not in settings.runtimes:
        raise InputError(
            f"The latency table is of {given.runtime}, not of {', '.join(settings.runtimes)}.",
            hint="Leave --lut out to probe first, or name its runtime.",
        )
    recipe = settings.recipe(model, max_quality_loss=settings.max_quality_loss)
    source, task, recipe = resolve(recipe, reporter)
    destination = settings.destination(model, task)
    folder = destination.with_name(f"{destination.name}.tune")
    lab = Lab(_setting(source, task, recipe), _Once(reporter))
    check_length(settings.seq_len, lab.checkpoint)
    check_kind(recipe, lab.checkpoint)
    check_guards(recipe, lab.data)
    options = Options(
        compensate=settings.compensate,
        label_free=is_label_free(recipe, lab.data, lab.checkpoint),
        seed=settings.seed,
    )
    with disk_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
    with locked(folder), disk_errors(folder):
        folder.mkdir(exist_ok=True)
        seq_len = _length(settings, lab, given)
        threads = settings.threads or (given.threads if given else None) or default_threads()
        tables = _tables(settings, lab, given, source, seq_len, threads, folder, reporter)
        candidates = folder / "candidates"
        candidates.mkdir(exist_ok=True)
        bench = Workbench(settings, lab, options, space, candidates, seq_len, threads, tables)
        limits = Limits(settings.target_ms, settings.max_quality_loss)
        with open_study(folder, _key(settings, bench)) as study:
            hunt = Hunt(bench, limits, study, reporter)
            hunt.run()
            hunt.nearest()
            winner, refuted = hunt.confirmed()
            document = _document(hunt, winner, refuted, task)
        write_atomically(folder / TRIALS, json.dumps(document, indent=1) + "\n")
        shutil.rmtree(candidates, ignore_errors=True)
    if winner is None:
        return Tuned(document, folder / TRIALS, None)
    return Tuned(document, folder / TRIALS, _published(winner, bench, recipe, model, destination, reporter))


class _Once:
    """Show a stage and a note the first time alone: every candidate is searched and compensated."""

    def __init__(self, reporter: Reporter) -> None:
        self.reporter, self.shown = reporter, set[str]()

    def stage(self, name: str) -> AbstractContextManager[Progress]:
        return self.reporter.stage(name) if self._new(name) else nullcontext(lambda share: None)

    def note(self, text: str) -> None:
        if self._new(text):
            self.reporter.note(text)

    def _new(self, text: str) -> bool:
        known = text in self.shown
        self.shown.add(text)
        return not known


def _setting(source: str, task: str, recipe: Recipe) -> Setting:
    return Setting(
        model=source,
        task=task,
        data=recipe.data,
        samples=recipe.samples,
        seeds=(recipe.seed,),
        max_length=recipe.max_length,
        text_column=recipe.text_column,
        label_column=recipe.label_column,
        device=recipe.device,
    )


def _length(settings: TuneSettings, lab: Lab, given: AnyLatency | None) -> int:
    """Return the length of the latency: asked for, the table's, or the mean of the calibration rows.

    Raises InputError for a table of another shape: its shares say little of this one.
    """
    tokens = lab.checkpoint.signature.tokens
    seq = given.seq if isinstance(given, LatencyTable) else None
    rows = lab.pruner(settings.seed).rows
    found = settings.seq_len or tokens or seq or math.ceil(np.mean([r.length for r in rows]))
    shape = (given.batch, seq or found) if isinstance(given, LatencyTable | ChannelLatency) else None
    if shape not in (None, (settings.batch, found)):
        raise InputError(
            f"The latency table is of batch {shape[0]} and {shape[1]} tokens, the target of batch {settings.batch}"
            f" and {found} tokens.",
            hint="Leave --lut out to probe first, or give its --batch and --seq-len.",
        )
    if isinstance(given, LatencyTables):
        if settings.batch not in (probed := sorted({t.batch for t in given.tables})):
            raise InputError(
                f"The latency table is of batch {', '.join(map(str, probed))}, the target of batch {settings.batch}.",
                hint="Leave --lut out to probe first, or give its --batch.",
            )
        given.shares(Lengths(((found, 1),), settings.batch))
    return found


def _tables(
    settings: TuneSettings,
    lab: Lab,
    given: AnyLatency | None,
    source: str,
    seq_len: int,
    threads: int,
    folder: Path,
    reporter: Reporter,
) -> dict[str, AnyLatency]:
    """Return a latency table per runtime: the given one, one that an earlier call probed, or one probed now."""
    tables: dict[str, AnyLatency] = {}
    of = _hash([lab.checkpoint.sha256, settings.probe_widths, settings.probe_seconds, _machine(threads)])
    for runtime in settings.runtimes:
        path = folder / f"lut-{runtime}-{settings.batch}x{seq_len}-t{threads}-{of[:16]}.json"
        if given is not None and given.runtime == runtime:
            tables[runtime] = given
            continue
        if not path.is_file():
            with reporter.stage(f"probe {runtime}") as progress:
                found = probe(
                    source,
                    runtime=runtime,
                    batch=settings.batch,
                    seq=seq_len,
                    widths=settings.probe_widths,
                    threads=threads,
                    seconds=settings.probe_seconds,
                    progress=progress,
                )
            write_atomically(path, found.model_dump_json(indent=1) + "\n")
        tables[runtime] = read_latency_table(path)
    return tables


NOT_IN_THE_KEY = {"trials", "minutes", "out", "lut"}


def _key(settings: TuneSettings, bench: Workbench) -> str:
    """Return the hash of everything that the trials depend on; more trials or minutes go on with the same study."""
    contents = {
        "schema": SCHEMA_VERSION,
        "settings": settings.model_dump(mode="json", exclude=NOT_IN_THE_KEY),
        "model": bench.lab.checkpoint.sha256,
        "rows": [hash_inputs(bench.lab.pruner(settings.seed).rows), hash_inputs(bench.lab.rows)],
        "shape": [settings.batch, bench.seq_len, bench.threads],
        "tables": {name: table.model_dump(mode="json") for name, table in bench.tables.items()},
        "machine": _machine(bench.threads),
    }
    return _hash(contents)[:32]


def _machine(threads: int) -> list[Any]:
    """Return what latencies depend on: the processors, and the releases of what runs on them."""
    machine = describe_machine(threads)
    return [machine["cpu"], machine["cpu_flags"], [gpu["name"] for gpu in machine["gpus"]], machine["versions"]]


def _hash(contents: Any) -> str:
    return hashlib.sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest()


def _document(hunt: Hunt, winner: Mapping[str, Any] | None, refuted: Mapping[int, Any], task: str) -> dict[str, Any]:
    """Return everything that was found, as plain values."""
    bench, limits, records = hunt.bench, hunt.limits, hunt.records()
    states = [r["state"] for r in records]
    return {
        "schema_version": SCHEMA_VERSION,
        "settings": bench.settings.model_dump(mode="json"),
        "task": task,
        "metric": bench.lab.data.metric,
        "dense_value": bench.dense_value(),
        "target_ms": limits.target_ms,
        "max_loss": limits.max_loss,
        "batch": bench.settings.batch,
        "seq_len": bench.seq_len,
        "threads": bench.threads,
        "machine": describe_machine(bench.threads),
        "left_out": list(bench.space.left_out),
        "counts": {state: states.count(state) for state in ("measured", "failed", "discarded", "repeated")},
        "trials": records,
        "refuted": {str(number): again for number, again in refuted.items()},
        "front": [r["number"] for r in front(records)],
        "winner": None if winner is None else winner["number"],
        "confirmed": None if winner is None else winner["again"],
        "why": None if winner is None else why(winner, records, limits, set(refuted)),
        "near_misses": near_misses(records, limits, refuted),
        "not_made": not_made(records),
    }


def _published(
    winner: Mapping[str, Any], bench: Workbench, recipe: Recipe, model: str, destination: Path, reporter: Reporter
) -> Bundle:
    """Run the pipeline with what won; its plan is the trial's, since the rows, the seed and the budget are."""
    form = next(f for f in bench.space.forms if f.name == winner["form"])
    chosen = _recipe_of(winner, form, bench)
    bundle = pipeline.run(
        bench.settings.recipe(model, **{**chosen, "out": str(destination), "samples": recipe.samples}), reporter
    )
    if winner["plan_hash"] not in (None, bundle.manifest.plan["hash"]):
        reporter.note(f"The bundle's plan differs from that of {title(winner)}: measure it again before you ship it.")
    return bundle


def _recipe_of(winner: Mapping[str, Any], form: Form, bench: Workbench) -> dict[str, Any]:
    """Return what a recipe says of a winner; the dense model is only exported."""
    settings = bench.settings
    said: dict[str, Any] = {
        "keep_flops": winner["keep"],
        "seq_len": bench.seq_len,
        "align": winner["align"],
        "precisions": tuple(dict.fromkeys(("fp32", form.precision))),
        "runtimes": (form.runtime,),
        "batches": (settings.batch,),
        "bench_seconds": settings.seconds,
    }
    if form.kind is not None:
        options = form.options()
        said |= {"formats": (form.kind.format,), "dialects": options.dialects, "schemes": options.schemes}
    if winner["keep"] == 1:
        said |= {"compensate": "none", "rearrange": "none", "align": 1}
    return said
