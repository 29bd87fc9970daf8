"""Several processes that prune one model together: who takes which batches, and sums that do not depend on how many.

Batches are dealt out to `sections()`, every process has some sections, and a sum is a fixed binary tree over them: 1, 2
and 4 processes add the same numbers in the same order. Nothing here acts unless `team` was entered.
"""

from __future__ import annotations

import json
import os
import signal
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _set_pg_timeout

from . import hosts
from .errors import DeployPruneError, DismissedError, InputError, LostProcessError, SystemStateError

SECTIONS = 4  # of a sum; with more processes the next power of two
MEETING = timedelta(minutes=3)  # of waiting for the others to come; for their connections gloo waits five times as long
TIMEOUT = timedelta(hours=12)  # of waiting for the others: a search or a download may take long in the first process
BACKENDS = ("gloo", "nccl")  # gloo's errors are plain RuntimeErrors that begin with the path of its source
Kept = tuple[dict[str, Tensor], dict[str, Any]]  # tensors by name, and plain values
T = TypeVar("T")

_joined = False


def started_together() -> bool:
    """Say whether torchrun, or whatever sets its environment variables, started this process beside others."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ


@contextmanager
def team(device: torch.device) -> Iterator[None]:
    """Join the processes that were started together; alone nothing happens.

    Every process calls the same functions with the same arguments from there on. A process group that is there
    already is used. A termination, as torchrun sends it when another process has ended, raises LostProcessError.
    A GPU that has a number becomes the current one. Raises SystemStateError where the others cannot be reached.
    """
    global _joined
    there = dist.is_initialized()
    if _joined or not (there or started_together()):
        yield
        return
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # what nccl sends lies there: it refuses two processes on one GPU
    if not there:
        _meet("nccl" if device.type == "cuda" else "gloo")
    before = signal.signal(signal.SIGTERM, _terminated)
    _joined = True
    try:
        yield
    finally:
        disband()
        signal.signal(signal.SIGTERM, before)
        if not there:
            with suppress(RuntimeError):
                dist.destroy_process_group()


def _meet(backend: str) -> None:
    """Connect to the others, on a network that leads to them, and let the system watch the connections."""
    hosts.choose_interface()
    try:
        store, number, count = _together()
        connecting = MEETING
        if backend == "nccl":  # which connects, by the store, when it is first used: that may be late
            store.set_timeout(connecting := TIMEOUT)
        dist.init_process_group(backend, store=store, rank=number, world_size=count, timeout=connecting)
    except (RuntimeError, ValueError) as error:
        raise SystemStateError(
            f"{place()} could not join the others: {_first_line(error)}",
            hint="Every machine must reach every other by its address, on any port. Where one has several networks, "
            f"name the interface in {hosts.INTERFACES[backend]} (docs/scale.md).",
        ) from error
    _set_pg_timeout(TIMEOUT)
    hosts.watch_connections()


def _together() -> tuple[dist.Store, int, int]:
    """Wait until every process has come; return where they meet, this one's number, and how many they are."""
    store, number, count = next(iter(dist.rendezvous("env://", timeout=MEETING)))
    store = dist.PrefixStore("deploy-prune", store)  # torchrun has keys of its own there
    store.set(f"process-{number}", "here")
    store.wait([f"process-{n}" for n in range(count)], MEETING)
    return store, number, count


def disband() -> None:
    """End the common work; what follows in this process is its own."""
    global _joined
    _joined = False


def _terminated(number: int, frame: Any) -> None:
    raise LostProcessError(f"{place()} was told to end: another process has ended, or the machine shuts down.")


def size() -> int:
    """Return how many processes work together; 1 outside a team."""
    return dist.get_world_size() if _joined else 1


def rank() -> int:
    """Return this process's number, from 0."""
    return dist.get_rank() if _joined else 0


def place() -> str:
    """Name this process in messages, and where there are several machines its own."""
    number, count = (rank(), size()) if _joined else (os.environ.get("RANK", 0), os.environ.get("WORLD_SIZE", 1))
    machine = f", on {socket.gethostname()}," if hosts.started_on_several() else ""
    return f"Process {int(number) + 1} of {count}{machine}"


