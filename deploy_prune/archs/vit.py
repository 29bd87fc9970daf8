"""ViT (Dosovitskiy et al. 2021) and DeiT (Touvron et al. 2021): pre-norm, image patches for tokens."""

from .base import Arch, Layout, Sublayer

ARCH = Arch(
    name="vit",
    model_types=("vit", "deit"),
    layouts=(
        Layout(
            layers="layers",
            attention=Sublayer(
                producers=("attention.q_proj", "attention.k_proj", "attention.v_proj"),
                consumer="attention.o_proj",
                residual="",
                core="attention",
            ),
            ffn=Sublayer(producers=("mlp.fc1",), consumer="mlp.fc2", residual="layernorm_after"),
        ),
        Layout(  # transformers 4
            layers="encoder.layer",
            attention=Sublayer(
                producers=("attention.attention.query", "attention.attention.key", "attention.attention.value"),
                consumer="attention.output.dense",
                residual="",
                core="attention.attention",
            ),
            ffn=Sublayer(producers=("intermediate.dense",), consumer="output.dense", residual="layernorm_after"),
        ),
    ),
)
