"""Pixel values are those of transformers' own image processors, and what cannot be followed is refused."""

from __future__ import annotations

import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from deploy_prune.errors import InputError, UnsupportedModelError
from deploy_prune.images import ImageProcessor, check_fit, image_tokens, open_image
from deploy_prune.module_checkpoint import ModuleConfig, read_module_config

FAMILIES = ["ViT", "DeiT", "Bit", "CLIP", "ConvNext", "MobileNetV1", "MobileNetV2", "EfficientNet"]


def theirs(family: str, options: dict[str, Any]) -> Any:
    """Return transformers' processor that computes with Pillow: the only one of 4.57, one of two of 5."""
    name = f"{family}ImageProcessor"
    return getattr(transformers, f"{name}Pil" if hasattr(transformers, f"{name}Pil") else name)(**options)


def random_image(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    """Return smooth noise, as photographs are, so that the filters of a resize matter."""
    coarse = np.random.default_rng(seed).integers(0, 256, (max(2, height // 3), max(2, width // 3), 3), dtype=np.uint8)
    image = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))
    return image if channels == 3 else image[:, :, :1]


def both(family: str, options: dict[str, Any], image: np.ndarray | Image.Image) -> tuple[np.ndarray, np.ndarray]:
    processor = theirs(family, options)
    last = {} if isinstance(image, Image.Image) else {"input_data_format": "channels_last"}
    wanted = np.asarray(processor(image, return_tensors="np", **last)["pixel_values"])
    config = SimpleNamespace(num_channels=wanted.shape[1], image_size=[*wanted.shape[2:]])
    saved = json.loads(processor.to_json_string())
    return ImageProcessor.from_dict(saved, config)([image]), wanted


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shape", [(300, 500), (97, 64), (16, 20)])
def test_the_defaults_of_each_family(family: str, shape: tuple[int, int]) -> None:
    got, wanted = both(family, {}, random_image(*shape))
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, wanted)


SIZES = st.integers(1, 40)


@settings(max_examples=150, deadline=None)
@given(
    family=st.sampled_from(["DeiT", "Bit"]),
    shape=st.tuples(SIZES, SIZES),
    edge=SIZES,
    crop=st.none() | st.tuples(SIZES, SIZES),
    resize=st.booleans(),
    resample=st.integers(0, 5),
    rescale=st.booleans(),
    normalize=st.booleans(),
    channels=st.sampled_from([1, 3]),
)
def test_any_settings(
    family: str,
    shape: tuple[int, int],
    edge: int,
    crop: tuple[int, int] | None,
    resize: bool,
    resample: int,
    rescale: bool,
    normalize: bool,
    channels: int,
) -> None:
    size = {"shortest_edge": edge} if family == "Bit" else {"height": edge, "width": edge + 3}
    options = {
        "do_resize": resize,
        "size": size,
        "resample": resample,
        "do_center_crop": crop is not None,
        "do_rescale": rescale,
        "rescale_factor": 1 / 127.5,
        "do_normalize": normalize,
        "image_mean": [0.1, 0.2, 0.3][:channels],
        "image_std": [0.7, 0.8, 0.9][:channels],
        "do_convert_rgb": False,
    }
    if crop is not None:
        options["crop_size"] = {"height": crop[0], "width": crop[1]}
    elif family == "Bit":
        shape = (shape[0], shape[0])  # uncropped, the model's size must be the square that comes out
    got, wanted = both(family, options, random_image(*shape, channels))
    np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("offset", [True, False])
@pytest.mark.parametrize("again", [True, False])
def test_efficientnet_shifts_and_divides_once_more(normalize: bool, rescale: bool, offset: bool, again: bool) -> None:
    options = {
        "size": {"height": 12, "width": 10},
        "do_normalize": normalize,
        "do_rescale": rescale,
        "rescale_factor": 1 / 127.5,
        "rescale_offset": offset,
        "include_top": again,
        "image_mean": [0.1, 0.2, 0.3],
        "image_std": [0.7, 0.8, 0.9],
    }
    got, wanted = both("EfficientNet", options, random_image(9, 14))
    np.testing.assert_array_equal(got, wanted)


def picture(mode: str) -> Image.Image:
    image = Image.fromarray(random_image(20, 24))
    if mode in ("RGBA", "LA"):
        image = image.convert(mode)
        image.putalpha(Image.fromarray(random_image(20, 24, seed=1)[:, :, 0]))
    return image.convert(mode)


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "1", "CMYK", "RGBA", "LA"])
def test_any_image_becomes_rgb(mode: str) -> None:
    if mode in ("RGBA", "LA") and transformers.__version__[0] == "4":
        pytest.skip("transformers 4 drops the transparency, 5 lays it on white")
    got, wanted = both("Bit", {"do_convert_rgb": True}, picture(mode))
    np.testing.assert_array_equal(got, wanted)