def neighbours() -> int:
    """Return how many processes share this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", size())) if _joined else 1


def sections() -> int:
    """Return into how many sections batches are dealt out: batch n goes to section n % sections()."""
    return max(SECTIONS, 1 << (size() - 1).bit_length())


def own_sections(of: int | None = None) -> range:
    """Return the sections of a process (default: of this one)."""
    number = rank() if of is None else of
    return range(number * sections() // size(), (number + 1) * sections() // size())


def own(count: int) -> list[int]:
    """Return which of `count` batches this process takes, section by section. Raises InputError for too few."""
    if size() > 1 and count < sections():
        raise InputError(
            f"{size()} processes need {sections()} batches of samples at least, and there are {count}.",
            hint="Calibrate on more samples, or start fewer processes.",
        )
    return [number for section in own_sections() for number in range(section, count, sections())]


def ordered(numbers: Sequence[int]) -> list[tuple[int, int]]:
    """Return the place and the number of every batch, section by section."""
    return sorted(enumerate(numbers), key=lambda at: at[1] % sections())


class SectionSum:
    """Sum tensors in float64: within each section in the order they come, over the sections as a binary tree.

    Sections come in ascending order. `total` is the sum over all processes, and the same in each; they all ask for it.
    """

    def __init__(self, shape: tuple[int, ...], device: torch.device) -> None:
        self.shape, self.device = shape, device
        self._section = own_sections().start
        self._open: Tensor | None = None
        self._nodes: list[tuple[int, int, Tensor]] = []  # level and index in the tree, and the sum below
        self._total: Tensor | None = None

    def add(self, section: int, value: Tensor) -> None:
        """Add a value to a section."""
        if section not in range(self._section, own_sections().stop):
            raise RuntimeError(f"section {section} comes after {self._section} or is another process's")
        while self._section < section:
            self._close()
        if self._open is None:
            self._open = value.to(torch.float64, copy=True)
        else:
            self._open += value

    def total(self) -> Tensor:
        """Return the sum over all sections of all processes."""
        if self._total is None:
            while self._section < own_sections().stop:
                self._close()
            self._total = self._merged()
        return self._total

    def _close(self) -> None:
        empty = torch.zeros(self.shape, dtype=torch.float64, device=self.device)
        _push(self._nodes, 0, self._section, empty if self._open is None else self._open)
        self._open = None
        self._section += 1

    def _merged(self) -> Tensor:
        if size() > 1:
            mine, self._nodes = iter(self._nodes), []
            for process in range(size()):
                for level, index in _cover(own_sections(process)):
                    if process == rank():
                        value = next(mine)[2].contiguous()
                    else:
                        value = torch.empty(self.shape, dtype=torch.float64, device=self.device)
                    _broadcast(value, process)
                    _push(self._nodes, level, index, value)
        ((_, _, total),) = self._nodes
        self._nodes = []
        return total


def _push(nodes: list[tuple[int, int, Tensor]], level: int, index: int, value: Tensor) -> None:
    """Add a node to the right of a tree, and merge what is complete."""
    while nodes and index % 2 and nodes[-1][:2] == (level, index - 1):
        value = nodes.pop()[2].add_(value)
        level, index = level + 1, index // 2
    nodes.append((level, index, value))


def _cover(leaves: range) -> list[tuple[int, int]]:
    """Return the level and index of the largest subtrees that some neighbouring leaves fill."""
    nodes: list[tuple[int, int, Tensor]] = []
    for leaf in leaves:
        _push(nodes, 0, leaf, torch.zeros(()))
    return [(level, index) for level, index, _ in nodes]


class Shares:
    """Deal pieces of work out over the processes, one to each in turn, and give every result to all."""

    def __init__(self) -> None:
        self._sizes: list[int] = []
        self._own: dict[int, np.ndarray] = {}
        self._waiting: tuple[int, Callable[[], np.ndarray]] | None = None

    def add(self, length: int, work: Callable[[], np.ndarray]) -> None:
        """Take up a piece of work that gives an array (length,); it runs when every process has one."""
        number = len(self._sizes)
        self._sizes.append(length)
        if number % size() == rank():
            self._waiting = number, work
        if number % size() == size() - 1:
            self._run()

    def results(self) -> list[np.ndarray]:
        """Return the results of all pieces, in order, in every process."""
        self._run()
        found = []
        for number, length in enumerate(self._sizes):
            values = torch.from_numpy(self._own.get(number, np.zeros(length)).astype(np.float64))
            found.append(fill(values).numpy())
        return found

    def _run(self) -> None:
        if self._waiting is not None:
            number, work = self._waiting
            self._waiting = None
            self._own[number] = work()


def fill(tensor: Tensor) -> Tensor:
    """Return a tensor whose entries each one process knows, the others having zeros there."""
    if size() == 1 or not tensor.numel():
        return tensor
    with connected():
        moved = _to_send(tensor)
        dist.all_reduce(moved)
    return moved.to(tensor.device)


def least(value: float) -> float:
    """Return the smallest of the processes' values."""
    if size() == 1:
        return value
    found = _to_send(torch.tensor(value, dtype=torch.float64))
    with connected():
        dist.all_reduce(found, dist.ReduceOp.MIN)
    return float(found)


