"""Draw a report's figures by plotly: data and layout; the page's style sheet gives the colours of text. No torch."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import MissingExtraError

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

QUANTILES = np.linspace(0, 1, 101)
# Middle tones, readable on a light and on a dark ground.
COLOURS = {"dense": "#7b8794", "virtual": "#a36bd6", "sliced": "#1f9270"}
COLOURS |= {"sliced:fp16": "#3b82d6", "sliced:bf16": "#38a3b8", "sliced:int8": "#dd7a2b"}
OTHERS = ("#3b82d6", "#dd7a2b", "#1f9270", "#a36bd6", "#c2547d", "#8a8f2a")
UNITS = {"heads": "#3b82d6", "neurons": "#dd7a2b", "channels": "#1f9270"}


def kept_units(layers: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw for each layer what share of each kind of unit stays; `layers` as {"layer", kind: {"kept", "total"}}."""
    kinds = list(dict.fromkeys(kind for layer in layers for kind in layer if kind != "layer"))
    traces: list[dict[str, Any]] = []
    for kind in kinds:
        rows = [(layer["layer"], layer[kind]) for layer in layers if kind in layer]
        traces.append(
            {
                "type": "bar",
                "orientation": "h",
                "name": kind,
                "y": [name for name, _ in rows],
                "x": [100 * bar["kept"] / bar["total"] for _, bar in rows],
                "customdata": [[bar["kept"], bar["total"]] for _, bar in rows],
                "hovertemplate": f"%{{y}}: %{{customdata[0]}} of %{{customdata[1]}} {kind}<extra></extra>",
                "marker": {"color": UNITS.get(kind, OTHERS[len(traces) % len(OTHERS)])},
            }
        )
    axes = {"xaxis": {"title": "% kept", "range": [0, 101]}, "yaxis": {"autorange": "reversed", "type": "category"}}
    return _figure(traces, axes | {"bargap": 0.25}, height=90 + 18 * len(kinds) * len(layers))


def time_shares(runs_ms: Mapping[str, np.ndarray]) -> Figure:
    """Draw for each model what share of its runs took at most how many ms: medians and tails are read off."""
    traces = [
        {
            "type": "scatter",
            "mode": "lines",
            "name": model,
            "x": np.quantile(ms, QUANTILES).round(5).tolist(),
            "y": (100 * QUANTILES).round().tolist(),
            "hovertemplate": f"{html.escape(model)}: %{{y}} % of the runs within %{{x:.3~f}} ms<extra></extra>",
            "line": {"color": colour},
        }
        for (model, ms), colour in zip(runs_ms.items(), _colours(runs_ms), strict=True)
    ]
    return _figure(
        traces, {"xaxis": {"title": "ms"}, "yaxis": {"title": "% of the runs", "range": [0, 101]}}, height=280
    )


def ratios(measurements: Sequence[Mapping[str, Any]]) -> Figure | None:
    """Draw each model's latency against the baseline's with its interval, a row a cell; None without a ratio."""
    shown = [m for m in measurements if m["difference"] is not None]
    models = dict.fromkeys(m["model"] for m in shown)
    traces = []
    for model, colour in zip(models, _colours(models), strict=True):
        own = [m for m in shown if m["model"] == model]
        value = [m["ratio"]["value"] for m in own]
        traces.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": model,
                "y": [_place(m) for m in own],
                "x": value,
                "error_x": {
                    "type": "data",
                    "symmetric": False,
                    "array": [m["ratio"]["high"] - v for m, v in zip(own, value, strict=True)],
                    "arrayminus": [v - m["ratio"]["low"] for m, v in zip(own, value, strict=True)],
                },
                "customdata": [[m["ratio"]["low"], m["ratio"]["high"], m["difference"]] for m in own],
                "hovertemplate": f"{html.escape(model)}, %{{y}}: %{{x:.3f}} times (%{{customdata[0]:.3f}} to "
                "%{customdata[1]:.3f}), difference: %{customdata[2]}<extra></extra>",
                "marker": {"color": colour, "size": 9},
            }
        )
    if not traces:
        return None
    rows = len({_place(m) for m in shown})
    layout = {
        "xaxis": {"title": "latency, times the baseline's", "rangemode": "tozero"},
        "yaxis": {"autorange": "reversed", "type": "category"},
        "shapes": [_line(x0=1, x1=1, y0=0, y1=1, yref="paper")],
        "scattermode": "group",
    }
    return _figure(traces, layout, height=130 + max(28, 14 * len(models)) * rows)


