"""The edge loader on image models: pictures go in, classes come out, without torch."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles_tiny import make_bundle, run_torch
from PIL import Image

from deploy_prune.bundle import Bundle
from deploy_prune.errors import BundleError, InputError, MissingExtraError
from deploy_prune.export import Options, export_bundle
from deploy_prune.heads import Head
from deploy_prune.images import ImageProcessor, open_image
from deploy_prune.serve import load
from deploy_prune.serve.answers import softmax
from deploy_prune.serve.loader import BATCH_ROWS

Made = tuple[Path, Any]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Return an exported bundle of a tiny ViT, and its sliced torch model."""
    bundle, models = make_bundle(tmp_path_factory.mktemp("serve") / "bundle", "vit")
    export_bundle(bundle, formats=["onnx"], variants=["sliced"], models=models, options=Options()).check()
    bundle.commit()
    return bundle.root, models["sliced"]


def images(count: int, height: int = 8, width: int = 8) -> list[np.ndarray]:
    return list(np.random.default_rng(0).integers(0, 256, (count, height, width, 3), dtype=np.uint8))


def wanted(made: Made, pictures: list[Any]) -> np.ndarray:
    root, model = made
    pixels = ImageProcessor.from_folder(root / "sliced")(pictures)
    return run_torch(model, Head("classification"), {"pixel_values": pixels})["logits"]


def test_classes(made: Made) -> None:
    pictures = images(3, 20, 31)  # resized
    with load(made[0], threads=1) as predictor:
        answers = predictor(pictures)
        np.testing.assert_allclose(predictor.outputs(pictures)["logits"], wanted(made, pictures), atol=1e-4)
    for answer, p in zip(answers, softmax(wanted(made, pictures)), strict=True):
        assert answer["label"] == ("no", "yes")[p.argmax()]
        assert answer["scores"] == pytest.approx({"no": p[0], "yes": p[1]}, abs=1e-4)
        json.dumps(answer)


def test_every_kind_of_image_gives_the_same(made: Made, tmp_path: Path) -> None:
    array = images(1, 11, 9)[0]
    path = tmp_path / "a.png"
    Image.fromarray(array).save(path)
    kinds: list[Any] = [array, Image.fromarray(array), path, str(path), path.read_bytes()]
    with load(made[0], threads=1) as predictor:
        answers = predictor(kinds)
        assert all(answer == answers[0] for answer in answers[1:])
        assert [predictor(kind) for kind in kinds] == [answers[:1]] * len(kinds)  # a single one is a list of one
        assert predictor(np.stack([array, array])) == answers[:2]
        grey = predictor(array[:, :, 0])
        assert grey == predictor(np.repeat(array[:, :, :1], 3, axis=2)) != answers[:1]
        assert predictor([]) == []
        assert predictor.outputs([]) == {}


def test_order_of_many_images(made: Made) -> None:
    pictures = images(BATCH_ROWS + 3)
    with load(made[0], threads=1) as predictor:
        scores = [answer["scores"]["yes"] for answer in predictor(pictures)]
    assert scores == pytest.approx(softmax(wanted(made, pictures))[:, 1].tolist(), abs=1e-4)


def test_images_are_decoded_one_at_a_time(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[weakref.ref[Any]] = []

    def open_one(source: Any, where: str) -> Any:
        assert all(reference() is None for reference in decoded)  # 128 small files may be 8 GB of pixels
        picture = open_image(source, where)
        decoded.append(weakref.ref(picture))
        return picture

    monkeypatch.setattr("deploy_prune.serve.preparation.open_image", open_one)
    files = []
    for picture in images(5, 12, 10):
        buffer = io.BytesIO()
        Image.fromarray(picture).save(buffer, "PNG")
        files.append(buffer.getvalue())
    with load(made[0], threads=1) as predictor:
        _, feeds = predictor.prepare(files)
    assert len(decoded) == 5
    assert np.array_equal(feeds["pixel_values"], ImageProcessor.from_folder(made[0] / "sliced")(images(5, 12, 10)))


def test_infer_takes_tensors(made: Made) -> None:
    case = Bundle.open(made[0]).golden()[2]
    with load(made[0], threads=1) as predictor:
        got = predictor.infer(case.inputs)
        np.testing.assert_allclose(got["logits"], case.outputs["sliced"]["logits"], atol=1e-4)
        with pytest.raises(InputError):
            predictor.infer({"pixel_values": case.inputs["pixel_values"][:, :, :4]})


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (7, "Images are expected, not int"),
        ([np.zeros((8, 8), np.uint8), 3], "Image 1 is int"),
        ([np.zeros((8, 8), np.float32)], r"(?s)Image 0: .*float32.*uint8"),
        ([*images(BATCH_ROWS + 1), np.zeros((8, 8), np.int64)], f"Image {BATCH_ROWS + 1}: .*int64"),
        ("absent.png", "Cannot read the image Image 0, absent.png"),
        ([b"no image"], "Image 0 is not an image"),
    ],
)
def test_what_is_no_image_is_refused(made: Made, given: Any, words: str) -> None:
    with load(made[0], threads=1) as predictor, pytest.raises(InputError, match=words):
        predictor(given)


def test_without_pillow_the_extra_is_named(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(MissingExtraError, match=r"(?s)pillow.*deploy-prune\[images\]"):
        load(made[0])


def test_unusable_bundles_are_refused(tmp_path: Path) -> None:
    bundle, models = make_bundle(tmp_path / "bundle", "vit")
    export_bundle(bundle, formats=["onnx"], variants=["sliced"], models=models, options=Options()).check()
    path = bundle.path("sliced/preprocessor_config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"size": {"height": 9, "width": 9}}))
    bundle.register("sliced/preprocessor_config.json")
    bundle.commit()
    with pytest.raises(BundleError, match=r"\(3, 9, 9\), but the model takes \(3, 8, 8\)"):
        load(bundle.root)
    del bundle.manifest.files["sliced/preprocessor_config.json"]
    bundle.commit()
    with pytest.raises(BundleError, match=r"no sliced/preprocessor_config\.json"):
        load(bundle.root)


def test_a_file_of_one_batch_takes_any_number_of_images(tmp_path: Path) -> None:
    bundle, models = make_bundle(tmp_path / "bundle", "vit")
    options = Options(shape=(2, 17))
    export_bundle(bundle, formats=["onnx"], variants=["sliced"], models=models, options=options).check()
    bundle.commit()
    pictures = images(5)
    with load(bundle.root, threads=1) as predictor:
        got = predictor.outputs(pictures)["logits"]
    np.testing.assert_allclose(got, wanted((bundle.root, models["sliced"]), pictures), atol=1e-4)


PREDICT = """
import sys
from deploy_prune.serve import load
with load(sys.argv[1], threads=1) as predictor:
    (answer,) = predictor(sys.argv[2])
assert set(answer["scores"]) == {"no", "yes"}, answer
assert not {"torch", "transformers", "tokenizers"} & set(sys.modules)
"""


def test_neither_torch_nor_transformers_is_imported(made: Made, tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.fromarray(images(1)[0]).save(buffer, "PNG")
    (tmp_path / "a.png").write_bytes(buffer.getvalue())
    command = [sys.executable, "-c", PREDICT, str(made[0]), str(tmp_path / "a.png")]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
