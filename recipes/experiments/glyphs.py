"""Make image data of many classes out of the fonts of a machine: which of up to 94 characters is drawn.

export PYTHONPATH=recipes/experiments DEPLOY_PRUNE_ALLOW_CODE=cnn_models
python recipes/experiments/glyphs.py glyphs-94.npz /usr/share/fonts --classes 94      # 28 x 28 pixels
python recipes/experiments/cnn.py train glyphs-94.npz models/lenet-glyphs-94 --task image-classification --epochs 10
deploy-prune experiment cnn --model models/lenet-glyphs-94 --task image-classification --data glyphs-94.npz

The families of the evaluation split are not those of the training split. The fonts are the same for any number of
classes. Classes are named by their code points, as names are compared without regard to case.
"""

from __future__ import annotations

import hashlib
import string
import sys
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from PIL import Image, ImageDraw, ImageFont

CHARACTERS = string.digits + string.ascii_uppercase + string.ascii_lowercase + string.punctuation
NO_CHARACTER = "\U0010fffe"  # drawn as what a font lacks
SIZE, EM, BASELINE = 28, 22, 21  # pixels

app = typer.Typer(help=__doc__, pretty_exceptions_enable=False)


@app.command()
def draw(
    out: Path, fonts: list[Path], classes: Annotated[int, typer.Option(min=2, max=94)] = 94, seed: int = 0
) -> None:
    """Draw the first characters in every font below the folders that has all 94, each its own picture."""
    drawn: dict[str, dict[bytes, tuple[np.ndarray, int]]] = {"train": {}, "test": {}}
    for path in sorted({p.resolve() for folder in fonts for p in folder.rglob("*.[to]tf")}):
        font = ImageFont.truetype(path, EM)
        family = (font.getname()[0] or path.stem).split()[0].lower()
        split = "test" if hashlib.sha256(family.encode()).digest()[0] % 6 == 0 else "train"
        pictures = [picture(font, character) for character in CHARACTERS]
        lacking = picture(font, NO_CHARACTER)
        if len({image.tobytes() for image in (*pictures, lacking)}) <= len(pictures):
            continue  # without lower case, say, or without one of the characters
        for number, image in enumerate(pictures[:classes]):
            drawn[split][image.tobytes()] = (image, number)  # many fonts share glyphs
    for alike in drawn["train"].keys() & drawn["test"].keys():
        del drawn["train"][alike]
    if not all(drawn.values()):
        sys.exit("Both splits need fonts: name a folder with more families.")
    arrays = {}
    for split, found in drawn.items():
        pairs = [*found.values()]
        pairs = [pairs[i] for i in np.random.default_rng(seed).permutation(len(pairs))]
        arrays[f"x_{split}"] = np.stack([image for image, _ in pairs])
        arrays[f"y_{split}"] = np.array([number for _, number in pairs])
    np.savez_compressed(out, classes=names(classes), **arrays)
    print(f"{out}: {len(arrays['x_train'])} and {len(arrays['x_test'])} images of {classes} classes")


def names(count: int) -> list[str]:
    return [f"U+{ord(c):04X}" for c in CHARACTERS[:count]]


def picture(font: ImageFont.FreeTypeFont, character: str) -> np.ndarray:
    """Draw a character, white on black, on one baseline for all: size tells c from C."""
    image = Image.new("L", (SIZE, SIZE))
    ImageDraw.Draw(image).text((SIZE / 2, BASELINE), character, fill=255, font=font, anchor="ms")
    return np.asarray(image)


if __name__ == "__main__":
    app()
