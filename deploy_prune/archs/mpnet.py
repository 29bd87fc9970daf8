"""MPNet (Song et al. 2020): BERT's layout with a relative position bias (B, H, T, T) shared by all layers."""

from .base import Arch, Layout, Sublayer

ARCH = Arch(
    name="mpnet",
    model_types=("mpnet",),
    layouts=(
        Layout(
            layers="encoder.layer",
            attention=Sublayer(
                producers=("attention.attn.q", "attention.attn.k", "attention.attn.v"),
                consumer="attention.attn.o",
                residual="",
                core="attention.attn",
            ),
            ffn=Sublayer(producers=("intermediate.dense",), consumer="output.dense", residual="intermediate.dense"),
        ),
    ),
    select_heads="position_bias",
)
