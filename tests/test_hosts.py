"""Several machines, as far as one can be several: network namespaces with a wire between them, each with a name, an
/etc/hosts and a disk of its own; and processes in working folders of their own, which see none of each other's files.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from killing import identity, kept_files
from models_tiny import tiny_model, tiny_rows
from runs_tiny import checkpoint, data
from team_worker import SILENCE
from test_parallel import ENVIRONMENT, WORKER, unwatched
from torch.distributed import TCPStore

from deploy_prune import hosts, parallel
from deploy_prune.bundle import Bundle
from deploy_prune.cli import invoke
from deploy_prune.disk import code_hash
from deploy_prune.errors import InputError, SystemStateError
from deploy_prune.heads import Head
from deploy_prune.recover import Recovery, recover
from deploy_prune.sweep import SweepSettings
from deploy_prune.sweep.cells import expand, job_spec, jobs_of
from deploy_prune.sweep.job import limited, run_job

PRUNE = ["prune", "./model", "--task", "text-classification", "--data", "./data", "--out", "b"]
ENOUGH = 160  # rows, for two processes


@dataclass(frozen=True)
class Host:
    """A machine: its namespace and name, its address and its disk, which it sees `at` the path where all see theirs."""

    name: str
    address: str
    disk: Path
    at: Path

    def start(self, *words: str, **environment: str) -> subprocess.Popen[str]:
        """Run Python's words there, in its disk's folder; its name stands for its loopback, as Debian sets it up."""
        known = self.disk / "hosts"
        known.write_text(f"127.0.0.1 localhost\n127.0.1.1 {self.name}\n")
        script = 'mount --bind "$1" "$2"; mount --bind "$1/hosts" /etc/hosts; echo "$3" > /proc/sys/kernel/hostname; '
        script += 'cd "$2"; shift 3; exec "$@"'
        inside = ["sh", "-ec", script, "sh", str(self.disk), str(self.at), self.name, sys.executable, *words]
        return subprocess.Popen(
            ["ip", "netns", "exec", self.name, "unshare", "--uts", *inside],
            env={**ENVIRONMENT, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def wire(self, state: str) -> None:
        """Set the wire "up" or "down" at this end."""
        ip("-n", self.name, "link", "set", "wire", state)


def ip(*words: str) -> str:
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True).stdout


def end(name: str) -> None:
    """Kill what still runs in a namespace, and remove it with its end of the wire."""
    for pid in ip("netns", "pids", name).split():
        with suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)
    ip("netns", "del", name)


def end_left() -> None:
    """Remove the namespaces that a killed run of these tests has left."""
    for name in (line.split()[0] for line in ip("netns", "list").splitlines()):
        if (made := re.fullmatch(r"dp-(\d+)-\d", name)) and not Path("/proc", made[1]).exists():
            end(name)


@pytest.fixture
def two(tmp_path: Path) -> Iterator[tuple[Host, Host]]:
    """Two machines with a wire between them."""
    if sys.platform != "linux" or os.geteuid() or not (shutil.which("ip") and shutil.which("unshare")):
        pytest.skip("needs root on Linux, iproute2 and util-linux")
    end_left()
    with ExitStack() as stack:
        at = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="dp-", dir="/tmp")))  # Ray's sockets: short
        made = []
        for number in (1, 2):
            name = f"dp-{os.getpid()}-{number}"
            try:
                ip("netns", "add", name)
            except subprocess.CalledProcessError as error:
                pytest.skip(f"no network namespaces here: {error.stderr.strip()}")
            stack.callback(end, name)
            made.append(Host(name, f"10.231.7.{number}", tmp_path / name, at))
            made[-1].disk.mkdir()
        ip("link", "add", "wire", "netns", made[0].name, "type", "veth", "peer", "name", "wire", "netns", made[1].name)
        for host in made:
            ip("-n", host.name, "addr", "add", f"{host.address}/24", "dev", "wire")
            ip("-n", host.name, "link", "set", "lo", "up")
            host.wire("up")
        yield made[0], made[1]


def tiny(folder: Path, train: int = ENOUGH, seed: int = 0) -> Path:
    """Write a tiny model of two layers and its data."""
    checkpoint(folder / "model", num_hidden_layers=2, seed=seed)
    data(folder / "data", train=train)
    return folder


@contextmanager
def torchrun(two: Sequence[Host], *words: str) -> Iterator[list[subprocess.Popen[str]]]:
    """Run Python's words on both machines, as docs/scale.md says."""
    first = ["--master-addr", two[0].address, "--master-port", "29400"]
    common = ["-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", *first]
    started = [h.start(*common, "--node-rank", str(n), *words) for n, h in enumerate(two)]
    try:
        yield started
    finally:
        for process in started:
            process.kill()
            process.communicate()


