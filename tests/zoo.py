"""Networks of torchvision, timm and transformers as their own packages make them, with random weights.

torchvision and timm are in no environment but the layer of `make test-zoo`.
"""

from __future__ import annotations

import importlib
import sys
from importlib.util import find_spec
from typing import Any

import torch
import transformers
from conv_tiny import seen_data
from torch import Tensor, nn

CLASSES = 5
IMAGE = (3, 64, 64)
MISSING = [name for name in ("torchvision", "timm") if find_spec(name) is None]
_OPERATORS: list[torch.library.Library] = []  # gone with the object that defines them


def import_torchvision() -> Any:
    """Return torchvision, also beside a torch that its compiled part was not built for.

    The registry's wheel is built against CUDA's torch. Under torch's CPU build its operators cannot be loaded, and the
    import ends where it describes one of them, `nms`, which no classifier uses: it is enough that it is declared.
    """
    try:
        return importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _OPERATORS.append(library)
    for name in [name for name in sys.modules if name.startswith("torchvision.")]:
        del sys.modules[name]  # what the first try left
    return importlib.import_module("torchvision")


def network(name: str) -> nn.Module:
    """Return the network "package/name" in evaluation mode, of so many classes, its every channel of some effect."""
    torch.manual_seed(0)
    package, _, architecture = name.partition("/")
    if package == "torchvision":
        model = import_torchvision().models.get_model(architecture, **options(name))
    elif package == "timm":
        model = importlib.import_module("timm").create_model(architecture, **options(name))
    else:
        model = _OF_TRANSFORMERS[architecture]()
    return settled(model)


def options(name: str) -> dict[str, Any]:
    """Return the arguments that a network's own package makes it by."""
    options: dict[str, Any] = {"num_classes": CLASSES}
    if name == "torchvision/googlenet":
        options["init_weights"] = True  # torchvision warns of its default, which takes a minute
    elif "vit" in name:
        options["image_size" if name.startswith("torchvision") else "img_size"] = IMAGE[1]
    return options


def settled(model: nn.Module) -> nn.Module:
    """Let the batch norms see images, so that signals neither die out nor explode, and draw what starts at zero."""
    for parameter in model.parameters():
        if parameter.dim() > 1 and not bool(parameter.any()):
            nn.init.normal_(parameter, std=0.1)
    norms = [m for m in seen_data(model).modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the mean over all batches
    with torch.no_grad():
        model.train()(images(16, seed=1))
    return model.eval()


def images(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, *IMAGE, generator=torch.Generator().manual_seed(seed))


def _resnet(kind: str) -> nn.Module:
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[16, 24], depths=[2, 1], layer_type=kind, num_labels=CLASSES
    )
    return transformers.ResNetForImageClassification(config)


def _mobilenet() -> nn.Module:
    config = transformers.MobileNetV2Config(
        depth_multiplier=0.25, finegrained_output=False, image_size=IMAGE[1], num_labels=CLASSES
    )
    return transformers.MobileNetV2ForImageClassification(config)


_OF_TRANSFORMERS = {
    "resnet-basic": lambda: _resnet("basic"),
    "resnet-bottleneck": lambda: _resnet("bottleneck"),
    "mobilenet-v2": _mobilenet,
}
