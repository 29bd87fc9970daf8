"""The command line as a user meets it: exit codes, one-screen errors, nothing half-written, --json, help."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import typer
from models_tiny import tiny_config
from runs_tiny import checkpoint, data
from safetensors.torch import load_file, save_file

from deploy_prune import screen
from deploy_prune.cli import app, invoke

STAGES = ("calibrate", "score", "search", "rearrange", "compensate", "evaluate", "export", "bench")
COMMANDS = ("run", "prune", "slice", "export", "verify", "bench", "report", "gate", "probe", "experiment", "inspect")
COMMANDS = (*COMMANDS, "tune", "serve", "keygen", "sign", "sweep", "doctor")


class Workplace:
    """A folder with a tiny checkpoint, its data, and a bundle that must survive whatever goes wrong."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.model = checkpoint(root / "model")
        self.data = data(root / "data")
        self.out = root / "bundles" / "b"

    def run(self, *more: str, command: str = "prune", model: str | Path | None = None) -> int:
        words = [command, str(model or self.model), "--data", str(self.data), "--out", str(self.out)]
        return invoke([*words, *more] if "--task" in more else [*words, "--task", "text-classification", *more])


@pytest.fixture
def place(tmp_path: Path) -> Workplace:
    return Workplace(tmp_path)


@pytest.fixture
def published(place: Workplace) -> Workplace:
    assert place.run() == 0
    return place


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def error_text(capsys: pytest.CaptureFixture[str]) -> str:
    text = capsys.readouterr().err
    assert "Traceback" not in text
    return " ".join(text.split())


def break_weights(place: Workplace) -> None:
    path = place.model / "model.safetensors"
    weights = load_file(path)
    weights["bert.encoder.layer.1.output.dense.weight"][0, 0] = float("nan")
    save_file(weights, path, metadata={"format": "pt"})


def wrong_label(place: Workplace) -> None:
    path = place.data / "train.jsonl"
    path.write_text(path.read_text() + '{"text": "a new row", "label": 7}\n')


def empty_rows(place: Workplace) -> None:
    path = place.data / "train.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:30]))


def remove_weights(place: Workplace) -> None:
    (place.model / "model.safetensors").unlink()


def untrained_head(place: Workplace) -> None:
    path = place.model / "model.safetensors"
    save_file({k: v for k, v in load_file(path).items() if "classifier" not in k}, path, metadata={"format": "pt"})


BAD_INPUT: list[tuple[str, Callable[[Workplace], None] | None, list[str], int, str]] = [
    ("missing data", None, ["--data", "nowhere"], 2, "nowhere"),
    ("wrong task for the head", None, ["--task", "squad"], 2, "ForQuestionAnswering"),
    ("wrong number of labels", None, ["--task", "sst2"], 2, "num_labels 3"),
    ("unknown task", None, ["--task", "mind-reading"], 2, "text-classification"),
    ("infeasible budget", None, ["--keep-flops", "0.01"], 2, "smallest reachable is 0."),
    ("keep 0", None, ["--keep-flops", "0"], 2, "greater than 0"),
    ("keep 1.5", None, ["--keep-flops", "1.5"], 2, "less than or equal to 1"),
    ("keep half", None, ["--keep-flops", "half"], 2, "half"),
    ("too few samples asked", None, ["--samples", "63"], 2, "at least 64"),
    ("too few rows", empty_rows, [], 2, "30 rows"),
    ("label mismatch", wrong_label, [], 2, "7"),
    ("NaN weights", break_weights, [], 2, "encoder.layer.1.output.dense.weight"),
    ("no weights", remove_weights, [], 2, "model"),
    ("untrained head", untrained_head, [], 2, "classifier"),
    ("unknown criterion", None, ["--criterion", "psychic"], 2, "psychic"),
    ("unknown compensation", None, ["--compensate", "prayer"], 2, "prayer"),
    ("budget longer than the positions", None, ["--seq-len", "49"], 2, "48 positions"),
    ("no such device", None, ["--device", "cuda:63"], 4, "cuda:63"),
    ("unknown device", None, ["--device", "toaster"], 2, "toaster"),
    (
        "guard",
        None,
        ["--compensate", "none", "--keep-flops", "0.25", "--min-agreement", "1"],
        1,
        "agrees with the dense",
    ),
    ("unknown flag", None, ["--colour", "red"], 2, "--colour"),
]


