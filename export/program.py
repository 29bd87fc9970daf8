"""One ExportedProgram of a model with its head, which every ONNX dialect and the .pt2 file are made from."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ..errors import InputError, MissingExtraError
from ..signature import Signature, signature_of

if TYPE_CHECKING:
    from torch import nn

    from ..heads import Head

TRACED_SHAPE = (3, 11)  # batch, sequence: neither 0 nor 1 (torch.export fixes those), nor equal to each other


def program_from_torch(model: nn.Module, head: Head, inputs: Signature | Sequence[str]) -> Any:
    """Trace a model with its head, outputs a tuple: inputs (batch, sequence) int64, both axes free, or images
    (batch, C, H, W) float32 of the model's size.

    Raises InputError when the forward pass cannot be traced, MissingExtraError without torch.
    """
    try:
        import torch
    except ImportError as error:
        raise MissingExtraError(str(error.name), "cpu") from error
    model.eval()
    device = next(model.parameters()).device
    signature = signature_of(getattr(model, "config", None), inputs)
    rows, tokens = TRACED_SHAPE
    shape = signature.shape(rows, signature.tokens or tokens)
    batch = torch.ones(shape, dtype=torch.float32 if signature.image else torch.long, device=device)
    axes = {i: torch.export.Dim.DYNAMIC for i, axis in enumerate(signature.axes) if isinstance(axis, str)}
    with quiet(), _sdpa(model), _without_mask(model, signature), torch.no_grad():
        try:
            return torch.export.export(
                with_head(model, head, signature.inputs),
                tuple(batch.clone() for _ in signature.inputs),
                dynamic_shapes=(tuple(axes for _ in signature.inputs),),
                strict=False,
            )
        except Exception as error:  # torch's tracing errors share no base class
            reason = str(error).strip().splitlines()[0]
            raise InputError(
                f"{type(model).__name__} cannot be traced: {reason}",
                hint="Its forward pass depends on values of its inputs; see the chained error with --debug.",
            ) from error


def with_head(model: nn.Module, head: Head, input_names: Sequence[str]) -> nn.Module:
    """Wrap a model so that it takes its inputs by position and returns its head's outputs as a tuple.

    Images stay float32 whatever the model computes in.
    """
    import torch
    from torch import Tensor, nn

    dtype = next(model.parameters()).dtype

    class WithHead(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
            if dtype != torch.float32:
                inputs = tuple(x.to(dtype) if x.is_floating_point() else x for x in inputs)
            outputs = head.outputs(self.model, dict(zip(input_names, inputs, strict=True)))
            return tuple(outputs[name] for name in head.output_names)

    return WithHead().eval()


@contextmanager
def _sdpa(model: Any) -> Iterator[None]:
    """Use scaled_dot_product_attention where the model can: only that becomes an Attention node."""
    config = getattr(model, "config", None)
    before = getattr(config, "_attn_implementation", None)
    if before in (None, "sdpa") or not getattr(model, "_supports_sdpa", False):
        yield
        return
    model.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@contextmanager
def _without_mask(model: Any, signature: Signature) -> Iterator[None]:
    """Let the layers of an image model see no attention mask: transformers makes one of ones when it is traced."""
    from torch import Tensor

    from ..archs import arch_of, is_convolutional, of_transformers

    def drop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        hidden, *rest = args
        kept = {k: None if k == "attention_mask" else v for k, v in kwargs.items()}
        return (hidden, *(None if isinstance(v, Tensor) else v for v in rest)), kept

    attentive = signature.image is not None and of_transformers(model) and not is_convolutional(model)
    paths = arch_of(model).layer_paths(model) if attentive else []
    handles = [model.get_submodule(path).register_forward_pre_hook(drop, with_kwargs=True) for path in paths]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def quiet(*more: str) -> Iterator[None]:
    """Hold back the warnings and log lines of exporters and quantisers; errors are raised as ever."""
    names = ("torch.onnx", "torch.export", "transformers.modeling_utils", *more)
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