def test_grey_and_rgb_become_what_the_model_takes() -> None:
    vit = {"image_processor_type": "ViTImageProcessor", "do_resize": False, "do_normalize": False}
    grey = random_image(8, 8, 1)
    rgb = ImageProcessor.from_dict(vit, SimpleNamespace(num_channels=3, image_size=8))
    assert rgb.output_size == (3, 8, 8)
    np.testing.assert_array_equal(rgb([grey]), np.repeat(rgb([grey[:, :, 0]])[:, :1], 3, axis=1))
    one = ImageProcessor.from_dict(vit, SimpleNamespace(num_channels=1, image_size=8))
    np.testing.assert_allclose(one([np.repeat(grey, 3, axis=2)])[0, 0], grey[:, :, 0] / np.float32(255), atol=1e-6)
    assert one([]).shape == (0, 1, 8, 8)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "CMYK"])
def test_colours_before_a_model_of_grey_images_are_refused(mode: str) -> None:
    vit = {"image_processor_type": "ViTImageProcessor", "do_resize": False, "do_normalize": False}
    one = ImageProcessor.from_dict(vit, SimpleNamespace(num_channels=1, image_size=8))
    with pytest.raises(InputError, match="Image 1: It has colours, but the model takes grey images") as caught:
        one([random_image(8, 8, 1), Image.fromarray(random_image(8, 8)).convert(mode)])
    assert "Convert the images to grey first" in caught.value.hint
    grey = Image.fromarray(random_image(8, 8, 1)[:, :, 0])
    if mode != "CMYK":  # whose black is none of Pillow's
        np.testing.assert_array_equal(one([grey.convert(mode)]), one([grey]))


