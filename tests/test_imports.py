"""Hold the direction of the imports, as docs/architecture.md draws it, and keep some modules free of torch."""

from __future__ import annotations

import ast
import graphlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {
    "deploy_prune": "deploy_prune",
    "export": "deploy_prune.export",
    "runtime_bench": "deploy_prune.runtime_bench",
}

# A room may import rooms of its own line and of the lines above it, never of a line below.
LAYERS = [
    "errors disk hosts parallel documents signing units progress moments image_settings lengths",
    "latency_table images npz bounds",
    "archs costs heads signature tasks bundle config masking modeling_sliced batches fidelity",
    "given_masks archives snippets publishing",
    "channel_costs channel_masking patches graph_runner",
    "offload calibration channel_calibration predict layerwise teacher layer_calibration",
    "criteria",
    "search rearrange compensate",
    "slicing channel_slicing surgery module_checkpoint renaming checkpoint",
    "depth",
    "stages runtimes finetune distil recover resume kept",
    "model_runs pruner channel_pruner serve",
    "export runtime_bench demo demo_text demo_digits",
    "variants golden evaluate resolving",
    "late recording",
    "finishing",
    "pipeline measuring",
    "probing experiments",
    "sweep tune",
    "api screen inspection doctor flags server cli_export cli_gate cli_lab cli_serve cli_sign cli_sweep cli_tune cli",
]
RANK = {room: rank for rank, layer in enumerate(LAYERS) for room in layer.split()}
# export and runtime_bench never import each other; only the probe compiles what it measures.
STRANGERS = {"export": "runtime_bench", "runtime_bench": "export"}
MAY_MEET = {"runtime_bench.probe"}

TORCH_FREE = [
    *("deploy_prune", "deploy_prune.errors", "deploy_prune.units", "deploy_prune.bundle", "deploy_prune.config"),
    *("deploy_prune.disk", "deploy_prune.publishing"),
    *("deploy_prune.cli", "deploy_prune.demo", "deploy_prune.demo_text", "deploy_prune.demo_digits"),
    *("deploy_prune.runtimes", "deploy_prune.runtimes.base"),
    *("deploy_prune.runtimes.ort", "deploy_prune.serve", "deploy_prune.runtime_bench"),
    *("deploy_prune.images", "deploy_prune.image_settings", "deploy_prune.documents", "deploy_prune.npz"),
    *("deploy_prune.signing", "deploy_prune.cli_sweep"),
    *(f"deploy_prune.sweep.{name}" for name in ("settings", "cells", "store", "cluster", "driver", "run", "results")),
    "deploy_prune.sweep.report",
    *("deploy_prune.tune", "deploy_prune.tune.settings", "deploy_prune.tune.verdict"),
    *("deploy_prune.lengths", "deploy_prune.latency_table", "deploy_prune.costs"),
    *("deploy_prune.runtime_bench.stats", "deploy_prune.runtime_bench.gate", "deploy_prune.runtime_bench.report"),
]


def module_files() -> dict[str, Path]:
    """Return every module's dotted name inside deploy_prune ("" is the package itself) and its file."""
    found = {}
    for folder, package in FOLDERS.items():
        for path in (ROOT / folder).rglob("*.py"):
            parts = [*package.split("."), *path.relative_to(ROOT / folder).with_suffix("").parts]
            found[".".join(part for part in parts[1:] if part != "__init__")] = path
    return found


FILES = module_files()


def imports_of(module: str, *, at_import_time: bool = False) -> set[str]:
    """Return the modules of deploy_prune that a module imports, its lazy imports too unless told otherwise."""
    path = FILES[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    found = set()
    for node in walk(ast.parse(path.read_text(encoding="utf-8")), at_import_time):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif node.level:
            parents = package.split(".") if package else []
            base = ".".join(["deploy_prune", *parents[: len(parents) - node.level + 1]])
            base = f"{base}.{node.module}" if node.module else base
            names = [f"{base}.{alias.name}" for alias in node.names]
        else:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            head, _, rest = name.partition(".")
            while head == "deploy_prune" and rest and rest not in FILES:
                rest = rest.rpartition(".")[0]  # a name inside a module
            if head == "deploy_prune" and rest:
                found.add(rest)
    return found - {module}


def walk(tree: ast.AST, at_import_time: bool) -> Iterator[ast.Import | ast.ImportFrom]:
    """Yield the import statements, without those of functions and TYPE_CHECKING blocks if told so."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        lazy = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or (
            isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        )
        if not (lazy and at_import_time):
            yield from walk(node, at_import_time)


def room(module: str) -> str:
    return module.split(".")[0]


@pytest.mark.parametrize("module", sorted(name for name in FILES if name not in ("", "__main__")))
def test_imports_go_up(module: str) -> None:
    assert room(module) in RANK, f"give {room(module)} a line in LAYERS, and in docs/architecture.md"
    below = {other for other in imports_of(module) if RANK.get(room(other), 99) > RANK[room(module)]}
    assert not below, f"{module} imports {sorted(below)}, which stand below it"


@pytest.mark.parametrize("module", sorted(name for name in FILES if room(name) in STRANGERS and name not in MAY_MEET))
def test_export_and_bench_do_not_know_each_other(module: str) -> None:
    assert STRANGERS[room(module)] not in {room(other) for other in imports_of(module)}


def test_no_cycles() -> None:
    # A package's __init__ and its own modules import each other by nature: only distinct rooms count.
    graph: dict[str, set[str]] = {}
    for module in FILES:
        if module:
            others = {room(other) for other in imports_of(module, at_import_time=True)}
            graph.setdefault(room(module), set()).update(others - {room(module)})
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError


def test_torch_stays_out() -> None:
    names = [name for name in TORCH_FREE if name.removeprefix("deploy_prune").lstrip(".") in FILES]
    names += [f"deploy_prune.{name}" for name in sorted(FILES) if room(name) == "tasks"]
    program = f"""
import importlib, json, sys
guilty = []
for name in {names!r}:
    importlib.import_module(name)
    if "torch" in sys.modules or "transformers" in sys.modules:
        guilty.append(name)
        break
print(json.dumps(guilty))
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout.splitlines()[-1]) == [], "importing this brings in torch or transformers"
