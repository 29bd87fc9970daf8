"""DistilBERT (Sanh et al. 2019): post-norm, the output projection inside the attention module."""

from .base import Arch, Layout, Sublayer

ARCH = Arch(
    name="distilbert",
    model_types=("distilbert",),
    layouts=(
        Layout(
            layers="transformer.layer",
            attention=Sublayer(
                producers=("attention.q_lin", "attention.k_lin", "attention.v_lin"),
                consumer="attention.out_lin",
                residual="",
                core="attention",
            ),
            ffn=Sublayer(producers=("ffn.lin1",), consumer="ffn.lin2", residual="ffn.lin1"),
        ),
    ),
)
