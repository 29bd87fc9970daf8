"""The Ray cluster that a sweep runs on: one of this machine alone for as long as it runs, or one that is there."""

from __future__ import annotations

import logging
import os
import secrets
import socket
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from ..errors import InputError, MissingExtraError, SystemStateError
from ..progress import Reporter

_QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS_SKIP_REGEX": ".",  # lines that Ray prints on standard output; the sweep tells what matters
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # tasks that ask for no GPU keep what the environment shows them
}
_LOCAL = {
    # Ray's servers then listen on 127.0.0.1 alone; on Linux there is no other switch for that (ray_constants).
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": secrets.token_hex(32),  # else Ray writes one into the user's home
}
SECONDS_TO_ANSWER = 5.0
WAIT_MINUTES = 10.0  # for a node that jobs can run on, when the last one has left


@contextmanager
def connected(address: str | None, cpus: int) -> Iterator[None]:
    """Connect to the cluster at an address, or start one of this machine with so many CPUs, until the block ends.

    A connection that is there already is used as it is. Raises MissingExtraError, InputError for what is no address, or
    SystemStateError where no cluster answers.
    """
    if address:
        _check_address(address)
    with ExitStack() as stack:
        stack.enter_context(_environment(_QUIET if address else _QUIET | _LOCAL))
        try:
            import ray
        except ImportError as error:
            raise MissingExtraError("ray", "sweep") from error
        if ray.is_initialized():
            yield
            return
        how: dict[str, Any] = {"address": address, "log_to_driver": False, "logging_level": logging.ERROR}
        if address is None:
            own = tempfile.TemporaryDirectory(prefix="dp-ray-", dir=_short_folder(), ignore_cleanup_errors=True)
            how |= {"address": "local", "num_cpus": cpus, "include_dashboard": False}
            how["_temp_dir"] = stack.enter_context(own)
        stack.callback(ray.shutdown)
        with _starting(f"the Ray cluster at {address}" if address else "a Ray cluster on this machine"):
            ray.init(**how)
        yield


def _check_address(address: str) -> None:
    """Raise an error unless somebody listens at an address: Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    if address == "auto":
        return
    if not host or not port.isdigit() or "/" in address:
        raise InputError(
            f"'{address}' is no address of a Ray cluster.", hint="Give HOST:PORT as ray start prints it, or auto."
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=SECONDS_TO_ANSWER).close()
    except (OSError, OverflowError) as error:
        raise SystemStateError(
            f"No Ray cluster answers at {address}: {error}.", hint="Start one: ray start --head --port 6379"
        ) from error


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Set variables that the user has not set, until the block ends; some are read when ray is imported."""
    added = {name: value for name, value in values.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


def _short_folder() -> str:
    """Return where Ray's sockets may lie: their paths have 107 bytes at most, of which Ray takes about 80."""
    usual = tempfile.gettempdir()
    return usual if len(usual) < 24 or not os.path.isdir("/tmp") else "/tmp"  # nosec B108


@contextmanager
def _starting(what: str) -> Iterator[None]:
    try:
        yield
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        raise SystemStateError(
            f"Could not reach {what}: {' '.join(str(error).split())[:300]}",
            hint="Every node needs the same Python, Ray and deploy-prune.",
        ) from error


def alive() -> list[Mapping[str, float]]:
    """Return the resources of every node that is there."""
    import ray

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def node_id() -> str | None:
    """Return Ray's id of the node that this process runs on; None outside Ray."""
    import ray

    return ray.get_runtime_context().get_node_id() if ray.is_initialized() else None


def alive_ids() -> set[str]:
    """Return the ids of the nodes that are there."""
    import ray

    return {node["NodeID"] for node in ray.nodes() if node["Alive"]}


def room(threads: int, device: str) -> int:
    """Return how many jobs of so many threads the nodes that are there can run at once."""
    nodes = alive()
    found = [int(n.get("CPU", 0)) // threads for n in nodes]
    if device == "cuda":
        found = [min(r, int(n.get("GPU", 0))) for r, n in zip(found, nodes, strict=True)]
    return sum(found)


def needs(threads: int, device: str) -> str:
    """Say what a job needs of a node."""
    return f"{threads} CPU{'s' * (threads > 1)}" + (" and a GPU" if device == "cuda" else "")


def capacity(threads: int, device: str) -> int:
    """Return how many jobs of so many threads run at once. Raises InputError where no node can run one."""
    if not (found := room(threads, device)):
        raise InputError(
            f"No node of the Ray cluster has {needs(threads, device)}.",
            hint="Lower threads, or choose another device.",
        )
    return found


@dataclass
class Patience:
    """Bear with a cluster in which no node can run jobs any more: Ray itself would wait for ever, and say nothing."""

    threads: int
    device: str
    minutes: float
    reporter: Reporter
    since: float | None = None  # of the clock that never jumps; when the last node was missed first

    def look(self, jobs: int) -> None:
        """Look whether any of so many unfinished jobs can run, and tell when that changes.

        Raises SystemStateError where none could for all of the minutes.
        """
        if not jobs or room(self.threads, self.device):
            if jobs and self.since is not None:
                self.reporter.note("The Ray cluster has a node for the jobs again.")
            self.since = None
            return
        now, what = time.monotonic(), needs(self.threads, self.device)
        if self.since is None:
            self.since = now
            self.reporter.note(
                f"No node of the Ray cluster has {what} any more: {jobs} unfinished job(s) wait. "
                f"If none comes, the sweep ends in {self.minutes:g} minutes (--wait-minutes)."
            )
        if now - self.since >= 60 * self.minutes:
            raise SystemStateError(
                f"No node of the Ray cluster had {what} for {self.minutes:g} minutes: {jobs} unfinished job(s) waited.",
                hint="Start one (ray start --address ...); then the same command goes on behind what is finished.",
            )


def check_labels(labels: tuple[str, ...]) -> None:
    """Raise InputError for a label that no node has, or whose node would also prune."""
    nodes = alive()
    for label in labels:
        labelled = [resources for resources in nodes if label in resources]
        start = f"Start it so: ray start --address ... --num-cpus 0 --resources '{{\"{label}\": 1}}'"
        if not labelled:
            raise InputError(f"No node of the Ray cluster has the label '{label}' (bench_on).", hint=start)
        if any(resources.get("CPU") for resources in labelled):
            raise InputError(f"Jobs would run on the node '{label}', which is to measure: it has CPUs.", hint=start)


def gone(labels: Sequence[str]) -> list[str]:
    """Return the labels that no node has any more: Ray would wait for ever for one to come back."""
    nodes = alive() if labels else []
    return [label for label in labels if not any(label in resources for resources in nodes)]


def bench_options(place: str | None) -> dict[str, Any]:
    """Return the options of a Ray task that has a node for itself: the one of a label, or this machine."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    if place is not None:
        gpus = max((node.get("GPU", 0) for node in alive() if place in node), default=0)
        return {"num_cpus": 0, "num_gpus": gpus, "resources": {place: 1}}
    here = ray.get_runtime_context().get_node_id()
    own: Mapping[str, float] = next(n["Resources"] for n in ray.nodes() if n["NodeID"] == here)
    affinity = NodeAffinitySchedulingStrategy(here, soft=False)
    return {"num_cpus": own.get("CPU", 0), "num_gpus": own.get("GPU", 0), "scheduling_strategy": affinity}
