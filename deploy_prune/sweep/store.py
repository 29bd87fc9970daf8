"""What a sweep has finished, in its folder: a rerun reads it back, whatever ended the run before. No torch."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..disk import disk_errors, write_atomically
from ..documents import read_json


class Store:
    """Keep results by the hash of all they depend on, each in a file of its own that is there whole or not at all.

    cells/ holds what pruning gave, bench/ what was measured, models/ the files of models that are still to be measured.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        with disk_errors(root):
            for kind in ("cells", "bench", "models"):
                (root / kind).mkdir(parents=True, exist_ok=True)
            for half in (root / "models").glob(".half-*"):
                shutil.rmtree(half, ignore_errors=True)

    def results(self, kind: str) -> dict[str, dict[str, Any]]:
        """Return the results in cells/ or bench/ by key; files that cannot be read are computed anew."""
        found = {}
        for path in sorted((self.root / kind).glob("*.json")):
            try:
                whole = read_json(path)
            except (OSError, ValueError):
                continue
            if isinstance(whole, dict) and whole.get("key") == path.stem and isinstance(whole.get("result"), dict):
                found[path.stem] = whole["result"]
        return found

    def keep(self, kind: str, key: str, result: Mapping[str, Any]) -> None:
        """Write a result to cells/ or bench/."""
        text = json.dumps({"key": key, "result": result}, indent=1) + "\n"
        write_atomically(self.root / kind / f"{key}.json", text)

    def models(self) -> set[str]:
        """Return the names of the models that are there."""
        return {path.name for path in (self.root / "models").iterdir() if path.is_dir()}

    def keep_model(self, name: str, files: Mapping[str, bytes]) -> None:
        """Write a model's files; a name stands for their contents (`cells.files_name`)."""
        folder = self.root / "models"
        with disk_errors(folder):
            half = Path(tempfile.mkdtemp(prefix=".half-", dir=folder))
            try:
                for path, content in files.items():
                    (half / path).parent.mkdir(parents=True, exist_ok=True)
                    (half / path).write_bytes(content)
                if not (folder / name).exists():
                    half.rename(folder / name)
            finally:
                shutil.rmtree(half, ignore_errors=True)

    def model(self, name: str) -> dict[str, bytes]:
        """Return a model's files by path."""
        root = self.root / "models" / name
        return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}

    def drop_models(self, *names: str) -> None:
        """Remove models that nobody will measure any more; without names all of them."""
        for name in names or self.models():
            shutil.rmtree(self.root / "models" / name, ignore_errors=True)
