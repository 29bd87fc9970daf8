"""Load on the server: throughput, latency, processor time against the bare runtime, mlserver beside it, soak, kills.

L=recipes/serving/load.py
python $L load shapes/bert-base/0.5 load.jsonl                # dense and sliced, 1, 4, 16 and 64 clients
python $L load shapes/bert-base/0.5 load.jsonl --mlserver mls/bin/mlserver    # mlserver, with the same file
python $L soak shapes/bert-base/0.5 soak.jsonl --minutes 10
python $L disturb shapes/bert-base/0.5 shapes/bert-base/0.7 --requests 10000  # a reload and a kill in the middle
python $L table load.jsonl
python $L edge shapes/bert-base/0.5 --precision int8          # the loader on two threads with 512 MB of memory
shapes/bert-base is made as recipes/experiments/shapes.py says; a real model's bundle, as docs/serving.md shows it:
deploy-prune prune minilm-sst2 --task sst2 --data glue/SST-2 --keep-flops 0.7 --samples 1024 --out sst2
deploy-prune export sst2 --variants dense,sliced --format onnx
python $L load sst2 load.jsonl --seconds 10 --tokens 32
The environment mls has `pip install mlserver onnxruntime`. Servers compute on one thread; the clients are this process.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import psutil
import typer
from servers import Running, mlserver, served
from tritonclient.grpc import aio as grpc_aio
from tritonclient.utils import InferenceServerException

from deploy_prune.bundle import Bundle
from deploy_prune.runtimes.base import find_artifact
from deploy_prune.serve import load as open_bundle

app = typer.Typer(help=__doc__, pretty_exceptions_enable=False)
FLOOR_ROWS = (1, 2, 4, 8, 16, 32)
RETRY_SECONDS = 0.2


@dataclass
class Tally:
    """Count what the clients saw."""

    seconds: list[float] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)
    wrong: int = 0
    versions: Counter[str] = field(default_factory=Counter)


def requests_of(feeds: dict[str, np.ndarray]) -> list[Any]:
    """Return a request's inputs as tritonclient sends them."""
    from tritonclient.grpc import InferInput
    from tritonclient.utils import np_to_triton_dtype

    inputs = []
    for name, array in feeds.items():
        tensor = InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype))
        tensor.set_data_from_numpy(array)
        inputs.append(tensor)
    return inputs


async def clients_at(server: Running, clients: int, feeds: dict[str, np.ndarray], seconds: float) -> Tally:
    """Let clients ask one request after the other for a time."""
    tally, until = Tally(), time.monotonic() + seconds
    inputs = requests_of(feeds)

    async def one() -> None:
        async with grpc_aio.InferenceServerClient(f"127.0.0.1:{server.grpc_port}") as client:
            while time.monotonic() < until:
                begun = time.perf_counter()
                try:
                    await client.infer("m", inputs)
                    tally.seconds.append(time.perf_counter() - begun)
                except InferenceServerException as error:
                    tally.errors[str(error.status())] += 1

    await asyncio.gather(*[one() for _ in range(clients)])
    return tally


def feeds_of(bundle: Path, rows: int, tokens: int) -> dict[str, np.ndarray]:
    """Return inputs of a bundle's model, the golden ones cut or repeated to the size; an image's have no tokens."""
    inputs = Bundle.open(bundle).golden()[0].inputs
    return {
        name: np.resize(array, (rows, tokens) if array.ndim == 2 else (rows, *array.shape[1:]))
        for name, array in inputs.items()
    }


@dataclass
class Floor:
    """Take the processor seconds of the bare runtime's runs by their rows, before and after each number of clients."""

    predictor: Any
    feeds: dict[int, dict[str, np.ndarray]]
    taken: dict[int, list[float]] = field(default_factory=dict)

    def take(self) -> None:
        """Forget all but the last times, and take new ones: at least two runs of each size, and half a second."""
        for rows, feeds in self.feeds.items():
            times: list[float] = []
            until = time.monotonic() + 0.5
            while len(times) < 2 or time.monotonic() < until:
                begun = time.process_time()
                self.predictor.infer(feeds)
                times.append(time.process_time() - begun)
            self.taken[rows] = [*self.taken.get(rows, [])[-1:], float(np.median(times))]

    def per_row(self, rows: float) -> float:
        """Return the mean of before and after for one row, in runs of so many rows."""
        seconds = [float(np.mean(times)) for times in self.taken.values()]
        return float(np.interp(rows, list(self.taken), seconds)) / rows