def ended(started: Sequence[subprocess.Popen[str]], seconds: float = 120) -> list[tuple[int, str]]:
    """Return every program's exit code and what it said on standard error, in one line."""
    said = [process.communicate(timeout=seconds)[1] for process in started]
    return [(process.returncode, " ".join(text.split())) for process, text in zip(started, said, strict=True)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """What one process finds."""
    folder = tiny(tmp_path_factory.mktemp("alone"))
    with limited(1), pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("OMP_NUM_THREADS", "1")
        assert invoke(PRUNE) == 0
    return identity(Bundle.open(folder / "b"))


def test_two_machines_that_share_no_disk_find_what_one_process_finds(
    two: tuple[Host, Host], alone: tuple[str, str]
) -> None:
    for host in two:
        tiny(host.disk)
    with torchrun(two, "-m", "deploy_prune", *PRUNE) as started:
        for code, said in ended(started):
            assert code == 0, said
    assert identity(Bundle.open(two[0].disk / "b")) == alone
    assert sorted(p.name for p in two[1].disk.iterdir()) == ["data", "hosts", "model"], "the first one has the bundle"


def test_a_machine_that_is_cut_off_ends_the_run(two: tuple[Host, Host]) -> None:
    """Nobody closes a connection: the one that waits for the other must find out by itself."""
    for host in two:
        tiny(host.disk)
    with torchrun(two, str(WORKER), "cut-off", str(two[1].at), *PRUNE) as started:
        wait_for(two[1].disk / "middle", started)
        two[1].wire("down")
        (two[1].disk / "cut").touch()
        cut = time.monotonic()
        for number, (code, said) in enumerate(ended(started)):
            assert code == 1, "torchrun's own"
            place = f"Process {number + 1} of 2, on {two[number].name}, lost another process, or could not reach it"
            assert place in said
            assert "Run it again: what is finished is kept and used." in said
            assert "exitcode : 4" in said
        assert time.monotonic() - cut < 10 * SILENCE
    assert not (two[0].disk / "b").exists()
    assert kept_files(two[0].disk / "b") == 1, "the next run goes on from there"


def wait_for(path: Path, started: Sequence[subprocess.Popen[str]], seconds: float = 120) -> None:
    late = time.monotonic() + seconds
    while not path.exists():
        assert all(process.poll() is None for process in started), ended(started)
        assert time.monotonic() < late, f"{path.name} did not come"
        time.sleep(0.02)


def test_a_machine_that_has_not_the_same_is_told_on_the_first(tmp_path: Path) -> None:
    """One after another, in the same two processes: no model, another model, rows, flags; at last the same."""
    folders = [tmp_path / "1", tmp_path / "2"]
    cases: dict[str, dict[str, int] | None] = {"none": None, "model": {"seed": 1}, "rows": {"train": 161}, "same": {}}
    flags = {"recover_epochs": 2, "pooling": "cls", "depth_order": "after"}
    for case, changed in {**cases, **{name: {} for name in flags}}.items():
        tiny(folders[0] / case)
        (folders[1] / case).mkdir(parents=True)
        if changed is not None:
            tiny(folders[1] / case, **changed)
        for folder, device in zip(folders, ("cpu", "auto"), strict=True):
            (folder / case / "recipe.toml").write_text(f'device = "{device}"')
    for name, value in flags.items():
        (folders[1] / name / "recipe.toml").write_text(f"{name} = {json.dumps(value)}")
    names = [*list(cases)[:3], *flags, "same"]
    first, second = unwatched(str(WORKER), "each", ",".join(names), *PRUNE, "-c", "recipe.toml", folders=folders)
    assert (first.returncode, second.returncode) == (0, 0), first.stderr
    codes = [json.loads(process.stdout.splitlines()[-1]) for process in (first, second)]
    assert codes == [[2] * (len(names) - 1) + [0]] * 2
    said = " ".join(first.stderr.split())
    assert "Process 2 of 2 failed: No model folder at" in said
    assert "Process 2 of 2 has another model than the first process." in said
    assert "Process 2 of 2 has other calibration rows than the first process." in said
    for name in flags:
        assert f"Process 2 of 2 has another --{name.replace('_', '-')} than the first process." in said
    assert second.stderr.count("Error in process 2: ") == len(names) - 1
    assert [case for case in names if (folders[0] / case / "b").exists()] == ["same"]


def test_other_rows_to_recover_on_than_the_first_process_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The calibration may have drawn the same ones: each process would train on its own."""
    told = {"other rows to recover on": "the first one's"}
    monkeypatch.setattr(parallel, "agree_values", lambda values: {**values, **told})
    model, rows = tiny_model("bert"), tiny_rows(64)
    with pytest.raises(InputError, match="has other rows to recover on than the first process"):
        recover(model, model, Head("classification"), rows, Recovery(epochs=1))


@pytest.mark.parametrize("meeting", ["torchrun's", "its own"])
@pytest.mark.parametrize(("device", "interface"), [("cpu", "GLOO_SOCKET_IFNAME"), ("cuda", "NCCL_SOCKET_IFNAME")])
def test_a_process_that_never_comes_is_not_waited_for_for_hours(
    meeting: str, device: str, interface: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torchrun holds the meeting in a process of its own, where the first one finds it at once."""
    port = (held := TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)).port
    if meeting == "its own":
        del held
    alone = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    torchruns = {"TORCHELASTIC_USE_AGENT_STORE": str(meeting == "torchrun's"), "TORCHELASTIC_RESTART_COUNT": "0"}
    for name, value in {**alone, **torchruns, "MASTER_PORT": str(port)}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(parallel, "MEETING", timedelta(seconds=1))
    with (
        pytest.raises(SystemStateError, match=r"could not join the others: .*[tT]imed? ?out") as caught,
        parallel.team(torch.device(device)),
    ):
        pass
    assert interface in caught.value.hint