@pytest.mark.parametrize(("margin", "cut"), [(1, 0), (2, 1), (3, 2), (4, 2), (5, 2), (7, 4), (-1, 0), (-3, -1)])
def test_a_crop_of_timm_falls_where_torchvisions_does(margin: int, cut: int, tmp_path: Path) -> None:
    """Its CenterCrop begins at int(round(margin / 2)), Python's rounding; what is too small it pads first."""
    cfg = {"input_size": [3, 9, 9], "mean": [0.0] * 3, "std": [1.0] * 3, "crop_pct": 1.0}
    entry = {"architecture": "resnet18", "num_classes": 2, "pretrained_cfg": cfg}
    (tmp_path / "config.json").write_text(json.dumps(entry))
    config = read_module_config(tmp_path)
    assert config is not None
    assert config.processor is not None
    ImageProcessor.from_dict({**config.processor, "do_resize": False}, config).save_pretrained(tmp_path)
    image = random_image(9 + margin, 9)
    wanted = np.zeros((9, 9, 3), np.float32)
    part = image[max(cut, 0) :][:9]
    wanted[max(-cut, 0) :][: len(part)] = part
    found = ImageProcessor.from_folder(tmp_path, config)([image])[0].transpose(1, 2, 0)
    np.testing.assert_allclose(found, wanted / 255, rtol=1e-6)
    floored = ImageProcessor((3, 9, 9), crop=(9, 9), scale=1 / 255)([image])[0].transpose(1, 2, 0)
    assert np.array_equal(found, floored) == (cut == margin // 2)


def test_a_folder_is_read(tmp_path: Path) -> None:
    transformers.ViTConfig(image_size=28, num_channels=1).save_pretrained(tmp_path)
    own = {"image_processor_type": "ViTImageProcessor", "do_resize": False, "image_mean": 0.3, "image_std": [0.4]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(own))
    processor = ImageProcessor.from_folder(tmp_path)
    assert processor == ImageProcessor((1, 28, 28), scale=1 / 255, mean=(0.3,), std=(0.4,))
    assert hash(processor) == hash(ImageProcessor.from_folder(tmp_path))


def test_old_files_name_sizes_by_one_number() -> None:
    old = {"feature_extractor_type": "ViTFeatureExtractor", "size": 32}
    assert ImageProcessor.from_dict(old).resize == (32, 32)
    old = {"feature_extractor_type": "CLIPFeatureExtractor", "size": 32, "crop_size": 30, "do_pad": False}
    assert ImageProcessor.from_dict(old).resize == 32
    assert ImageProcessor.from_dict(old).output_size == (3, 30, 30)


VIT = {"image_processor_type": "ViTImageProcessor"}


@pytest.mark.parametrize(
    ("own", "config", "error", "words"),
    [
        ({}, {}, UnsupportedModelError, ("''", "ViTImageProcessor")),
        ({"image_processor_type": "SamImageProcessor"}, {}, UnsupportedModelError, ("SamImageProcessor",)),
        ({**VIT, "do_flip_channel_order": True}, {}, UnsupportedModelError, ("do_flip_channel_order", "True")),
        ({**VIT, "do_pad": True}, {}, UnsupportedModelError, ("do_pad",)),
        ({**VIT, "data_format": "channels_last"}, {}, UnsupportedModelError, ("data_format", "channels_last")),
        ({**VIT, "include_top": True}, {}, UnsupportedModelError, ("include_top",)),
        ({**VIT, "auto_map": {"AutoImageProcessor": "x.Y"}}, {}, UnsupportedModelError, ("auto_map",)),
        ({**VIT, "size": {"longest_edge": 9}}, {}, UnsupportedModelError, ("longest_edge",)),
        ({**VIT, "size": {"height": 0, "width": 4}}, {}, InputError, ("size", "0")),
        ({**VIT, "size": {"height": 10**9, "width": 4}}, {}, InputError, ("size", "8192")),
        ({**VIT, "size": "big"}, {}, InputError, ("'big'",)),
        ({**VIT, "resample": 9}, {}, InputError, ("resample", "9")),
        ({**VIT, "rescale_factor": "a"}, {}, InputError, ("rescale_factor", "'a'")),
        ({**VIT, "image_mean": [0.5, 0.5]}, {"num_channels": 3}, InputError, ("image_mean", "3 channels")),
        ({**VIT, "image_std": [0.5, 0.5, 0]}, {}, InputError, ("image_std", "0")),
        (VIT, {"num_channels": 1}, InputError, ("image_mean", "1 channels")),
        ({**VIT, "do_convert_rgb": True, "do_normalize": False}, {"num_channels": 1}, InputError, ("do_convert_rgb",)),
        (VIT, {"num_channels": 4}, UnsupportedModelError, ("4 channels",)),
        ({"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 30}, "crop_pct": 0}, {},
         InputError, ("crop_pct",)),
    ],
)  # fmt: skip
def test_settings_that_are_refused(own: dict, config: dict, error: type, words: tuple[str, ...]) -> None:
    with pytest.raises(error) as caught:
        ImageProcessor.from_dict(own, SimpleNamespace(**config))
    for word in words:
        assert word in str(caught.value)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (np.zeros((4, 4), np.float32), ("float32", "uint8")),
        (np.zeros((3, 5, 5), np.uint8), ("(3, 5, 5)", "(H, W, 3)")),
        (np.zeros((0, 4), np.uint8), ("empty",)),
        (np.zeros((4, 5), np.uint8), ("4 x 5", "4 x 4", "do_resize")),
        ("a.png", ("str",)),
        (Image.new("I;16", (4, 4)), ("8 bits", "I;16")),
    ],
)
def test_images_that_are_refused(image: Any, words: tuple[str, ...]) -> None:
    processor = ImageProcessor((3, 4, 4))
    with pytest.raises(InputError, match="Image 1") as caught:
        processor([np.zeros((4, 4, 3), np.uint8), image])
    for word in words:
        assert word in str(caught.value)


