"""What a person sees: progress bars, the closing table, and errors on one screen."""

from __future__ import annotations

import json
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from .bundle import Artifact
from .errors import DeployPruneError
from .latency_table import AnyLatency, ChannelLatency, LatencyTables
from .progress import Progress as ShareDone

out = Console()
err = Console(stderr=True)
documents = 0  # of JSON that this command has printed


class Bars:
    """Draw one bar per stage on standard error."""

    def __init__(self) -> None:
        self.progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description:<12}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeElapsedColumn(),
            console=err,
        )

    def __enter__(self) -> Bars:
        self.progress.start()
        return self

    def __exit__(self, *exc: object) -> None:
        for task in self.progress.tasks:  # above an error, a bar that nothing was done of says nothing
            if exc[0] is not None and not task.completed:
                self.progress.update(task.id, visible=False)
        self.progress.stop()

    @contextmanager
    def stage(self, name: str) -> Iterator[ShareDone]:
        task = self.progress.add_task(name, total=1.0)
        yield lambda share: self.progress.update(task, completed=share)
        self.progress.update(task, completed=1.0)
        self.progress.stop_task(task)

    def note(self, text: str) -> None:
        self.progress.console.print(escape(text))


def print_artifact(artifact: Artifact, *, quality: bool = True) -> None:
    """Print one line: the file, its parity, and what its precision cost when it was exported."""
    parity = artifact.parity
    line = f"{artifact.path}  parity {parity.status}"
    if parity.max_abs is not None:
        line += f", max abs {parity.max_abs:.1e}"
    if parity.reason:
        line += f": {parity.reason}"
    if quality and (text := artifact.quality_text()):
        line += f"; {text}"
    out.print(line, highlight=False, soft_wrap=True, markup=False)


def print_json(value: Any) -> None:
    """Print one JSON document to standard output."""
    global documents
    documents += 1
    print(json.dumps(value, indent=2, default=str))


def print_error(error: DeployPruneError, as_json: bool, who: str = "") -> None:
    """Print what is wrong and how to mend it; `who` names one of several processes.

    As JSON too, unless a result was: of one command, standard output holds one document.
    """
    if as_json and not documents:
        print_json({"error": type(error).__name__, "message": error.message, "hint": error.hint})
    lines = [f"[bold red]Error{who}:[/] {escape(error.message)}"]
    if error.hint:
        lines.append(f"  {escape(error.hint)}")
    err.print("\n".join(lines), highlight=False)


def print_internal_error(error: BaseException) -> None:
    """Print one line and leave the traceback in a file."""
    with tempfile.NamedTemporaryFile("w", prefix="deploy-prune-", suffix=".traceback", delete=False) as file:
        file.write("".join(traceback.format_exception(error)))
    err.print(
        f"[bold red]Internal error:[/] {escape(f'{type(error).__name__}: {error}')[:300]}"
        f" - please report it with {file.name}",
        highlight=False,
    )


def print_latency_table(table: AnyLatency) -> None:
    """Print what was measured: one layer's attention and FFN at every count, or whole networks cut to channels."""
    if isinstance(table, ChannelLatency):
        _print_channel_latency(table)
        return
    if isinstance(table, LatencyTables):
        for one in table.tables:
            print_latency_table(one)
        return
    where = f"{table.runtime}, batch {table.batch}, {table.seq} tokens: dense {table.dense_ms:.2f} ms"
    grid = Table(title=f"{where}, of which {table.base_ms:.2f} ms cannot be cut", title_justify="left")
    for name in ("per layer", "kept", "ms", "95% interval", "share of the full one"):
        grid.add_column(name, justify="left" if name == "per layer" else "right")
    for kind, costs in table.kinds.items():
        for count, ms, low, high in zip(costs.counts, costs.ms, costs.low_ms, costs.high_ms, strict=True):
            share = f"{100 * ms / costs.ms[-1]:.0f}%" if costs.ms[-1] else "-"
            grid.add_row(f"{kind}s", str(count), f"{ms:.3f}", f"{low:.3f} to {high:.3f}", share)
    out.print(grid)


def _print_channel_latency(table: ChannelLatency) -> None:
    where = f"{table.runtime}, batch {table.batch}: dense {table.dense_ms:.3f} ms"
    grid = Table(title=f"{where}, of which {table.base_ms:.3f} ms cannot be cut", title_justify="left")
    for name in ("FLOPs kept", "ms", "by the table"):
        grid.add_column(name, justify="right")
    for point in sorted(table.points, key=lambda p: -p.flops):
        grid.add_row(f"{100 * point.flops:.1f}%", f"{point.ms:.3f}", f"{point.fitted_ms:.3f}")
    out.print(grid)
    out.print(f"Held-out networks: {table.mean_error:.1%} off in the mean, {table.largest_error:.1%} at most.")


