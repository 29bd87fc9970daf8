"""Signed bundles: what was signed opens, anything else is refused, and minisign itself agrees."""

from __future__ import annotations

import logging
import shutil
import stat
import subprocess
from pathlib import Path

import pytest
from bundles_tiny import exported_bundle

pytest.importorskip("minisign", reason="the extra 'sign' is not installed")
from deploy_prune.bundle import Bundle
from deploy_prune.cli import invoke
from deploy_prune.errors import BundleError, InputError
from deploy_prune.serve import load
from deploy_prune.signing import SIGNATURE, make_key, read_secret_key, sign_manifest


@pytest.fixture
def signed(tmp_path: Path) -> tuple[Path, Path]:
    """Return a signed bundle, and the public key."""
    root = exported_bundle(tmp_path).root
    public = make_key(tmp_path / "a.key")
    assert invoke(["sign", str(root), "--key", str(tmp_path / "a.key")]) == 0
    return root, public


def test_a_signed_bundle_opens(signed: tuple[Path, Path], tmp_path: Path) -> None:
    root, public = signed
    with load(root, public_key=public) as predict:
        assert predict("good film")
    assert stat.S_IMODE((tmp_path / "a.key").stat().st_mode) == 0o600
    before = (root / SIGNATURE).read_bytes()
    assert invoke(["verify", str(root), "--public-key", str(public)]) == 0
    assert (root / SIGNATURE).read_bytes() == before
    assert Bundle.open(root, public_key=public)


def test_whatever_was_changed_is_refused(signed: tuple[Path, Path]) -> None:
    root, public = signed
    manifest, plan = (root / "manifest.json").read_bytes(), (root / "plan.json").read_bytes()
    (root / "manifest.json").write_bytes(manifest.replace(b"accuracy", b"Accuracy"))
    with pytest.raises(BundleError, match="not signed by the key"):
        Bundle.open(root, public_key=public)
    (root / "manifest.json").write_bytes(manifest)
    (root / "plan.json").write_bytes(plan + b" ")
    with pytest.raises(BundleError, match="corrupted"):
        Bundle.open(root, verify=False, public_key=public)  # whose hashes are always checked
    (root / "plan.json").write_bytes(plan)
    (root / "sliced" / "added_tokens.json").write_text("{}")  # which transformers would read
    with pytest.raises(BundleError, match="does not name"):
        Bundle.open(root, public_key=public)
    (root / "sliced" / "added_tokens.json").unlink()
    Bundle.open(root, public_key=public)
    text = (root / SIGNATURE).read_text()
    for damaged in ("", "x", text[:-20], text.replace("file:manifest.json", "file:other.json")):
        (root / SIGNATURE).write_text(damaged)
        with pytest.raises(BundleError, match="not signed by the key"):
            Bundle.open(root, public_key=public)
    (root / SIGNATURE).unlink()
    with pytest.raises(BundleError, match="is not signed"):
        Bundle.open(root, public_key=public)


def test_another_key_is_refused(
    signed: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in (("handlers", []), ("level", logging.root.level)):
        monkeypatch.setattr(logging.root, name, value)  # serve sets them for a process of its own
    root, _ = signed
    other = make_key(tmp_path / "b.key")
    with pytest.raises(BundleError, match="not signed by the key"):
        load(root, public_key=other)
    assert invoke(["serve", str(root), "--public-key", str(other), "--port", "0"]) == 2
    assert "not signed by the key" in " ".join(capsys.readouterr().err.split())
    assert invoke(["serve", str(root), "--public-key", str(tmp_path / "none"), "--port", "0"]) == 2
    assert "no public key" in " ".join(capsys.readouterr().err.split())


def test_a_change_takes_the_signature_away(signed: tuple[Path, Path]) -> None:
    root, _ = signed
    bundle = Bundle.open(root)
    bundle.commit()
    assert (root / SIGNATURE).is_file()
    bundle.manifest.task["name"] = "other"
    bundle.commit()
    assert not (root / SIGNATURE).exists()


def test_keys_with_a_password(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEPLOY_PRUNE_KEY_PASSWORD", "a password")
    root, key = exported_bundle(tmp_path).root, tmp_path / "a.key"
    assert invoke(["keygen", "--out", str(key)]) == 0
    assert invoke(["keygen", "--out", str(key)]) == 2  # never overwritten
    with pytest.raises(InputError, match="needs its password"):
        read_secret_key(key)
    with pytest.raises(InputError, match="wrong password"):
        read_secret_key(key, lambda: "another")
    assert invoke(["sign", str(root), "--key", str(key)]) == 0
    assert Bundle.open(root, public_key=tmp_path / "a.key.pub")


def test_a_key_without_a_password_is_made_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DEPLOY_PRUNE_KEY_PASSWORD", "")
    assert invoke(["keygen", "--out", str(tmp_path / "a.key")]) == 0
    assert "is not encrypted" in capsys.readouterr().err
    monkeypatch.setenv("DEPLOY_PRUNE_KEY_PASSWORD", "a password")
    assert invoke(["keygen", "--out", str(tmp_path / "b.key")]) == 0
    assert capsys.readouterr().err == ""


def test_files_that_are_no_keys(tmp_path: Path) -> None:
    root = exported_bundle(tmp_path).root
    (tmp_path / "x").write_bytes(b"\xff\n\xff")
    with pytest.raises(InputError, match="secret key"):
        read_secret_key(tmp_path / "x")
    with pytest.raises(InputError, match=r"none cannot be used as a secret key: No such file or directory\."):
        read_secret_key(tmp_path / "none")
    with pytest.raises(InputError, match="public key"):
        Bundle.open(root, public_key=tmp_path / "x")


def test_minisign_agrees(signed: tuple[Path, Path], tmp_path: Path) -> None:
    tool = shutil.which("minisign")
    if tool is None:
        pytest.skip("no minisign on this machine")
    root, public = signed
    command = [tool, "-Vm", str(root / "manifest.json"), "-p", str(public)]
    assert subprocess.run(command, check=False).returncode == 0
    theirs = [tool, "-G", "-W", "-p", str(tmp_path / "c.pub"), "-s", str(tmp_path / "c.key")]
    subprocess.run(theirs, check=True)
    sign_manifest(root, read_secret_key(tmp_path / "c.key"))
    assert Bundle.open(root, public_key=tmp_path / "c.pub")
