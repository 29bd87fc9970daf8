"""Write tests/sliced/: tiny sliced vision transformers as this release of transformers names their modules.

    PYTHONPATH=tests python -m tools.sliced_checkpoints

Run under both lines of transformers (`make test-transformers4` makes the older one's overlay), so that
test_core_renaming can read each under the other.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
import transformers
from models_tiny import IMAGE, tiny_model

from deploy_prune.checkpoint import save_sliced
from deploy_prune.surgery import surgery_of
from deploy_prune.units import MaskSet, SlicePlan

ROOT = Path(__file__).parents[1] / "sliced"
SIZES = {"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 3, "patch_size": 4}


def write(family: str) -> Path:
    """Write one sliced checkpoint and what it gives for `picture`; a layer in it computes nothing."""
    neurons = {} if family == "dinov2" else {"intermediate_size": 10}
    model = tiny_model(family, **SIZES, **neurons)
    surgery = surgery_of(model)
    masks = MaskSet.ones(surgery.groups)
    for g in surgery.groups:
        masks[g.name][:: g.layer + 2] = 0.0
        if g.layer == 1:
            masks[g.name][:] = 0.0
    sliced = surgery.slice(SlicePlan.from_masks(surgery.groups, masks))
    folder = ROOT / f"{family}-{transformers.__version__}"
    save_sliced(sliced, _NoProcessor(), folder)
    (folder / "modeling_sliced.py").unlink()  # code is tested as it is now
    with torch.inference_mode():
        logits = sliced(picture()).logits.tolist()
    (folder / "logits.json").write_text(json.dumps(logits) + "\n")
    return folder


def picture() -> torch.Tensor:
    """Return one image (1, C, H, W)."""
    return torch.linspace(-1, 1, IMAGE[0] * IMAGE[1] * IMAGE[2]).reshape(1, *IMAGE)


class _NoProcessor:
    def save_pretrained(self, folder: Path) -> None:
        pass


if __name__ == "__main__":
    for name in ("vit", "dinov2"):
        print(write(name))
