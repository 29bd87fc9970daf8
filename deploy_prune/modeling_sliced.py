"""Rebuild a sliced model: the stock transformers class with smaller Linears, as config.deploy_prune says.

This file travels with every sliced checkpoint, so that
`AutoModelFor....from_pretrained(folder, trust_remote_code=True)` works without the package that cut it.
It depends on torch and transformers alone.
"""

import inspect
from typing import Any

import torch
from torch import Tensor, nn


class BiasOnly(nn.Module):
    """Stand for an output projection whose inputs are all cut: it adds its bias (d,) and nothing else."""

    def __init__(self, features: int, dtype: torch.dtype, device: Any, in_tuple: bool) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(features, dtype=dtype, device=device), requires_grad=False)
        self.in_tuple = in_tuple

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        x = _first_tensor(args, kwargs)  # (B, T, any)
        out = self.bias.expand(*x.shape[:-1], -1)  # (B, T, d)
        return (out, None) if self.in_tuple else out


class PassThrough(nn.Module):
    """Stand for an attention core without heads: hand its input on, unread by the BiasOnly behind it."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return _first_tensor(args, kwargs), None


class KeepHeads:
    """Pass on only the kept heads (axis 1) of one argument of an attention module."""

    def __init__(self, module: nn.Module, argument: str, kept: list[int]) -> None:
        self.argument = argument
        self.kept = kept
        self.position = list(inspect.signature(module.forward).parameters).index(argument)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if kwargs.get(self.argument) is not None:
            kwargs = {**kwargs, self.argument: kwargs[self.argument][:, self.kept]}
        elif len(args) > self.position and args[self.position] is not None:
            args = list(args)  # type: ignore[assignment]
            args[self.position] = args[self.position][:, self.kept]  # type: ignore[index]
        return tuple(args), kwargs


def _first_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return next(v for v in (*args, *kwargs.values()) if isinstance(v, Tensor))


def resize(model: nn.Module, spec: dict[str, Any]) -> None:
    """Give every sub-layer of a stock model the sizes that the spec names; the weights are left unset."""
    if spec.get("drop_pooler"):
        model.register_module("pooler", None)
    for group in spec["groups"]:
        _resize_group(model, group, spec.get("select_heads", ""))


def _resize_group(model: nn.Module, group: dict[str, Any], select_heads: str) -> None:
    count, width, core_path = len(group["kept"]), group["width"], group["core"]
    old: Any = model.get_submodule(group["consumer"])
    like = {"dtype": old.weight.dtype, "device": old.weight.device}
    if count == group["total"]:
        return
    if count == 0:
        inside = bool(core_path) and group["consumer"].startswith(core_path + ".")
        bias = BiasOnly(old.out_features, old.weight.dtype, old.weight.device, in_tuple=inside)
        model.set_submodule(core_path if inside else group["consumer"], bias)
        if core_path and not inside:
            model.set_submodule(core_path, PassThrough())
        elif not inside:
            for path in group["producers"]:
                model.set_submodule(path, nn.Identity())
        return
    for path in group["producers"]:
        linear: Any = model.get_submodule(path)
        new = nn.Linear(linear.in_features, count * width, bias=linear.bias is not None, **like)
        model.set_submodule(path, new)
    model.set_submodule(group["consumer"], nn.Linear(count * width, old.out_features, **like))
    if core_path:
        core: Any = model.get_submodule(core_path)
        for name in ("num_attention_heads", "n_heads"):
            if hasattr(core, name):
                setattr(core, name, count)
        for name in ("all_head_size", "dim"):
            if hasattr(core, name):
                setattr(core, name, count * width)
        if select_heads:
            core.register_forward_pre_hook(KeepHeads(core, select_heads, group["kept"]), with_kwargs=True)
