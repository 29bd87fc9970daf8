"""Sliced vision transformers cut under one line of transformers load under the other, whose modules it renamed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from models_tiny import tiny_model
from tools.sliced_checkpoints import ROOT, picture

from deploy_prune.archs import arch_of
from deploy_prune.checkpoint import load_sliced, save_sliced
from deploy_prune.errors import BundleError
from deploy_prune.surgery import surgery_of
from deploy_prune.units import MaskSet, SlicePlan

FOLDERS = sorted(path for path in ROOT.iterdir() if path.is_dir())


class NoProcessor:
    def save_pretrained(self, folder: Path) -> None:
        pass


def test_both_lines_wrote_one_of_each() -> None:
    assert {(f.name.partition("-")[0], f.name.partition("-")[2][0]) for f in FOLDERS} == {
        (family, line) for family in ("vit", "dinov2") for line in "45"
    }


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda f: f.name)
def test_either_line_reads_them(folder: Path, tmp_path: Path) -> None:
    model = load_sliced(folder)
    with torch.inference_mode():
        found = model(picture()).logits
    assert torch.allclose(found, torch.tensor(json.loads((folder / "logits.json").read_text())), atol=1e-5)
    assert len(arch_of(model).layer_paths(model)) == 3
    save_sliced(model, NoProcessor(), tmp_path)  # from here on by the names of this release
    with torch.inference_mode():
        assert torch.equal(load_sliced(tmp_path)(picture()).logits, found)
    again = transformers.AutoModelForImageClassification.from_pretrained(tmp_path, trust_remote_code=True).eval()
    with torch.inference_mode():
        assert torch.equal(again(picture()).logits, found)


def broken(folder: Path) -> Path:
    """Save a sliced ViT whose spec names modules that no release has."""
    model = tiny_model("vit")
    surgery = surgery_of(model)
    masks = MaskSet.ones(surgery.groups)
    masks["L00.heads"][0] = 0
    save_sliced(surgery.slice(SlicePlan.from_masks(surgery.groups, masks)), NoProcessor(), folder)
    config = json.loads((folder / "config.json").read_text())
    for group in config["deploy_prune"]["groups"]:
        group |= {"consumer": f"other.{group['consumer']}", "producers": [f"other.{p}" for p in group["producers"]]}
    (folder / "config.json").write_text(json.dumps(config | {"transformers_version": "9.8.7"}))
    return folder


def test_unknown_names_are_refused_with_the_release_that_wrote_them(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"was cut under transformers 9\.8\.7"):
        load_sliced(broken(tmp_path))


def test_the_code_in_the_folder_refuses_other_names_too(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"was cut under transformers 9\.8\.7.*deploy_prune\.load"):
        transformers.AutoModelForImageClassification.from_pretrained(broken(tmp_path), trust_remote_code=True)
