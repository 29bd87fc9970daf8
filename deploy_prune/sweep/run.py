"""Run a sweep: check what is asked, compute it on a cluster, write the table."""

from __future__ import annotations

import time
from pathlib import Path

from ..config import DEMO_MODELS
from ..disk import disk_errors, locked
from ..errors import InputError
from ..progress import Reporter, Silent
from ..runtime_bench.machine import usable_cores
from .cluster import WAIT_MINUTES, capacity, check_labels, connected
from .driver import Driver
from .results import Sweep, finish
from .settings import SweepSettings
from .store import Store


def run_sweep(
    settings: SweepSettings,
    out: str | Path,
    *,
    address: str | None = None,
    workers: int | None = None,
    wait_minutes: float = WAIT_MINUTES,
    reporter: Reporter | None = None,
) -> Sweep:
    """Compute every cell that `out` does not hold yet; write results.parquet, results.md and report.html there.

    `workers` is how many jobs run at once (default: what the cores, or the cluster, have room for). What a cell could
    not be computed for is the reason in its row. Raises InputError for settings that no cell can be computed by, and
    SystemStateError where the cluster does not answer, or for `wait_minutes` has no node for the jobs any more, or
    another sweep writes to `out`.
    """
    reporter = reporter or Silent()
    folder = Path(out)
    check_names(settings)
    with disk_errors(folder):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise InputError(f"{folder} is not a folder.", hint="Choose another --out.") from error
    if address is None:
        for name in {e.model for e in settings.entries} & set(DEMO_MODELS):
            from ..demo import prepare_demo

            prepare_demo(name, reporter)  # once, with its progress shown, before the workers ask for it
    cpus = settings.threads * (workers or max(1, usable_cores() // settings.threads))
    started = time.perf_counter()
    with locked(folder), connected(address, cpus):
        check_labels(settings.bench_on)
        room = capacity(settings.threads, settings.device)
        driver = Driver(settings, Store(folder), min(workers or room, room), reporter, wait_minutes)
        try:
            driver.run()
        except KeyboardInterrupt:
            reporter.note("The cells that were finished are kept: the same command goes on behind them.")
            raise
        return finish(settings, driver.rows(), driver.account(started), folder)


def check_names(settings: SweepSettings) -> None:
    """Raise InputError for a criterion, compensation or runtime that there is not."""
    from ..channel_pruner import FOLDS, ONLY_CUT
    from ..compensate import get_solver
    from ..criteria import get_criterion
    from ..runtime_bench.bench import check_runtime

    for criterion in settings.criteria:
        if criterion != "auto":
            get_criterion(criterion)
    for compensate in settings.compensate:
        if compensate not in ("none", *FOLDS):
            get_solver(compensate.removesuffix(ONLY_CUT))
    for runtime in settings.bench_runtimes:
        check_runtime(runtime, files=False)
        if not runtime.startswith(("ort-", "torch", "openvino")):
            raise InputError(
                f"A sweep cannot measure in {runtime}: its files are built for one machine.",
                hint="Take ort-cpu, ort-cuda, openvino or torch; or make bundles, and deploy-prune bench them.",
            )