def test_a_long_thin_image_is_not_blown_up() -> None:
    processor = ImageProcessor((3, 224, 224), resize=224, crop=(224, 224))
    with pytest.raises(InputError, match="too long and thin"):
        processor([np.zeros((1, 10**6), np.uint8)])


def png(image: np.ndarray, **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG", **options)
    return buffer.getvalue()


def test_files_and_bytes_are_decoded_upright(tmp_path: Path) -> None:
    image = random_image(6, 9)
    (tmp_path / "a.png").write_bytes(png(image))
    np.testing.assert_array_equal(np.asarray(open_image(tmp_path / "a.png", "a")), image)
    turned = Image.Exif()
    turned[0x0112] = 6  # to be turned clockwise
    np.testing.assert_array_equal(np.asarray(open_image(png(image, exif=turned), "a")), np.rot90(image, -1))


def test_files_that_cannot_be_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = png(random_image(30, 30))
    for source, words in (
        (b"no image", "not an image"),
        (content[: len(content) // 2], "Cannot read the image row 7"),
        (tmp_path / "absent.png", "No such file"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
    ):
        with pytest.raises(InputError, match=words):
            open_image(source, "row 7")
    for limit in (500, 100):  # Pillow warns at its limit and refuses at twice that
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(InputError, match="row 7 is too large an image"):
            open_image(content, "row 7")


def test_tokens_of_an_image() -> None:
    assert image_tokens(transformers.ViTConfig(image_size=28, patch_size=4)) == 50
    assert image_tokens(transformers.DeiTConfig()) == 198
    assert image_tokens(transformers.Dinov2Config(image_size=518, patch_size=14), (224, 224)) == 257
    assert image_tokens(transformers.Dinov2WithRegistersConfig(image_size=224, patch_size=14)) == 261
    assert image_tokens(SimpleNamespace(image_size=(8, 16), patch_size=(4, 8))) == 5
    assert image_tokens(transformers.ResNetConfig()) == image_tokens(transformers.ConvNextConfig()) == 1
    with pytest.raises(InputError, match="image_size"):
        image_tokens(SimpleNamespace(patch_size=4))


def test_a_processor_must_fit_its_model() -> None:
    processor = ImageProcessor((3, 224, 224))
    for config in (
        transformers.ViTConfig(),
        transformers.Dinov2Config(image_size=518, patch_size=14),
        transformers.ResNetConfig(),
        transformers.ConvNextConfig(image_size=384),
    ):
        check_fit(processor, config)
    with pytest.raises(InputError, match="224 x 224, but the model takes 384 x 384"):
        check_fit(processor, transformers.ViTConfig(image_size=384))
    with pytest.raises(InputError, match="3 channels, but the model takes 1"):
        check_fit(processor, transformers.ResNetConfig(num_channels=1))


def test_a_processor_must_make_the_size_that_a_module_names() -> None:
    module = ModuleConfig("my.net", image=(3, 16, 16))
    check_fit(ImageProcessor((3, 16, 16)), module)
    with pytest.raises(InputError, match="makes images of 32 x 32, but the model takes 16 x 16") as caught:
        check_fit(ImageProcessor((3, 32, 32)), module)
    assert "module.json" in caught.value.hint


def test_the_folder_must_have_its_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="There is no") as caught:
        ImageProcessor.from_folder(tmp_path)
    assert "save_pretrained" in caught.value.hint
    for content in ("[1]", "{"):
        (tmp_path / "preprocessor_config.json").write_text(content)
        with pytest.raises(InputError, match=r"preprocessor_config\.json"):
            ImageProcessor.from_folder(tmp_path)


def test_a_few_bytes_do_not_become_a_large_image() -> None:
    # The file draws four of its pixels; on a busy machine it took 12 seconds, and 400 MB, within Pillow's own limit.
    bomb = Path(__file__).with_name("fuzz") / "corpus" / "image" / "large-screen.gif"
    for source in (bomb, bomb.read_bytes()):
        with pytest.raises(InputError, match="too large an image: 1058 x 33536"):
            open_image(source, "it")
