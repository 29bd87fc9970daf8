"""The table of what was run where names every format and dialect, and claims no more than the tests do."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import test_export_contract
import test_export_engines

from deploy_prune.export.registry import DIALECTS, Kind, available_exporters

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "docs" / "exporters.md").read_text("utf-8")
ROWS = [[cell.strip() for cell in line.strip("|").split("|")] for line in TEXT.splitlines() if line.startswith("| ")]
TABLE = [row for row in ROWS if len(row) == 6]
PRECISIONS = ("fp32", "fp16", "bf16", "int8")


def contract_kinds() -> list[Kind]:
    """Return the kinds of file that a test compares with their model."""
    import test_export_openvino

    modules = (test_export_contract, test_export_openvino)
    return [value.kind for module in modules for value in vars(module).values() if hasattr(value, "kind")]


def test_every_format_and_dialect_has_a_row() -> None:
    named = " ".join(row[0] for row in TABLE)
    assert all(re.search(rf"\b{name}\b", named) for name in (*available_exporters(), *DIALECTS))


@pytest.mark.parametrize("own", ["ONNX Runtime CPU", "OpenVINO CPU", "torch CPU"])
def test_ci_is_claimed_where_a_contract_runs_it(own: str) -> None:
    pytest.importorskip("openvino", reason="openvino is not installed")
    tested = {(k.format, k.dialect, k.precision) for k in contract_kinds() if hasattr(k, "dialect")}
    for formats, runtime, *cells in TABLE:
        if runtime != own or "optimum" in formats:
            continue
        name = formats.split()[0]
        dialects = [d for d in (*DIALECTS, "export", "aoti") if d in formats] or ["ir"]
        for precision, cell in zip(PRECISIONS, cells, strict=True):
            for dialect in dialects:
                assert cell.startswith("CI") == ((name, dialect, precision) in tested), (name, dialect, precision)


def test_engines_are_claimed_as_built_alone() -> None:
    built = {k.precision for k in test_export_engines.KINDS}
    row = next(r for r in TABLE if r[0] == "rtx")
    for precision, cell in zip(PRECISIONS, row[2:], strict=True):
        assert cell.startswith("built in CI") == (precision in built)
    assert {c for r in TABLE if r[0] == "tensorrt" for c in r[2:]} == {"code path", "-"}
