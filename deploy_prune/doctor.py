"""What `doctor` finds on this machine: versions, runtimes, providers, conflicts, GPUs."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
from typing import Any

import psutil
from rich.table import Table

from . import __version__
from .screen import out

PACKAGES = (
    "torch",
    "transformers",
    "datasets",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "onnxruntime-gpu",
    "openvino",
    "nncf",
    "tensorrt",
    "tensorrt-rtx",
    "optimum",
    "optimum-onnx",
    "tokenizers",
    "numpy",
    "scipy",
)


def examine() -> dict[str, Any]:
    """Return versions, runtimes with their providers, conflicts (each with its remedy), and GPUs."""
    versions = {name: _version(name) for name in PACKAGES}
    return {
        "deploy_prune": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_cores": psutil.cpu_count(logical=False),
        "memory_bytes": psutil.virtual_memory().total,
        "versions": versions,
        "onnxruntime_providers": _providers(),
        "gpus": _gpus(),
        "conflicts": _conflicts(versions),
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _providers() -> list[str]:
    if importlib.util.find_spec("onnxruntime") is None:
        return []
    import onnxruntime

    return list(onnxruntime.get_available_providers())


def _gpus() -> list[dict[str, Any]]:
    if importlib.util.find_spec("torch") is None:
        return []
    import torch

    found = []
    for index in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(index)
        found.append({"name": p.name, "memory_bytes": p.total_memory, "compute_capability": f"{p.major}.{p.minor}"})
    return found


def _conflicts(versions: dict[str, str | None]) -> list[str]:
    found = []
    if versions["onnxruntime"] and versions["onnxruntime-gpu"]:
        found.append(
            "onnxruntime and onnxruntime-gpu are both installed and overwrite each other: uninstall both,"
            " then install one."
        )
    if versions["onnxruntime-gpu"] and not _gpus():
        found.append(
            "onnxruntime-gpu is installed, but no CUDA device is visible: it would run on the CPU without"
            " saying so. Here deploy-prune refuses its GPU providers; install onnxruntime instead."
        )
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        found.append("CUDA_VISIBLE_DEVICES is set to nothing: no GPU can be seen.")
    return found


def print_findings(findings: dict[str, Any]) -> None:
    """Print what `examine` found."""
    table = Table(title=f"deploy-prune {findings['deploy_prune']}", title_justify="left")
    table.add_column("what")
    table.add_column("found")
    table.add_row("python", f"{findings['python']} on {findings['platform']}")
    table.add_row("CPU cores", str(findings["cpu_cores"]))
    table.add_row("memory", f"{findings['memory_bytes'] / 2**30:.1f} GiB")
    for name, version in findings["versions"].items():
        table.add_row(name, version or "[dim]not installed[/]")
    table.add_row("ONNX Runtime providers", ", ".join(findings["onnxruntime_providers"]) or "none")
    gpus = [f"{g['name']} ({g['memory_bytes'] / 2**30:.0f} GiB, {g['compute_capability']})" for g in findings["gpus"]]
    table.add_row("GPUs", ", ".join(gpus) or "none")
    out.print(table)
    for conflict in findings["conflicts"]:
        out.print(f"[bold red]Conflict:[/] {conflict}")
    if not findings["conflicts"]:
        out.print("No conflicts.")
