"""Make image data of many classes out of the fonts of a machine: which of 94 characters is drawn.

G=recipes/experiments/glyphs.py
python $G draw glyphs.npz /usr/share/fonts                            # 28 x 28, one image per font and character
python recipes/experiments/vision.py train glyphs.npz models/vit-glyphs --hidden 192 --layers 6 --heads 3 --no-flip
python $G narrow glyphs.npz models/vit-glyphs 10 glyphs-10.npz models/vit-glyphs-10      # the first ten classes

The families of the evaluation split are not those of the training split. Classes are named by their code points, as
some names of classes differ in case alone otherwise.
"""

from __future__ import annotations

import hashlib
import string
import sys
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from PIL import Image, ImageDraw, ImageFont

from deploy_prune.checkpoint import load_dense, load_processor, quiet_transformers

CHARACTERS = string.digits + string.ascii_uppercase + string.ascii_lowercase + string.punctuation
NO_CHARACTER = "\U0010fffe"  # drawn as what a font lacks
SIZE, EM, BASELINE = 28, 22, 21  # pixels

app = typer.Typer(help=__doc__, pretty_exceptions_enable=False)


@app.command()
def draw(
    out: Path,
    fonts: list[Path],
    most: Annotated[int, typer.Option(help="Images of the training split at most; 0 for all.")] = 20_000,
    seed: int = 0,
) -> None:
    """Draw every character in every font below the folders; a sixth of the families is for evaluation."""
    drawn: dict[str, dict[bytes, tuple[np.ndarray, int]]] = {"train": {}, "test": {}}
    for path in sorted({p.resolve() for folder in fonts for p in folder.rglob("*.[to]tf")}):
        font = ImageFont.truetype(path, EM)
        family = (font.getname()[0] or path.stem).split()[0].lower()
        split = "test" if hashlib.sha256(family.encode()).digest()[0] % 6 == 0 else "train"
        pictures = [picture(font, character) for character in CHARACTERS]
        lacking = picture(font, NO_CHARACTER)
        if len({image.tobytes() for image in (*pictures, lacking)}) <= len(pictures):
            continue  # without lower case, say, or without one of the characters
        for number, image in enumerate(pictures):
            drawn[split][image.tobytes()] = (image, number)  # many fonts share glyphs
    for alike in drawn["train"].keys() & drawn["test"].keys():
        del drawn["train"][alike]
    if not all(drawn.values()):
        sys.exit("Both splits need fonts: name a folder with more families.")
    arrays = {}
    for split, found in drawn.items():
        order = np.random.default_rng(seed).permutation(len(found))
        pairs = [*found.values()]
        pairs = [pairs[i] for i in (order[:most] if most and split == "train" else order)]
        arrays[f"x_{split}"] = np.stack([image for image, _ in pairs])
        arrays[f"y_{split}"] = np.array([number for _, number in pairs])
    np.savez_compressed(out, classes=names(len(CHARACTERS)), **arrays)
    print(f"{out}: {len(arrays['x_train'])} and {len(arrays['x_test'])} images of {len(CHARACTERS)} classes")


@app.command()
def narrow(data: Path, model: Path, classes: int, data_out: Path, model_out: Path) -> None:
    """Keep the first classes of the data, and of a model's head."""
    arrays = np.load(data, allow_pickle=False)
    parts = {}
    for split in ("train", "test"):
        rows = arrays[f"y_{split}"] < classes
        parts |= {f"{axis}_{split}": arrays[f"{axis}_{split}"][rows] for axis in "xy"}
    np.savez_compressed(data_out, classes=names(classes), **parts)
    net = load_dense(str(model), "classification").model
    head = torch.nn.Linear(net.classifier.in_features, classes)
    with torch.no_grad():
        head.weight.copy_(net.classifier.weight[:classes])
        head.bias.copy_(net.classifier.bias[:classes])
    net.classifier = head
    net.config.id2label = dict(enumerate(names(classes)))
    net.config.label2id = {name: i for i, name in enumerate(names(classes))}
    with quiet_transformers():
        net.save_pretrained(model_out)
    load_processor(str(model), net.config).save_pretrained(model_out)


def names(count: int) -> list[str]:
    return [f"U+{ord(c):04X}" for c in CHARACTERS[:count]]


def picture(font: ImageFont.FreeTypeFont, character: str) -> np.ndarray:
    """Draw a character, white on black, on one baseline for all: size tells c from C."""
    image = Image.new("L", (SIZE, SIZE))
    ImageDraw.Draw(image).text((SIZE / 2, BASELINE), character, fill=255, font=font, anchor="ms")
    return np.asarray(image)


if __name__ == "__main__":
    app()