def flops_against_latency(measurements: Sequence[Mapping[str, Any]]) -> Figure | None:
    """Draw the ratio of latency over that of FLOPs, with the line where both are equal; None where none is known."""
    base = {_place(m): m["flops"] for m in measurements if m["model"] == m["baseline"] and m.get("flops")}
    shown = [m for m in measurements if m["difference"] is not None and m.get("flops") and _place(m) in base]
    models = dict.fromkeys(m["model"] for m in shown)
    traces = []
    for model, colour in zip(models, _colours(models), strict=True):
        own = [m for m in shown if m["model"] == model]
        traces.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": model,
                "x": [m["flops"] / base[_place(m)] for m in own],
                "y": [m["ratio"]["value"] for m in own],
                "text": [_place(m) for m in own],
                "hovertemplate": f"{html.escape(model)}, %{{text}}: %{{y:.3f}} of the latency for %{{x:.3f}} of the "
                "FLOPs<extra></extra>",
                "marker": {"color": colour, "size": 9, "opacity": 0.85},
            }
        )
    if not traces:
        return None
    end = 1.1 * max(1.0, *(x for trace in traces for x in trace["x"]))
    layout = {
        "xaxis": {"title": "FLOPs, times the baseline's", "range": [0, end]},
        "yaxis": {"title": "latency, times the baseline's", "rangemode": "tozero"},
        "shapes": [_line(x0=0, x1=end, y0=0, y1=end)],
    }
    return _figure(traces, layout, height=380)


def front(points: Sequence[Mapping[str, Any]], cost: str, quality: str) -> Figure:
    """Draw quality over cost: a colour for each model pruned in one way, and a line through the points on the front.

    `points` as {"model", "method", "keep" (None: dense), "cost", "quality", "half" (None: no interval), "front"}.
    """
    best = [p for p in points if p["front"]]
    traces: list[dict[str, Any]] = [
        {
            "type": "scatter",
            "mode": "lines",
            "name": "front",
            "x": [p["cost"] for p in best],
            "y": [p["quality"] for p in best],
            "line": {"color": COLOURS["dense"], "dash": "dot", "shape": "hv"},
            "hoverinfo": "skip",
        }
    ]
    names = list(dict.fromkeys((p["model"], p["method"]) for p in points))
    for name, colour in zip(names, _colours(f"{model}, {method}" for model, method in names), strict=True):
        own = [p for p in points if (p["model"], p["method"]) == name]
        label = ", ".join(name)
        traces.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": label,
                "x": [p["cost"] for p in own],
                "y": [p["quality"] for p in own],
                "error_y": {"type": "data", "array": [p["half"] or 0.0 for p in own]},
                "customdata": [["all" if p["keep"] is None else f"{p['keep']:g}", p["half"] or 0.0] for p in own],
                "hovertemplate": f"{html.escape(label)}, keep %{{customdata[0]}}: %{{y:.4f}} ± %{{customdata[1]:.4f}} "
                "at %{x:.4~s}<extra></extra>",
                "marker": {"color": colour, "size": 9, "symbol": "diamond" if own[0]["keep"] is None else "circle"},
            }
        )
    layout = {"xaxis": {"title": cost, "rangemode": "tozero"}, "yaxis": {"title": quality}}
    return _figure(traces, layout, height=420)


def as_html(figure: Figure, name: str) -> str:
    """Return a figure as a piece of a page that holds `script()` before it."""
    from plotly.io import to_html

    config = {"responsive": True, "displayModeBar": False}
    return str(to_html(figure, config=config, include_plotlyjs=False, full_html=False, div_id=name))


def script() -> str:
    """Return the plotting library that the figures need, to be put into a page once."""
    from plotly.offline import get_plotlyjs

    return str(get_plotlyjs())


def _figure(traces: Sequence[Mapping[str, Any]], layout: Mapping[str, Any], height: int) -> Figure:
    try:
        from plotly.graph_objects import Figure
    except ImportError as error:
        raise MissingExtraError("plotly", "cpu") from error
    axis = {"automargin": True, "fixedrange": True, "gridcolor": "#888", "zeroline": False}
    whole: dict[str, Any] = {
        "template": "none",
        "height": height,
        "margin": {"l": 10, "r": 10, "t": 10, "b": 10},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": "system-ui, sans-serif", "size": 13},
        "showlegend": True,
        "legend": {"orientation": "h", "x": 0, "y": 1, "yanchor": "bottom"},
        **layout,
    }
    for name in ("xaxis", "yaxis"):
        whole[name] = axis | dict(layout.get(name, {}))
        if isinstance(whole[name].get("title"), str):
            whole[name]["title"] = {"text": whole[name]["title"], "font": {"size": 13}}
    return Figure(data=list(traces), layout=whole)


def _line(**ends: Any) -> dict[str, Any]:
    return {"type": "line", "line": {"color": "#888", "width": 1, "dash": "dot"}, "layer": "below", **ends}


def _place(m: Mapping[str, Any]) -> str:
    shape = f"{m['batch']} x {m['seq']}" if m["seq"] > 1 else f"batch {m['batch']}"  # convolutions have no tokens
    return f"{m['runtime']}, {shape}, {m['threads']} thr."


def _colours(models: Iterable[str]) -> list[str]:
    return [COLOURS.get(model) or OTHERS[i % len(OTHERS)] for i, model in enumerate(models)]
