"""Rebuild a sliced model: the stock class with smaller Linears or convolutions, as its spec (config.deploy_prune) says.

This file travels with every sliced checkpoint, so that
`AutoModelFor....from_pretrained(folder, trust_remote_code=True)` works without the package that cut it.
It depends on torch and transformers alone.
"""

import copy
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
    """Give every module of a stock model the sizes that the spec names; the weights are left unset."""
    if "channels" in spec:
        resize_channels(model, spec["channels"])
        return
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


class Blank(nn.Module):
    """Stand for a convolution or Linear without outputs: one channel of zeros, of the shape that it would give."""

    def __init__(self, old: nn.Module) -> None:
        super().__init__()
        self.spatial = _Spatial(old)
        _describe(self, old)

    def forward(self, x: Tensor) -> Tensor:
        return x.new_zeros(self.spatial.shape(x, 1))


class Constant(nn.Module):
    """Stand for a convolution or Linear that reads nothing: it gives its bias (d,), or zeros, at every position."""

    def __init__(self, old: Any, features: int) -> None:
        super().__init__()
        self.spatial, self.features = _Spatial(old), features
        _describe(self, old)
        bias = None if old.bias is None else nn.Parameter(old.bias.new_zeros(features), requires_grad=False)
        self.register_parameter("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        shape = self.spatial.shape(x, self.features)
        bias: Any = self.bias
        if bias is None:
            return x.new_zeros(shape)
        after = len(self.spatial.kernel)  # axes behind the channels
        return bias.reshape(-1, *[1] * after).expand(shape).clone()  # an activation may write into it


def _describe(new: Any, old: Any) -> None:
    """Say of a stand-in what code around a convolution may ask: transformers' MobileNets pad by its stride."""
    padding = ("padding", "padding_mode", "_reversed_padding_repeated_twice")
    for name in ("kernel_size", "stride", "dilation", *padding):
        if hasattr(old, name):
            setattr(new, name, getattr(old, name))


class _Spatial:
    """Tell the shape of a convolution's or Linear's output (B, d, H, W) or (B, ..., d)."""

    def __init__(self, old: Any) -> None:
        self.kernel = getattr(old, "kernel_size", ())
        self.stride, self.dilation = getattr(old, "stride", ()), getattr(old, "dilation", ())
        padding = getattr(old, "padding", ())
        self.same = padding == "same"
        self.padding = (0,) * len(self.kernel) if isinstance(padding, str) else padding

    def shape(self, x: Tensor, features: int) -> tuple[int, ...]:
        if not self.kernel:
            return (*x.shape[:-1], features)
        rank = len(self.kernel)
        sizes = zip(x.shape[-rank:], self.kernel, self.stride, self.padding, self.dilation, strict=True)
        found = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in sizes]
        return (x.shape[0], features, *(x.shape[-rank:] if self.same else found))


def resize_channels(model: nn.Module, spec: dict[str, Any]) -> None:
    """Give convolutions, Linears and batch norms the `inputs` and `outputs` named by path.

    Where a count is 0 a Blank stands for what makes nothing and a Constant for what reads nothing.
    """
    inputs, outputs = spec["inputs"], spec["outputs"]
    for path in sorted({*inputs, *outputs}):
        old: Any = model.get_submodule(path)
        made = outputs.get(path, getattr(old, "out_channels", getattr(old, "out_features", None)))
        model.set_submodule(path, _resized(old, inputs.get(path), made))


def _resized(old: Any, read: int | None, made: int) -> nn.Module:
    norm = isinstance(old, nn.modules.batchnorm._BatchNorm)
    if made == 0:
        return nn.Identity() if norm else Blank(old)
    if read == 0:
        return Constant(old, made)
    new: Any = copy.deepcopy(old)  # subclasses keep what they hold beside their weights: timm's norms an activation
    if norm:
        new.num_features = made
    elif isinstance(old, nn.Linear):
        new.in_features, new.out_features = old.in_features if read is None else read, made
    elif old.groups > 1:
        new.in_channels = new.out_channels = new.groups = made
    else:
        new.in_channels, new.out_channels = old.in_channels if read is None else read, made
    for name, tensor in (*old.named_parameters(recurse=False), *old.named_buffers(recurse=False)):
        if not tensor.dim():
            continue  # the number of batches
        shape = [made, *tensor.shape[1:]]
        if tensor.dim() > 1 and read is not None:
            shape[1] = read
        empty = torch.empty(shape, dtype=tensor.dtype, device=tensor.device)
        setattr(new, name, nn.Parameter(empty) if isinstance(tensor, nn.Parameter) else empty)
    return new