def test_the_network_towards_the_first_machine_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(hosts.INTERFACE, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_ADDR", "192.0.2.1")
    monkeypatch.setattr(os, "environ", os.environ.copy())  # which the choice is written into
    monkeypatch.setattr(hosts, "interface_towards", lambda host: f"towards {host}")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    hosts.choose_interface()
    assert hosts.INTERFACE not in os.environ, "one machine"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    hosts.choose_interface()
    assert os.environ[hosts.INTERFACE] == "towards 192.0.2.1"
    monkeypatch.setenv(hosts.INTERFACE, "mine")
    hosts.choose_interface()
    assert os.environ[hosts.INTERFACE] == "mine"


def test_a_loopback_leads_nowhere() -> None:
    assert hosts.interface_towards("127.0.0.1") is None
    assert hosts.interface_towards("") is None
    assert hosts.interface_towards("no-such-machine.invalid") is None


RAY = {  # Ray's own patience with a silent node, which else is about a minute
    "PYTHONUNBUFFERED": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
}
KEEPS = [0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5, 0.45]  # so many that a job's first cell is not its end
SWEEP = {"keeps": KEEPS, "seeds": [0, 1, 2, 3], "compensate": ["none"], "samples": 64}
OUTCOME = ("kept_flops", "plan_hash", "weights_hash", "quality_sliced", "agreement", "kl")


def test_a_sweep_on_two_machines_of_which_one_is_cut_off_gives_the_table_of_one(
    two: tuple[Host, Host], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The machines have the model and the data at the same paths, each on its own disk."""
    pytest.importorskip("ray", reason="the extra sweep is not installed")
    parquet = pytest.importorskip("pyarrow.parquet", reason="the extra sweep is not installed")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # which a worker sets
    first, second = two
    for host in two:
        tiny(host.disk)
    write_recipe(first.disk / "sweep.toml")
    out, address = first.disk / "out", f"{first.address}:6379"
    with ray_cluster(first, second, address):
        words = ["-m", "deploy_prune", "sweep", "-c", "sweep.toml", "--out", "out", "--address", address, "--json"]
        driver = first.start(*words, **RAY)
        try:
            while second.name not in {cell["host"] for cell in cells(out)}:
                assert driver.poll() is None, driver.communicate()
                time.sleep(0.02)
            second.wire("down")
            said, errors = driver.communicate(timeout=240)
        finally:
            driver.kill()
    assert driver.returncode == 0, errors
    assert json.loads(said)["restarts"] > 0, "it was lost in the middle"
    rows = parquet.read_table(out / "results.parquet").to_pylist()
    assert {row["host"] for row in rows} == {first.name, second.name}
    assert {row["model"] for row in rows} == {"model"}
    found = {(row["seed"], row["keep"]): {name: row[name] for name in OUTCOME} for row in rows}
    assert found == one_machines_table(first.disk)


def write_recipe(path: Path) -> None:
    entry = {"model": "./model", "data": "./data", "task": "text-classification"}
    lines = [f"{key} = {json.dumps(value)}" for key, value in SWEEP.items()]
    lines += ["[[entries]]", *(f"{key} = {json.dumps(value)}" for key, value in entry.items())]
    path.write_text("\n".join(lines))


@contextmanager
def ray_cluster(first: Host, second: Host, address: str) -> Iterator[None]:
    """Start a node with one CPU on each machine."""
    node = ["-m", "ray.scripts.scripts", "start", "--block", "--num-cpus", "1", "--temp-dir", str(first.at / "r")]
    ways = (["--head", "--port", "6379", "--include-dashboard", "false"], ["--address", address])
    nodes: list[subprocess.Popen[str]] = []
    try:
        for host, way in zip((first, second), ways, strict=True):
            nodes.append(host.start(*node, *way, "--node-ip-address", host.address, **RAY))
            assert nodes[-1].stdout is not None
            assert any("Ray runtime started" in line for line in nodes[-1].stdout), nodes[-1].communicate()[1]
        yield
    finally:
        for started in nodes:
            started.kill()
            started.communicate()


def cells(out: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text())["result"] for path in sorted(out.glob("cells/*.json"))]


def one_machines_table(folder: Path) -> dict[tuple[int, float], dict[str, Any]]:
    """Compute the cells in this process, by what a worker runs."""
    entry = {"model": str(folder / "model"), "data": str(folder / "data"), "task": "text-classification"}
    settings = SweepSettings.model_validate({**SWEEP, "entries": [entry]})
    table = {}
    for job in jobs_of(expand(settings)):
        found = {cell.number: (cell.seed, cell.keep) for cell in job.cells}
        for event in run_job(job_spec(job, settings, (), (), code_hash())):
            if event["event"] == "cell":
                table[found[event["number"]]] = {name: event["result"][name] for name in OUTCOME}
    return table
