"""Adapters, one file per family; others may be added by the entry-point group "deploy_prune.archs"."""

from __future__ import annotations

from functools import cache
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

from ..errors import UnsupportedModelError
from ..images import image_tokens
from . import bert, dinov2, distilbert, electra, mpnet, roberta, vit
from .base import Arch, Layout, Sublayer, per_layer

if TYPE_CHECKING:
    from torch import nn

__all__ = ["Arch", "Layout", "Sublayer", "arch_of", "check_config", "check_model", "check_prunable", "config_of"]
__all__ += ["is_convolutional", "max_positions", "of_transformers", "per_layer", "supported"]

_REFUSED = {
    "albert": "ALBERT shares one layer's weights between all layers: slicing one layer would slice them all.",
    "deberta": "DeBERTa's disentangled attention has projections of relative positions that cannot be cut by head.",
    "deberta-v2": "DeBERTa-v2's disentangled attention shares its projections with the relative positions.",
}


@cache
def supported() -> dict[str, Arch]:
    """Map every supported model type to its adapter."""
    adapters = [module.ARCH for module in (bert, dinov2, distilbert, electra, mpnet, roberta, vit)]
    adapters += [point.load() for point in entry_points(group="deploy_prune.archs")]
    return {model_type: arch for arch in adapters for model_type in arch.model_types}


def check_config(config: Any) -> Arch:
    """Return the adapter for a transformers config.

    Raises UnsupportedModelError, with the reason, for a model that cannot be pruned.
    """
    model_type = str(getattr(config, "model_type", ""))
    known = _known()
    if model_type in _REFUSED:
        raise UnsupportedModelError(_REFUSED[model_type], hint=known)
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"'{model_type}' is an encoder-decoder: its cross-attention is not handled.", hint=known
        )
    heads = getattr(config, "num_attention_heads", None)
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    if heads != kv_heads:
        raise UnsupportedModelError(
            f"'{model_type}' uses grouped-query attention ({heads} query heads share {kv_heads} key-value"
            " heads): a head cannot be cut on its own.",
            hint=known,
        )
    if model_type not in supported():
        raise UnsupportedModelError(f"No adapter for the architecture '{model_type}'.", hint=known)
    if getattr(config, "is_decoder", False) or getattr(config, "add_cross_attention", False):
        raise UnsupportedModelError(
            f"This '{model_type}' is configured as a decoder: only encoders are handled.", hint=known
        )
    _refuse_sliced(config)
    return supported()[model_type]


def check_prunable(config: Any) -> None:
    """Raise UnsupportedModelError for a model that cannot be pruned, as far as its config tells.

    Whether a convolutional network can be shows when it is traced.
    """
    attentive = hasattr(config, "num_attention_heads") or str(getattr(config, "model_type", "")) in supported()
    if attentive or not hasattr(config, "num_channels"):
        check_config(config)
    _refuse_sliced(config)


def _refuse_sliced(config: Any) -> None:
    if getattr(config, "deploy_prune", None):
        raise UnsupportedModelError("This model has been sliced already.", hint="Give the dense checkpoint.")


def config_of(model: Any) -> Any:
    """Return a model's transformers config or, of a module that a factory makes, its `ModuleConfig`."""
    return model.config if of_transformers(model) else model.module_config


def of_transformers(model: Any) -> bool:
    """Say whether a model has a config of transformers: another module may call anything its config."""
    return hasattr(getattr(model, "config", None), "model_type")


def check_model(model: nn.Module) -> Arch:
    """Return the adapter of a loaded dense model.

    Raises UnsupportedModelError, with the reason, for a model that cannot be pruned.
    """
    return check_config(_config(model))


def arch_of(model: nn.Module) -> Arch:
    """Return the adapter of a loaded model (also of a sliced one). Raises UnsupportedModelError where there is none."""
    config = _config(model)
    arch = supported().get(str(config.model_type))
    return arch if arch is not None else check_config(config)


def _config(model: nn.Module) -> Any:
    if not of_transformers(model):
        raise UnsupportedModelError(
            f"This {type(model).__name__} is no model of transformers and has no convolution: there is nothing to cut.",
            hint=f"{_known()} Of other modules the channels of convolutions are cut.",
        )
    return model.config


def _known() -> str:
    return f"Supported: {', '.join(sorted(supported()))}."


def is_convolutional(model: nn.Module) -> bool:
    """Say whether a model has no adapter for heads and neurons, but convolutions whose channels may be cut.

    Those are Conv2d and its subclasses, known by name: this module is free of torch.
    """
    if str(getattr(getattr(model, "config", None), "model_type", "")) in supported():
        return False
    return any(kind.__name__ == "Conv2d" for m in model.modules() for kind in type(m).__mro__)


def max_positions(model: Any) -> int:
    """Return how many tokens the position embeddings allow; an image model always makes the same number."""
    config = config_of(model)
    if hasattr(config, "num_channels"):
        return image_tokens(config)
    offset = config.pad_token_id + 1 if config.model_type in ("roberta", "xlm-roberta", "mpnet") else 0
    return int(config.max_position_embeddings) - offset