def print_summary(rows: Sequence[dict[str, Any]], where: str, part: str = "encoder") -> None:
    """Print the closing table: dense, virtual and sliced side by side, one measurement a line."""
    table = Table(title=f"{where}", title_justify="left")
    table.add_column("")
    for row in rows:
        table.add_column(row["variant"], justify="right")

    def line(name: str, values: Sequence[str]) -> None:
        if any(v != "-" for v in values):
            table.add_row(name, *values)

    line("FLOPs", [_flops(r["flops"]) for r in rows])
    line(f"{part} FLOPs kept", ["-" if r["keep_flops"] is None else f"{100 * r['keep_flops']:.1f}%" for r in rows])
    line("parameters", [_scaled(r["params"], 1e6, "M") for r in rows])
    line("weights", [_scaled(r["weight_bytes"], 1e6, "MB") for r in rows])
    names = list(dict.fromkeys((s["runtime"], s["batch"], s["seq"]) for r in rows for s in r["runtimes"]))
    for runtime, batch, seq in names:
        speeds = [next((s for s in r["runtimes"] if s["runtime"] == runtime), None) for r in rows]
        where = f"{runtime} {batch}x{seq}" if seq > 1 else f"{runtime}, batch {batch}"
        line(f"{where} latency", [f"{s['median_ms']:.2f} ms" if s else "-" for s in speeds])
        line("  ratio to dense", [_ratio(s["ratio"]) if s else "-" for s in speeds])
        line("  peak memory", [_scaled(s["peak_rss_bytes"], 1e6, "MB") if s else "-" for s in speeds])
    metric = next((r["metric"] for r in rows if r["metric"]), None)
    line(f"{metric} (n={rows[0]['n']})", ["-" if r["value"] is None else f"{r['value']:.4f}" for r in rows])
    for name, key, digits in (
        ("agreement with dense", "agreement", 4),
        ("KL to dense, nats", "kl", 5),
        ("RMSE to dense", "rmse", 4),
        ("cosine to dense", "cosine", 4),
    ):
        line(name, ["-" if r[key] is None else f"{r[key]:.{digits}f}" for r in rows])
    out.print(table)


def _ratio(ratio: dict[str, Any] | None) -> str:
    if ratio is None:
        return "-"
    if ratio.get("low") is None:
        return f"{ratio['value']:.2f}"
    return f"{ratio['value']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}]"


def _scaled(value: float | None, unit: float, name: str) -> str:
    return "-" if value is None else f"{value / unit:,.1f} {name}"


def _flops(value: float | None) -> str:
    if value is None:
        return "-"
    return _scaled(value, 1e9, "G") if value >= 1e10 else f"{value / 1e6:,.2f} M"


def print_bench(result: dict[str, Any]) -> None:
    """Print one table a cell: each model's latency, its process's peak memory, and its ratio to the baseline."""
    from .runtime_bench.results import place_title, sensed_line

    noise = {place_title(n): n for n in result["noise"]}
    cells: dict[str, list[dict[str, Any]]] = {}
    for m in result["measurements"]:
        cells.setdefault(place_title(m), []).append(m)
    for where, lines in cells.items():
        table = Table(title=f"{where} ({lines[0]['provider']})", title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
        longest = max(len(m["model"]) for m in lines)
        table.add_column("model", overflow="fold", min_width=min(longest, 16))
        for name in ("ms", "p95", "rows/s", "MB", "ratio", ""):
            table.add_column(name, justify="right" if name else "left", no_wrap=True)
        for m in lines:
            table.add_row(
                m["model"],
                *(f"{m['latency_ms'][key]:.2f}" for key in ("median", "p95")),
                f"{m['rows_per_second']:.1f}",
                f"{m['peak_rss_bytes'] / 1e6:.0f}",
                "1" if m["model"] == result["baseline"] else _ratio(m["ratio"]),
                {"none": "no difference", None: ""}.get(m["difference"], m["difference"]),
            )
        out.print(table)
        for m in lines:
            if said := sensed_line(m):
                out.print(f"{m['model']}: {said}", highlight=False)
            for name, found in (m.get("scenarios") or {}).items():
                ms = found["latency_ms"]
                said = f"{m['model']}, {name}: {found['samples_per_second']:.1f} runs/s, median {ms['p50']:.2f} ms,"
                said += f" p99 {ms['p99']:.2f} ms"
                if name == "server":
                    said += f", limit {found['limit_ms']:.2f} ms {'kept' if found['limit_kept'] else 'broken'}"
                out.print(said, highlight=False)
        if (floor := noise[where]["floor"]) is not None:
            said = f"ratio to {result['baseline']}; two processes of the same model differ by up to {100 * floor:.1f}%"
            out.print(said, "", sep="\n", highlight=False)