@app.command()
def load(
    bundle: Path,
    out: Path,
    clients: Annotated[str, typer.Option(help="Numbers of clients.")] = "1,4,16,64",
    variants: str = "dense,sliced",
    precision: str = "fp32",
    tokens: int = 128,
    seconds: float = 15.0,
    batch_rows: int = 8,
    mlserver_program: Annotated[Path | None, typer.Option("--mlserver", help="Its program, to measure it.")] = None,
) -> None:
    """Append a line of JSON per server, variant and number of clients."""
    feeds = feeds_of(bundle, 1, tokens)
    for variant in variants.split(","):
        if mlserver_program is None:
            flags = ("--variant", variant, "--precision", precision, "--batch-rows", str(batch_rows))
            making: Any = served(bundle, *flags)
        else:
            opened = Bundle.open(bundle)
            artifact = find_artifact(opened, variant, "onnx", precision)  # type: ignore[arg-type]
            making = mlserver(mlserver_program, opened.path(artifact.path), batch_rows)
        opening = open_bundle(bundle, variant=variant, precision=precision, threads=1)  # type: ignore[arg-type]
        with making as server, opening as predictor:
            floor = Floor(
                predictor, {rows: feeds_of(bundle, rows, tokens) for rows in FLOOR_ROWS if rows <= batch_rows}
            )
            asyncio.run(clients_at(server, 2, feeds, 2.0))  # warm
            floor.take()
            for count in map(int, clients.split(",")):
                ours = mlserver_program is None
                before, own, runs = server.cpu_seconds(), time.process_time(), server.counts() if ours else (0.0, 0.0)
                begun = time.monotonic()
                tally = asyncio.run(clients_at(server, count, feeds, seconds))
                wall = time.monotonic() - begun
                used, own = server.cpu_seconds() - before, time.process_time() - own
                floor.take()
                answered = len(tally.seconds)
                after = server.counts() if ours else (0.0, 0.0)
                rows = (after[1] - runs[1]) / max(after[0] - runs[0], 1) if ours else None
                entry = {
                    "server": "deploy-prune" if ours else "mlserver",
                    "bundle": str(bundle),
                    "variant": variant,
                    "precision": precision,
                    "tokens": tokens,
                    "clients": count,
                    "answered": answered,
                    "errors": dict(tally.errors),
                    "per_second": answered / wall,
                    "p50_ms": 1e3 * float(np.percentile(tally.seconds, 50)),
                    "p99_ms": 1e3 * float(np.percentile(tally.seconds, 99)),
                    "rows_per_run": rows,
                    "server_cpu_ms": 1e3 * used / answered,
                    "client_cpu_ms": 1e3 * own / answered,
                    "floor_cpu_ms": 1e3 * floor.per_row(rows or 1.0),
                    "load_average": psutil.getloadavg()[0],
                }
                append(out, entry)


@app.command()
def soak(bundle: Path, out: Path, minutes: float = 10.0, clients: int = 4, tokens: int = 128) -> None:
    """Ask without a pause; append the memory that the server holds, twenty times."""
    feeds = feeds_of(bundle, 1, tokens)
    with served(bundle) as server:
        asyncio.run(clients_at(server, clients, feeds, 2.0))
        for _ in range(20):
            tally = asyncio.run(clients_at(server, clients, feeds, 60 * minutes / 20))
            entry = {"answered": len(tally.seconds), "errors": dict(tally.errors), "bytes": server.resident_bytes()}
            append(out, entry)


@app.command()
def disturb(first: Path, second: Path, requests: int = 10_000, clients: int = 8, tokens: int = 16) -> None:
    """Ask many times while a second version is loaded and, later, the server is killed and started anew.

    Every answer is compared with that of the version that gave it; exit 1 where one is wrong or was lost unsaid.
    """
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "m"
        shutil.copytree(first, root / "1")
        feeds = feeds_of(first, 1, tokens)
        wanted = {}
        for number, bundle in (("1", first), ("2", second)):
            with open_bundle(bundle, threads=1) as predictor:
                wanted[number] = predictor.infer(feeds)
        tally = asyncio.run(_disturbed(root, second, feeds, wanted, requests, clients))
    said = {"answered": len(tally.seconds), "by_version": dict(tally.versions), "wrong": tally.wrong}
    print(json.dumps(said | {"errors": dict(tally.errors)}))
    if tally.wrong or len(tally.seconds) + sum(tally.errors.values()) != requests or set(tally.versions) != set(wanted):
        raise SystemExit(1)


