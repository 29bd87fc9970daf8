"""The bundle: hashes, paths that stay inside, schema versions, and publication as a whole or not at all."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles_tiny import exported_bundle

from deploy_prune.bundle import Bundle, GoldenCase, Manifest
from deploy_prune.cli import invoke
from deploy_prune.disk import locked, write_atomically
from deploy_prune.errors import BundleError, InputError, SystemStateError
from deploy_prune.publishing import publish, staging
from deploy_prune.resume import resume_folder


def make(destination: Path, text: str = "one") -> Bundle:
    with staging(destination) as bundle:
        (bundle.root / "sliced").mkdir()
        (bundle.root / "sliced" / "weights.txt").write_text(text)
        bundle.register("sliced/weights.txt")
        return publish(bundle, destination)


def test_published_bundle_opens_and_nothing_else_is_left(tmp_path: Path) -> None:
    bundle = make(tmp_path / "b")
    assert bundle.path("sliced/weights.txt").read_text() == "one"
    assert [p.name for p in tmp_path.iterdir() if p.name != ".b.lock"] == ["b"]


def test_a_second_run_replaces_the_whole(tmp_path: Path) -> None:
    make(tmp_path / "b")
    (tmp_path / "b" / "stray.txt").write_text("not named by the manifest")
    assert make(tmp_path / "b", "two").path("sliced/weights.txt").read_text() == "two"
    assert not (tmp_path / "b" / "stray.txt").exists()
    assert [p.name for p in tmp_path.iterdir() if p.name != ".b.lock"] == ["b"]


def test_a_failed_run_leaves_the_old_bundle(tmp_path: Path) -> None:
    make(tmp_path / "b")

    def fail() -> None:
        with staging(tmp_path / "b") as bundle:
            (bundle.root / "sliced.txt").write_text("half")
            raise RuntimeError("halfway")

    with pytest.raises(RuntimeError, match="halfway"):
        fail()
    assert Bundle.open(tmp_path / "b").path("sliced/weights.txt").read_text() == "one"
    assert [p.name for p in tmp_path.iterdir() if p.name != ".b.lock"] == ["b"]


def test_two_runs_cannot_write_one_bundle(tmp_path: Path) -> None:
    script = (
        "import sys\nfrom deploy_prune.disk import locked\nfrom deploy_prune.errors import SystemStateError\n"
        "try:\n    with locked(sys.argv[1]): print('got it')\nexcept SystemStateError: print('refused')\n"
    )
    with locked(tmp_path / "b"):
        done = subprocess.run(
            [sys.executable, "-c", script, str(tmp_path / "b")], capture_output=True, text=True, check=False
        )
        assert done.stdout.strip() == "refused", done.stderr
    with locked(tmp_path / "b"):
        pass


def test_a_bundle_behind_a_link_has_one_lock_and_stays_behind_it(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    folder, link = tmp_path / "store" / "v1", tmp_path / "current"
    link.symlink_to(folder)
    for text in ("one", "two"):  # where there is none yet, and over one that is there
        assert make(link, text).path("sliced/weights.txt").read_text() == text
    assert link.is_symlink()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["current", "store"]
    assert sorted(p.name for p in folder.parent.iterdir()) == [".v1.lock", "v1"]
    assert resume_folder(link) == resume_folder(folder)
    with locked(link), pytest.raises(SystemStateError, match="Another run"), locked(folder):
        pass


def test_changed_missing_and_foreign_files_are_found(tmp_path: Path) -> None:
    bundle = make(tmp_path / "b")
    path = bundle.path("sliced/weights.txt")
    path.write_text("changed")
    with pytest.raises(BundleError, match="corrupted"):
        Bundle.open(tmp_path / "b")
    path.unlink()
    with pytest.raises(BundleError, match=r"lacks sliced/weights\.txt"):
        Bundle.open(tmp_path / "b")
    with pytest.raises(BundleError, match="outside"):
        bundle.path("../b2/secret")


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("{", "not a valid manifest"),
        ('{"artifacts": 3}', "not a valid manifest"),
        (json.dumps({"schema_version": "2.0"}), "schema version 2.0"),
        (json.dumps({"files": {"../../etc/passwd": "0"}}), "outside"),
    ],
)
def test_bad_manifests_are_refused(text: str, match: str, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(BundleError, match=match):
        Bundle.open(tmp_path)


def test_newer_minor_schema_keeps_unknown_keys(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps({"schema_version": "1.7", "moon": "full"}))
    bundle = Bundle.open(tmp_path)
    bundle.commit()
    assert json.loads((tmp_path / "manifest.json").read_text())["moon"] == "full"


def test_added_files_exist_once_committed_and_others_are_collected(tmp_path: Path) -> None:
    bundle = make(tmp_path / "b")
    (tmp_path / "x.onnx").write_bytes(b"graph")
    relative = bundle.add_file(tmp_path / "x.onnx", "artifacts", "sliced")
    assert relative.startswith("artifacts/sliced-")
    assert relative not in Bundle.open(tmp_path / "b").manifest.files
    (bundle.root / "artifacts" / "old.onnx").write_bytes(b"left by a kill")
    bundle.commit()
    assert Bundle.open(tmp_path / "b").path(relative).read_bytes() == b"graph"
    assert not (bundle.root / "artifacts" / "old.onnx").exists()


def test_golden_cases_come_back_as_they_were(tmp_path: Path) -> None:
    bundle = make(tmp_path / "b")
    case = GoldenCase({"input_ids": np.arange(6).reshape(2, 3)}, {"sliced": {"logits": np.eye(2, dtype=np.float32)}})
    bundle.add_golden(case)
    bundle.commit()
    (found,) = Bundle.open(tmp_path / "b").golden()
    assert np.array_equal(found.inputs["input_ids"], case.inputs["input_ids"])
    assert np.array_equal(found.outputs["sliced"]["logits"], np.eye(2))


def test_exchange_without_the_system_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deploy_prune.publishing.sys.platform", "darwin")
    make(tmp_path / "b")
    assert make(tmp_path / "b", "two").path("sliced/weights.txt").read_text() == "two"


@pytest.mark.parametrize(("renames", "left"), [(0, "one"), (1, "one"), (2, "two")])
def test_a_kill_between_the_renames_is_mended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, renames: int, left: str
) -> None:
    class Killed(BaseException):
        pass

    monkeypatch.setattr("deploy_prune.publishing.sys.platform", "darwin")
    make(tmp_path / "b")
    done, rename = [], os.rename

    def kill(*paths: Any) -> None:
        if len(done) == renames:
            raise Killed
        done.append(paths)
        rename(*paths)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", kill)
        with pytest.raises(Killed):
            make(tmp_path / "b", "two")
    with staging(tmp_path / "b"):
        assert Bundle.open(tmp_path / "b").path("sliced/weights.txt").read_text() == left
    for text in ("three", "four"):
        assert make(tmp_path / "b", text).path("sliced/weights.txt").read_text() == text
    assert sorted(p.name for p in tmp_path.iterdir() if p.name != ".b.lock") == ["b"]


def test_write_atomically_leaves_no_temporary_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "manifest.json"
    write_atomically(target, "old")

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(SystemStateError, match="disk is full"):
        write_atomically(target, "new")
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_a_file_in_the_way_is_refused(tmp_path: Path) -> None:
    (tmp_path / "b").write_text("a file")
    with pytest.raises(InputError, match="not a folder"):
        make(tmp_path / "b")
    assert (tmp_path / "b").read_text() == "a file"


def test_manifest_defaults_are_complete() -> None:
    assert set(Manifest().model_dump()) >= {
        *("schema_version", "model", "task", "budget", "stages", "plan", "counts", "quality", "fidelity", "artifacts"),
    }


def test_who_may_read_the_folder_may_read_what_is_in_it(tmp_path: Path) -> None:
    """A container whose user is another one once found tensors that only their writer could read."""
    bundle = exported_bundle(tmp_path)
    assert {path.suffix for path in bundle.root.rglob("*")} >= {".safetensors", ".json", ".onnx"}
    wanted = bundle.root.stat().st_mode & 0o666
    assert {path: path.stat().st_mode & 0o666 for path in bundle.root.rglob("*") if path.is_file()} == {
        path: wanted for path in bundle.root.rglob("*") if path.is_file()
    }


def test_a_file_that_may_not_be_read_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It once was an internal error with a traceback."""
    bundle = make(tmp_path / "b")
    hidden = bundle.root / "sliced" / "weights.txt"
    monkeypatch.setattr(
        "deploy_prune.bundle.sha256_file", lambda path: raise_it(PermissionError(13, "denied", str(path)))
    )
    assert invoke(["inspect", str(bundle.root)]) == 4
    said = "".join(capsys.readouterr().err.split())
    assert f"Nopermissionfor{hidden}" in said


def raise_it(error: Exception) -> None:
    raise error
