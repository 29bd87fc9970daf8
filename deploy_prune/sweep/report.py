"""Tell what a sweep found, as Markdown and as a page with its fronts. No torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from ..runtime_bench import figures
from .results import BY, Mean, Sweep

SHOWN = {  # columns of the tables: title, digits
    "quality_sliced": ("quality", 4),
    "quality_loss": ("lost", 4),
    "agreement": ("agreement", 4),
    "kl": ("KL", 5),
    "rmse": ("RMSE", 4),
    "cosine": ("cosine", 4),
    "kept_flops": ("FLOPs kept", 3),
    "kept_params": ("parameters kept", 3),
    "ratio": ("latency, times dense", 3),
    "latency_ms": ("ms", 3),
}


def lines_of(sweep: Sweep) -> list[list[str]]:
    """Return the table of means: a head, then one line for all seeds of a cell; what was not measured has no column."""
    keys = [k for k in BY if any(e[k] is not None for e in sweep.summary)]
    means = [m for m in SHOWN if any(e[m] is not None for e in sweep.summary)]
    on_front = {
        (p.model, f.task, p.keep, p.method, f.where) for f in sweep.fronts for p in f.points if p.front and p.keep
    }
    lines = [[*keys, "runs", "front", *(SHOWN[m][0] for m in means)]]
    for e in sweep.summary:
        where = "" if e["runtime"] is None else f"{e['runtime']} on {e['bench_on']}"
        at = (e["model"], e["task"], e["keep"], f"{e['criterion']}, {e['compensate']}", where)
        keyed = [f"{e[k]:g}" if isinstance(e[k], float) else str(e[k] or "-") for k in keys]
        runs = f"{e['runs']}" + (f" ({e['failed']} failed)" if e["failed"] else "")
        lines.append([*keyed, runs, "yes" if at in on_front else "", *(_shown(e[m], SHOWN[m][1]) for m in means)])
    return lines


def _shown(mean: Mean | None, digits: int) -> str:
    if mean is None:
        return "-"
    return f"{mean[0]:.{digits}f}" + (f" ± {mean[1]:.{digits}f}" if mean[1] is not None else "")


def dense_lines(sweep: Sweep) -> list[str]:
    """Say what each dense model reaches."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in sweep.rows:
        if row["status"] == "done" and row["quality_dense"] is not None:
            found.setdefault((row["model"], row["task"]), row)
    return [f"{m}, {t}: dense {row['metric']} {row['quality_dense']:.4f}" for (m, t), row in found.items()]


def account_line(account: dict[str, Any]) -> str:
    """Say what the sweep took, and how much of it beyond the cells."""
    done = account["cells"] - account["reused"]
    said = f"{account['cells']} cells, {account['reused']} of them kept from before"
    if account["restarts"]:
        said += f", {account['restarts']} worker(s) lost and replaced"
    if account["overhead"] is not None:
        said += (
            f"; {done} computed in {account['wall_seconds']:.1f} s by {account['workers']} worker(s): their cells took"
            f" {account['cell_seconds']:.1f} s together, overhead {100 * account['overhead']:.1f}%"
        )
    return said + "."


def failures(sweep: Sweep) -> list[str]:
    """Name each failed row with its reason."""
    names = (*BY[:5], "seed", *BY[5:])
    return [f"{', '.join(str(r[n]) for n in names if r[n] is not None)}: {r['reason']}" for r in sweep.failed]


INTERVALS = "Means over seeds, ± the half width of Student's 95% t-interval; a single run has none."


def as_markdown(sweep: Sweep) -> str:
    """Return the table of means, what failed, and what it took."""
    head, *lines = lines_of(sweep)
    text = [f"# Sweep: {account_line(sweep.account)}", "", *(f"- {line}" for line in dense_lines(sweep)), "", INTERVALS]
    text += ["", _row(head), "|" + "---|" * len(head), *map(_row, lines)]
    if found := failures(sweep):
        text += ["", "Failed:", "", *(f"- {line}" for line in found)]
    return "\n".join(text) + "\n"


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def as_html(sweep: Sweep) -> str:
    """Return the report as one self-contained page."""
    folders = [Path(__file__).parent, Path(figures.__file__).parent]
    environment = Environment(
        loader=FileSystemLoader(folders),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    drawn = []
    for number, front in enumerate(sweep.fronts):
        figure = figures.front([vars(point) for point in front.points], COSTS[front.cost], front.quality)
        title = ", ".join(filter(None, [front.task, front.where]))
        drawn.append({"title": title, "figure": Markup(figures.as_html(figure, f"front-{number}"))})  # nosec B704
    head, *lines = lines_of(sweep)
    return environment.get_template("sweep.html.j2").render(
        account=account_line(sweep.account),
        dense=dense_lines(sweep),
        intervals=INTERVALS,
        head=head,
        lines=lines,
        failures=failures(sweep),
        fronts=drawn,
        plotly=Markup(figures.script()) if drawn else "",  # nosec B704
    )


COSTS = {"flops": "FLOPs of what can be cut", "latency_ms": "ms"}
