"""What a run survives: kills between and within stages, spoilt remains of them, full disks, locks, clocks, memory."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from killing import campaign, identity, kept_files
from runs_tiny import channel_checkpoint, checkpoint, data, image_data
from tools.wheel import ROOMS, ROOT

from deploy_prune import finishing, resume
from deploy_prune.bundle import Bundle
from deploy_prune.config import load_recipe
from deploy_prune.disk import code_hash
from deploy_prune.errors import InputError, VerdictError
from deploy_prune.pipeline import run
from deploy_prune.progress import Progress, Silent
from deploy_prune.resume import HALF, Resume, resume_folder

# How runs are set up, and what a rerun takes over that was killed at the start of each stage.
PRUNED = ["calibrate", "score", "search", "compensate"]
REARRANGED = [*PRUNED[:3], "rearrange", "compensate"]
WAYS: dict[str, tuple[dict[str, Any], dict[str, list[str]]]] = {
    "refit": ({}, {"score": ["calibrate"], "compensate": PRUNED[:3], "evaluate": PRUNED}),
    "mask-tuning": ({"compensate": "mask-tuning"}, {"rearrange": PRUNED[:3], "evaluate": REARRANGED}),
    "steps": ({"steps": 3}, {"step 2": [*PRUNED[:2], "step 1"], "search": [*PRUNED[:2], "step 1", "step 2"]}),
    "depth": ({"drop_sublayers": 1}, {"search": ["calibrate", "score", "depth"]}),
    "recovery": ({"recover_epochs": 1.0, "compensate": "mask-tuning"}, {"evaluate": REARRANGED}),
    "late depth": ({"drop_sublayers": 1, "depth_order": "after"}, {"evaluate": [*PRUNED, "late depth"]}),
    "channels": ({}, {"compensate": PRUNED[:3], "evaluate": PRUNED}),
    "channels in steps": ({"steps": 2, "compensate": "fold"}, {"step 1": PRUNED[:2], "compensate": PRUNED[:2]}),
}


class Killed(BaseException):
    """Stand for a kill: nothing handles it."""


class Watcher(Silent):
    """Note what a run says, and end it without warning when it comes to a stage."""

    def __init__(self, kill_at: str = "") -> None:
        self.kill_at = kill_at
        self.notes: list[str] = []

    @contextmanager
    def stage(self, name: str) -> Iterator[Progress]:
        if name == self.kill_at:
            raise Killed
        yield lambda share: None

    def note(self, text: str) -> None:
        self.notes.append(text)

    @property
    def resumed(self) -> list[str]:
        return [text.removeprefix("Resumed: ") for text in self.notes if text.startswith("Resumed: ")]


def prepare(folder: Path, **changes: Any) -> dict[str, Any]:
    model, rows = checkpoint(folder / "model"), data(folder / "data", train=160)
    given = {"model": str(model), "task": "text-classification", "data": str(rows), "out": str(folder / "b")}
    return {**given, "samples": 64, "keep_flops": 0.5, **changes}


def prepare_images(folder: Path, **changes: Any) -> dict[str, Any]:
    model, rows = channel_checkpoint(folder / "model", "resnet"), image_data(folder / "data.npz", size=16)
    given = {"model": str(model), "task": "image-classification", "data": str(rows), "out": str(folder / "b")}
    return {**given, "samples": 64, "keep_flops": 0.75, **changes}


def pruned(settings: dict[str, Any], watcher: Watcher | None = None, **changes: Any) -> Bundle:
    return run(load_recipe(**{**settings, **changes}), watcher, export=False, bench=False)


def hidden(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.name.startswith(".") and not p.name.endswith(".lock"))


@pytest.mark.parametrize("way", WAYS)
def test_a_killed_run_is_taken_up_and_ends_bit_for_bit_alike(way: str, tmp_path: Path) -> None:
    changes, kills = WAYS[way]
    settings = (prepare_images if "channels" in way else prepare)(tmp_path, **changes)
    whole = pruned(settings, out=str(tmp_path / "whole"))
    for stage, expected in kills.items():
        with pytest.raises(Killed):
            pruned(settings, Watcher(stage))
        assert not (tmp_path / "b").exists()
        again = Watcher()
        made = pruned(settings, again)
        if way == "channels in steps" and stage == "compensate":
            expected = [*expected, "step 1", "search", "rearrange"]
        assert again.resumed == expected
        assert identity(made) == identity(whole)
        assert made.manifest.files["plan.json"] == whole.manifest.files["plan.json"]
        assert (made.manifest.quality, made.manifest.fidelity) == (whole.manifest.quality, whole.manifest.fidelity)
        assert [s.name for s in made.manifest.stages] == [s.name for s in whole.manifest.stages]
        assert hidden(tmp_path) == []
        shutil.rmtree(tmp_path / "b")


def test_evaluation_is_taken_up_model_by_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = prepare(tmp_path)
    whole = pruned(settings, out=str(tmp_path / "whole"))
    real, seen = Resume.stage, []

    def stage(self: Resume, name: str, *rest: Any) -> Any:
        seen.append(name)
        if seen.count("evaluate sliced") == 1 and name == "evaluate sliced":
            raise Killed
        return real(self, name, *rest)

    monkeypatch.setattr(Resume, "stage", stage)
    with pytest.raises(Killed):
        pruned(settings)
    again = Watcher()
    made = pruned(settings, again)
    assert again.resumed == [*PRUNED, "evaluate dense", "evaluate virtual"]
    assert made.manifest.quality == whole.manifest.quality
    assert made.manifest.golden == whole.manifest.golden  # their names hold the hashes of the outputs


@pytest.mark.parametrize("harm", ["a flipped bit", "cut short", "another stage's", "another run's", "a folder", "text"])
def test_what_is_spoilt_or_foreign_is_computed_anew(harm: str, tmp_path: Path) -> None:
    settings = prepare(tmp_path)
    whole = pruned(settings, out=str(tmp_path / "whole"))
    with pytest.raises(Killed):
        pruned(settings, Watcher("evaluate"))
    others = resume_folder(tmp_path / "c")
    with pytest.raises(Killed):
        pruned(settings, Watcher("evaluate"), out=str(tmp_path / "c"), cache_gb=8.0)  # stages of the same names
    files = sorted(resume_folder(tmp_path / "b").glob("*/*.safetensors"))
    assert len(files) == len(PRUNED)
    foreign = {p.name.partition("-")[0]: p for p in others.glob("*/*.safetensors")}
    contents = {p: p.read_bytes() for p in files}
    for number, path in enumerate(files):
        raw = bytearray(contents[path])
        if harm == "a flipped bit":
            raw[-1] ^= 1
        elif harm == "cut short":
            del raw[len(raw) // 2 :]
        elif harm == "text":
            raw = bytearray(b"not tensors at all")
        elif harm == "a folder":
            path.unlink()
            path.mkdir()
            continue
        else:  # whole files, under names that hold their hash
            source = files[number - 1] if harm == "another stage's" else foreign[path.name.partition("-")[0]]
            data_, digest = contents.get(source) or source.read_bytes(), source.stem.partition("-")[2]
            path.unlink()
            path.with_name(f"{path.name.partition('-')[0]}-{digest}.safetensors").write_bytes(data_)
            continue
        path.write_bytes(bytes(raw))
    again = Watcher()
    assert identity(pruned(settings, again)) == identity(whole)
    assert again.resumed == []


def test_any_other_setting_label_weight_or_version_starts_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = prepare(tmp_path)

    def resumed(**changes: Any) -> list[str]:
        with pytest.raises(Killed):
            pruned(settings, watcher := Watcher("evaluate"), **changes)
        return watcher.resumed

    assert resumed() == []
    assert resumed() == PRUNED
    assert resumed(batches=(1, 4), min_agreement=0.1) == PRUNED  # nothing of the pruning depends on these
    for changes in ({"seed": 1}, {"keep_flops": 0.6}, {"criterion": "fisher"}, {"align": 4}, {"samples": 70}):
        assert resumed(**changes) == []
    assert resumed() == PRUNED  # what other settings left does not disturb it
    path = tmp_path / "data" / "train.jsonl"
    text = path.read_text()
    path.write_text(text.replace('"label": 0', '"label": 9').replace('"label": 1', '"label": 0').replace("9", "1"))
    assert resumed() == []
    path.write_text(text)
    checkpoint(tmp_path / "model", seed=1)
    assert resumed() == []
    checkpoint(tmp_path / "model")
    assert resumed() == PRUNED
    monkeypatch.setattr(resume, "code_hash", lambda: "the code was changed")
    assert resumed() == []


def test_a_wheel_and_a_checkout_have_one_hash_of_the_code(tmp_path: Path) -> None:
    """What a killed run left is taken up, however the release is installed: a wheel holds all rooms in one folder."""
    package = tmp_path / "deploy_prune"
    for room, inside in ROOMS.items():
        shutil.copytree(ROOT / room, tmp_path / inside, ignore=shutil.ignore_patterns("__pycache__"))
    assert code_hash(package) == code_hash()
    with open(package / "criteria" / "obs.py", "a") as file:
        file.write("# another release\n")
    assert code_hash(package) != code_hash()


def test_an_error_to_be_mended_takes_its_own_results_away(tmp_path: Path) -> None:
    settings = prepare(tmp_path)
    with pytest.raises(Killed):
        pruned(settings, Watcher("evaluate"))
    kept = kept_files(tmp_path / "b")
    for changes, error in (({"keep_flops": 0.01}, InputError), ({"keep_flops": 0.3, "min_agreement": 1}, VerdictError)):
        with pytest.raises(error):
            pruned(settings, compensate="none", **changes)
        assert kept_files(tmp_path / "b") == kept
    again = Watcher()
    pruned(settings, again)
    assert again.resumed == PRUNED
    with pytest.raises(VerdictError):
        pruned(settings, out=str(tmp_path / "c"), compensate="none", keep_flops=0.3, min_agreement=1)
    assert hidden(tmp_path) == []


@pytest.mark.parametrize("obstacle", ["little room", "a file in the folder's place"])
def test_a_result_that_cannot_be_kept_stops_nothing(
    obstacle: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = prepare(tmp_path)
    whole = pruned(settings, out=str(tmp_path / "whole"))
    if obstacle == "little room":
        usage = shutil.disk_usage(tmp_path)._replace(free=0)
        monkeypatch.setattr(resume.shutil, "disk_usage", lambda path: usage)
    else:
        resume_folder(tmp_path / "b").write_text("in the way")
    again = Watcher()
    assert identity(pruned(settings, again)) == identity(whole)
    assert sum("not kept" in note for note in again.notes) == len(PRUNED) + 3  # three models are evaluated


def test_a_killed_export_keeps_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = prepare(tmp_path, formats=("pt2",))
    settings["model"] = str(checkpoint(tmp_path / "small", num_hidden_layers=1))
    made: list[str] = []
    kill_at = "sliced"

    def step(self: Any, name: str) -> None:
        what, variant, *_ = name.split()
        if what == "export":
            if variant == kill_at:
                raise Killed
            made.append(variant)

    monkeypatch.setattr(finishing.Steps, "__call__", step)
    with pytest.raises(Killed):
        run(load_recipe(**settings), bench=False)
    assert made == ["dense", "virtual"]
    half = Bundle.open(resume_folder(tmp_path / "b") / HALF)
    assert [a.variant for a in half.manifest.artifacts] == made
    path = half.path(half.manifest.artifacts[0].path)
    contents = path.read_bytes()
    path.write_bytes(contents[:-1] + bytes([contents[-1] ^ 1]))
    kill_at = "dense"
    with pytest.raises(Killed):  # nothing of a spoilt bundle is taken over: the first file is made again
        run(load_recipe(**settings), bench=False)
    path.write_bytes(contents)
    kill_at = "none"
    again = Watcher()
    bundle = run(load_recipe(**settings), again, bench=False)
    assert made == ["dense", "virtual", "sliced"]
    assert {a.variant: a.parity.status for a in bundle.manifest.artifacts} == dict.fromkeys(made, "passed")
    assert "Exported before, and taken over: 2 of 3 files" in again.notes
    assert hidden(tmp_path) == []


def test_kills_at_random_moments_leave_the_old_bundle_or_the_new_one(tmp_path: Path) -> None:
    found = campaign(6, 1, tmp_path)
    assert len(found["kills"]) == 6