@pytest.mark.parametrize(("change", "flags", "code", "text"), [b[1:] for b in BAD_INPUT], ids=[b[0] for b in BAD_INPUT])
def test_bad_input(
    change: Callable[[Workplace], None] | None,
    flags: list[str],
    code: int,
    text: str,
    published: Workplace,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = snapshot(published.out)
    if change:
        change(published)
    capsys.readouterr()
    assert published.run(*flags) == code
    message = error_text(capsys)
    assert text in message
    assert len(message) < 1500, "an error fits one screen"
    assert snapshot(published.out) == before
    assert [p.name for p in published.out.parent.iterdir() if "staging" in p.name] == []


def test_missing_model_folder(place: Workplace, capsys: pytest.CaptureFixture[str]) -> None:
    assert place.run(model="./no/such/model") == 2
    assert "No model folder" in error_text(capsys)
    assert not place.out.exists()


def test_ambiguous_task_names_the_choices(place: Workplace, capsys: pytest.CaptureFixture[str]) -> None:
    assert invoke(["prune", str(place.model), "--out", str(place.out)]) == 2
    text = error_text(capsys)
    assert "ambiguous" in text
    assert "text-classification" in text
    assert "text-pair" in text


def test_task_is_inferred_from_model_and_data(place: Workplace, capsys: pytest.CaptureFixture[str]) -> None:
    assert invoke(["prune", str(place.model), "--data", str(place.data), "--out", str(place.out)]) == 0
    assert "Task inferred from the model and the data: text-classification" in error_text(capsys)


def test_unsupported_architecture(place: Workplace, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny_config("bert").to_dict() | {
        "model_type": "albert",
        "architectures": ["AlbertForSequenceClassification"],
    }
    (place.model / "config.json").write_text(json.dumps(config))
    assert place.run() == 2
    assert "shares one layer's weights" in error_text(capsys)


def test_recipe_file_flags_override_it_and_unknown_keys_are_refused(
    place: Workplace, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = place.root / "recipe.toml"
    lines = [f'model = "{place.model}"', f'data = "{place.data}"', 'task = "text-classification"', "keep_flops = 0.7"]
    recipe.write_text("\n".join(lines))
    assert invoke(["prune", "-c", str(recipe), "--keep-flops", "0.6", "--out", str(place.out)]) == 0
    manifest = json.loads((place.out / "manifest.json").read_text())
    assert manifest["recipe"]["keep_flops"] == 0.6
    assert manifest["recipe"]["task"] == "text-classification"
    capsys.readouterr()
    recipe.write_text("\n".join([*lines, "keep_flop = 0.5"]))
    assert invoke(["prune", "-c", str(recipe)]) == 2
    text = error_text(capsys)
    assert "'keep_flop'" in text
    assert "keep_flops" in text


@pytest.mark.parametrize("stage", STAGES)
def test_interrupt_leaves_everything_as_it_was(
    stage: str, published: Workplace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = snapshot(published.out)
    real = screen.Bars.stage

    @contextmanager
    def interrupted(self: screen.Bars, name: str) -> Iterator[Any]:
        with real(self, name) as progress:
            if name == stage:
                raise KeyboardInterrupt
            yield progress

    monkeypatch.setattr(screen.Bars, "stage", interrupted)
    assert published.run("--rearrange", "sample", "--formats", "onnx", command="run") == 130
    assert "Interrupted: no bundle was changed" in error_text(capsys)
    assert snapshot(published.out) == before
    assert [p.name for p in published.out.parent.iterdir() if "staging" in p.name] == []


def test_above_an_error_only_bars_that_got_somewhere_are_left() -> None:
    shown = {}

    def fail(bars: screen.Bars, share: float) -> None:
        with bars, bars.stage("export") as progress:
            progress(share)
            raise ValueError("bad")

    for share in (0.0, 0.5):
        bars = screen.Bars()
        with pytest.raises(ValueError, match="bad"):
            fail(bars, share)
        shown[share] = [task.visible for task in bars.progress.tasks]
    assert shown == {0.0: [False], 0.5: [True]}


def test_full_disk(place: Workplace, capsys: pytest.CaptureFixture[str]) -> None:
    mount = place.root / "small"
    mount.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=192k", "tmpfs", str(mount)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        place.out = mount / "b"
        assert place.run(command="run") == 4
        assert "disk is full" in error_text(capsys)
        assert [p.name for p in mount.iterdir() if p.name != ".b.lock"] == []
    finally:
        subprocess.run(["umount", str(mount)], check=True)


def test_read_only_target(place: Workplace, capsys: pytest.CaptureFixture[str]) -> None:
    assert invoke(["prune", str(place.model), "--data", str(place.data), "--out", "/proc/nothing/b"]) in (2, 4)
    assert "/proc" in error_text(capsys)


def test_folder_that_is_no_bundle_is_not_touched(place: Workplace, capsys: pytest.CaptureFixture[str]) -> None:
    place.out.mkdir(parents=True)
    (place.out / "thesis.txt").write_text("years of work")
    assert place.run() == 2
    assert "is not a bundle" in error_text(capsys)
    assert (place.out / "thesis.txt").read_text() == "years of work"


def test_corrupted_bundle(published: Workplace, capsys: pytest.CaptureFixture[str]) -> None:
    path = published.out / "sliced" / "model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(bytes(raw))
    capsys.readouterr()
    for command in ("inspect", "export", "bench"):
        assert invoke([command, str(published.out)]) == 2
        assert "sliced/model.safetensors" in error_text(capsys)


def test_parts_follow_each_other(published: Workplace, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(published.out)
    assert invoke(["export", out, "--format", "onnx", "--variants", "dense,sliced"]) == 0
    assert "parity passed" in capsys.readouterr().out
    assert invoke(["verify", out]) == 0
    assert "parity passed" in capsys.readouterr().out
    assert invoke(["bench", out, "--runtimes", "ort-cpu", "--seconds", "0.1", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert {m["model"] for m in result["measurements"]} == {"dense", "sliced"}
    assert invoke(["inspect", out]) == 0
    shown = capsys.readouterr().out
    assert "Kept units" in shown
    assert "artifacts/sliced-onnx" in shown
    assert invoke(["inspect", out, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["schema_version"] == "1.0"


def test_precisions_with_their_quality(published: Workplace, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["export", str(published.out), "--format", "onnx,pt2", "--variants", "sliced", "--json"]
    assert invoke([*arguments, "--precision", "fp32,int8", "--calibration-rows", "64"]) == 0
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert [(a["format"], a["precision"], a["scheme"]) for a in found] == [
        ("onnx", "fp32", None),
        ("onnx", "int8", "dynamic"),
        ("onnx", "int8", "qdq"),
        ("pt2", "fp32", None),
    ]
    assert "skipped pt2 int8" in captured.err
    for artifact in found:
        assert (artifact["quality"] is None) == (artifact["precision"] == "fp32")
    assert found[2]["quality"]["n"] == 24
    assert found[2]["calibration"] == {"method": "minmax", "rows": 64}
    assert invoke(arguments) == 0
    assert "nothing" not in capsys.readouterr().err
    assert invoke(["inspect", str(published.out)]) == 0
    assert "int8" in capsys.readouterr().out


def test_export_without_the_data_it_was_made_with(published: Workplace, capsys: pytest.CaptureFixture[str]) -> None:
    for path in published.data.iterdir():
        path.unlink()
    arguments = ["export", str(published.out), "--format", "onnx", "--variants", "sliced", "--precision", "int8"]
    assert invoke(arguments) == 2
    assert "--no-data" in error_text(capsys)
    assert invoke([*arguments, "--no-data"]) == 0
    captured = capsys.readouterr()
    assert "int8-dynamic" in captured.out
    assert "static int8 (qdq) needs calibration data" in captured.err


def test_wrong_profile(published: Workplace, capsys: pytest.CaptureFixture[str]) -> None:
    assert invoke(["export", str(published.out), "--profile", "wide"]) == 2
    assert "BATCHxLENGTH" in error_text(capsys)
    for flags, words in (
        (["--profile", "1x9999"], "positions, not 9999"),
        (["--compute-capabilities", "ada"], "no compute capability"),
        (["--format", ""], "nothing to export"),
        (["--variants", ""], "nothing to do"),
    ):
        assert invoke(["export", str(published.out), *flags]) == 2, flags
        assert words in error_text(capsys), flags


def test_unknown_format_names_the_known(published: Workplace, capsys: pytest.CaptureFixture[str]) -> None:
    assert invoke(["export", str(published.out), "--format", "floppy"]) == 2
    text = error_text(capsys)
    assert "floppy" in text
    assert "onnx" in text


def test_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    assert invoke(["doctor"]) == 0
    assert "ONNX Runtime providers" in capsys.readouterr().out
    assert invoke(["doctor", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["versions"]["torch"]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_examples(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert invoke([command, "--help"]) == 0
    assert f"deploy-prune {command}" in capsys.readouterr().out
    assert set(typer.main.get_command(app).commands) == set(COMMANDS)  # type: ignore[attr-defined]


def test_error_as_json(place: Workplace, capsys: pytest.CaptureFixture[str]) -> None:
    assert place.run("--task", "mind-reading", "--json") == 2
    found = json.loads(capsys.readouterr().out)
    assert found["error"] == "InputError"
    assert found["hint"]


def test_internal_error_is_one_line_and_a_file(
    place: Workplace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("deploy_prune.pipeline.run", lambda *a, **k: 1 / 0)
    assert place.run() == 70
    text = error_text(capsys)
    assert "ZeroDivisionError" in text
    path = Path(next(word for word in text.split() if word.endswith(".traceback")))
    assert "division by zero" in path.read_text()
    path.unlink()


def test_missing_extra_is_named(tmp_path: Path) -> None:
    script = (
        "import sys\nsys.modules['torch'] = None\nsys.modules['transformers'] = None\n"
        "from deploy_prune.cli import invoke\nsys.exit(invoke(['run', 'x']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path, env=dict(os.environ), check=False
    )
    assert done.returncode == 3, done.stderr
    assert "deploy-prune[cpu]" in done.stderr
