"""Image models, other runtimes and lower precisions through the server, by the clients that people use."""

from __future__ import annotations

import io
import json
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles_tiny import exported_bundle, make_exported
from PIL import Image

pytest.importorskip("tritonclient", reason="the extra 'serve' is not installed")
from servers_tiny import client_of, infer, running
from tritonclient.utils import InferenceServerException

from deploy_prune.bundle import Bundle
from deploy_prune.export import export_bundle
from deploy_prune.serve import load
from deploy_prune.server.run import Server
from deploy_prune.server.versions import Serving

TEXTS = ["a fine film", "dull, dull plot!", "music of x1 and more of it"]


@pytest.fixture(params=["http", "grpc"])
def protocol(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def answers_of(server: Server, protocol: str, name: str, given: list[bytes]) -> list[Any]:
    """Ask the model m.answers for texts or image files; return its answers. Raises InferenceServerException."""
    with client_of(server, protocol) as (client, module):
        found = infer(client, module, "m.answers", {name: np.array(given, dtype=object)})
    return [json.loads(a) for a in found.as_numpy("answer")]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_exported(tmp_path_factory.mktemp("kinds") / "vit", "vit", variants=("sliced",)).root


@pytest.fixture(scope="module")
def image_server(pictures: Path) -> Iterator[Server]:
    with running({"m": pictures}) as started:
        yield started


def png(height: int, width: int) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def test_images_in_answers_out(image_server: Server, pictures: Path, protocol: str) -> None:
    files = [png(8, 8), png(20, 31), png(5, 4)]
    found = answers_of(image_server, protocol, "image", files)
    with load(pictures, threads=1) as predictor:
        wanted = predictor(files)
    assert [a["label"] for a in found] == [a["label"] for a in wanted]
    assert [a["score"] for a in found] == pytest.approx([a["score"] for a in wanted], abs=1e-6)


def test_what_is_no_image_is_told_by_its_number(image_server: Server, protocol: str) -> None:
    with pytest.raises(InferenceServerException, match="Image 1 is not an image"):
        answers_of(image_server, protocol, "image", [png(8, 8), b"no image"])
    with pytest.raises(InferenceServerException, match="takes one input, 'image'"):
        answers_of(image_server, protocol, "text", [png(8, 8)])


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Return a bundle with its sliced model in int8 and, where that is installed, for OpenVINO."""
    bundle = exported_bundle(tmp_path_factory.mktemp("kinds"))
    export_bundle(bundle, formats=["onnx"], variants=("sliced",), precisions=["int8"]).check()
    try:
        import openvino  # noqa: F401
    except ImportError:
        pass
    else:
        export_bundle(bundle, formats=["openvino"], variants=("sliced",)).check()
    bundle.commit()
    return bundle


@pytest.mark.parametrize(("runtime", "precision"), [("ort", "int8"), ("openvino", "fp32")])
def test_other_runtimes_and_precisions(texts: Bundle, runtime: str, precision: str, protocol: str) -> None:
    if runtime == "openvino":
        pytest.importorskip("openvino", reason="openvino is not installed")
    serving = Serving(runtime=runtime, precision=precision, threads=1)
    with running({"m": texts.root}, serving=serving) as server:
        found = [a["score"] for a in answers_of(server, protocol, "text", [t.encode() for t in TEXTS])]
        with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/v2/models/m") as response:
            platform = json.loads(response.read())["platform"]
    with load(texts.root, runtime, "sliced", precision, threads=1) as predictor:
        wanted = [a["score"] for a in predictor(TEXTS)]
    assert found == pytest.approx(wanted, abs=1e-6)
    with load(texts.root, threads=1) as predictor:
        usual = [a["score"] for a in predictor(TEXTS)]
    assert found == pytest.approx(usual, abs=0.1)
    assert platform.endswith("OpenVINO CPU" if runtime == "openvino" else "CPUExecutionProvider")
    assert precision == "fp32" or found != usual  # it was not the usual file that answered