async def _disturbed(
    root: Path,
    second: Path,
    feeds: dict[str, np.ndarray],
    wanted: dict[str, dict[str, np.ndarray]],
    requests: int,
    clients: int,
) -> Tally:
    tally, inputs = Tally(), requests_of(feeds)
    begun = 0
    making = served(root)
    server = making.__enter__()
    where = f"127.0.0.1:{server.grpc_port}"

    async def one() -> None:
        nonlocal begun
        client = grpc_aio.InferenceServerClient(where)
        while begun < requests:
            begun += 1
            started = time.perf_counter()
            try:
                found = await client.infer("m", inputs, client_timeout=30)
            except InferenceServerException as error:
                tally.errors[str(error.status())] += 1
                await client.close()
                await asyncio.sleep(RETRY_SECONDS)
                client = grpc_aio.InferenceServerClient(where)
                continue
            version = found.get_response().model_version
            tally.versions[version] += 1
            right = all(np.allclose(found.as_numpy(n), a, atol=1e-4) for n, a in wanted[version].items())
            tally.wrong += not right
            tally.seconds.append(time.perf_counter() - started)
        await client.close()

    async def trouble() -> None:
        nonlocal server, making, where
        while begun < requests // 3:
            await asyncio.sleep(0.01)
        await asyncio.to_thread(shutil.copytree, second, root / "2")
        url = f"http://127.0.0.1:{server.port}/v2/repository/models/m/load"
        await asyncio.to_thread(urllib.request.urlopen, urllib.request.Request(url, b"{}"))
        while begun < 2 * requests // 3:
            await asyncio.sleep(0.01)
        server.process.kill()
        server.process.communicate()
        making = served(root)
        server = await asyncio.to_thread(making.__enter__)
        where = f"127.0.0.1:{server.grpc_port}"

    try:
        await asyncio.gather(trouble(), *[one() for _ in range(clients)])
    finally:
        making.__exit__(None, None, None)
    return tally


EDGE = """
import json, resource, sys, time
limit = int(sys.argv[1]) << 20
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
import numpy as np
from deploy_prune.serve import load
root, variant, precision, feeds = sys.argv[2], sys.argv[3], sys.argv[4], dict(np.load(sys.argv[5]))
with load(root, variant=variant, precision=precision, threads=2) as predictor:
    times = []
    for _ in range(20):
        begun = time.perf_counter()
        predictor.infer(feeds)
        times.append(1e3 * (time.perf_counter() - begun))
(line,) = [x for x in open("/proc/self/status") if x.startswith("VmHWM")]  # getrusage counts what forked this process
peak = int(line.split()[1]) / 1024
print(json.dumps({"peak_mib": round(peak, 1), "median_ms": sorted(times)[10], "modules": len(sys.modules)}))
"""


@app.command()
def edge(
    bundle: Path, variant: str = "sliced", precision: str = "fp32", rows: int = 1, tokens: int = 128, mib: int = 512
) -> None:
    """Run the loader in a process that may hold so many MiB; exit 1 where it does not fit."""
    with tempfile.TemporaryDirectory() as folder:
        feeds = Path(folder) / "feeds.npz"
        np.savez(feeds, **feeds_of(bundle, rows, tokens))
        command = [sys.executable, "-c", EDGE, str(mib), str(bundle), variant, precision, str(feeds)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    print(done.stdout or f"It does not fit into {mib} MiB: {done.stderr.strip().splitlines()[-1]}", end="")
    if done.returncode or json.loads(done.stdout)["peak_mib"] > mib:
        raise SystemExit(1)


@app.command()
def table(path: Path) -> None:
    """Print the lines of `load` as Markdown."""
    heads = (
        "server | bundle | model | clients | requests/s | p50 ms | p99 ms | rows a run | CPU ms | bare CPU ms | more"
    )
    print(f"| {heads} |\n|{'---|' * len(heads.split(' | '))}")
    for e in map(json.loads, path.read_text().splitlines()):
        rows = "-" if e["rows_per_run"] is None else f"{e['rows_per_run']:.1f}"
        more = f"{100 * (e['server_cpu_ms'] / e['floor_cpu_ms'] - 1):+.1f} %"
        cells = [e["server"], e["bundle"], f"{e['variant']} {e['precision']}", e["clients"], f"{e['per_second']:.1f}"]
        cells += [f"{e['p50_ms']:.1f}", f"{e['p99_ms']:.1f}", rows]
        cells += [f"{e['server_cpu_ms']:.2f}", f"{e['floor_cpu_ms']:.2f}", more]
        print(f"| {' | '.join(map(str, cells))} |")


def append(path: Path, entry: dict[str, Any]) -> None:
    """Append a line of JSON, and print it."""
    print(json.dumps(entry))
    with path.open("a") as file:
        file.write(json.dumps(entry) + "\n")


if __name__ == "__main__":
    app()