def first(compute: Callable[[], T], pack: Callable[[T], Kept], unpack: Callable[[Kept], T]) -> T:
    """Return what the first process computes, in every process; its errors end the others as well."""
    if size() == 1:
        return compute()
    kept: Kept | None = None
    with first_ahead():
        if rank() == 0:
            kept = pack(compute())
    known = agree(kept)
    assert known is not None
    return unpack(known)


def agree(kept: Kept | None) -> Kept | None:
    """Return what the first process holds, in every process: tensors and plain values, or None."""
    if size() == 1:
        return kept
    tensors, values = kept or ({}, {})
    kinds = {name: [str(t.dtype).removeprefix("torch."), list(t.shape)] for name, t in tensors.items()}
    told = agree_values({"none": kept is None, "kinds": kinds, "values": values})
    if told["none"]:
        return None
    found = {}
    for name, (dtype, shape) in told["kinds"].items():
        mine = tensors[name] if rank() == 0 else torch.zeros(shape, dtype=getattr(torch, dtype))
        found[name] = _sent(mine)
    return found, told["values"]


def agree_values(values: dict[str, Any], source: int = 0) -> dict[str, Any]:
    """Return one process's plain values (default: the first one's), in every process."""
    if size() == 1:
        return values
    text = torch.from_numpy(np.frombuffer(json.dumps(values).encode(), dtype=np.uint8).copy())
    length = int(_sent(torch.tensor(len(text)), source))
    text = _sent(text if rank() == source else torch.zeros(length, dtype=torch.uint8), source)
    return json.loads(text.numpy().tobytes())


@contextmanager
def first_ahead() -> Iterator[None]:
    """Let the first process do something before the others: what it downloads or makes, they find.

    An error in any process ends them all: what the others could not do, the first one tells as well.
    """
    if size() == 1:
        yield
        return
    if rank() > 0 and (code := int(agree_values({})["exit_code"])):
        raise DismissedError(code)
    failed: DeployPruneError | None = None
    try:
        yield
    except LostProcessError:
        raise  # the others notice by themselves
    except DeployPruneError as error:
        failed = error
    if rank() == 0:
        agree_values({"exit_code": failed.exit_code if failed else 0})
        if failed:
            raise failed
    _all_well(failed)


def _all_well(failed: DeployPruneError | None) -> None:
    """Raise an error in every process if one of them has failed."""
    codes = fill(torch.tensor([failed.exit_code if failed and r == rank() else 0 for r in range(size())]))
    if not codes.any():
        return
    source = int(codes.nonzero()[0])
    said = {"message": f"{place()} failed: {failed.message}", "hint": failed.hint} if failed else {}
    told = agree_values(said, source)
    if failed:
        raise failed
    raise DismissedError(int(codes[source]), told["message"], hint=told["hint"])


def _sent(tensor: Tensor, source: int = 0) -> Tensor:
    """Return one process's tensor (default: the first one's) on the CPU."""
    flags = tensor.dtype == torch.bool  # not every backend sends those
    moved = _to_send(tensor.to(torch.uint8) if flags else tensor)
    _broadcast(moved, source)
    return moved.to("cpu").to(tensor.dtype)


def _to_send(tensor: Tensor) -> Tensor:
    """Return a tensor where the backend can take it: nccl knows GPUs alone."""
    nccl = dist.get_backend() == "nccl"
    moved = tensor.detach().to("cuda" if nccl else "cpu").contiguous()
    return moved.clone() if moved.data_ptr() == tensor.data_ptr() else moved


def _broadcast(tensor: Tensor, source: int) -> None:
    if tensor.numel():
        with connected():
            dist.broadcast(tensor, source)


@contextmanager
def connected() -> Iterator[None]:
    """Raise LostProcessError for what the connection to the others says; other errors, no memory left say, stay."""
    try:
        yield
    except RuntimeError as error:
        if not (isinstance(error, dist.DistError) or any(name in str(error).lower() for name in BACKENDS)):
            raise
        reason = _first_line(error)
        raise LostProcessError(f"{place()} lost another process, or could not reach it: {reason}") from error


def _first_line(error: Exception) -> str:
    return f"{(str(error).strip().splitlines() or [type(error).__name__])[0]:.200}"
