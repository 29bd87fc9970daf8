"""DINOv2 (Oquab et al. 2023): pre-norm, a gain (LayerScale) behind each sub-layer, a gated FFN in the giant."""

from .base import Arch, Layout, Sublayer

_ATTENTION = Sublayer(
    producers=("attention.q_proj", "attention.k_proj", "attention.v_proj"),
    consumer="attention.o_proj",
    residual="",
    core="attention",
    gain="layer_scale1.lambda1",
)
_GAIN = "layer_scale2.lambda1"
_FFN = Sublayer(producers=("mlp.fc1",), consumer="mlp.fc2", residual="norm2", gain=_GAIN)
_GATED = Sublayer(producers=("mlp.gate_proj", "mlp.up_proj"), consumer="mlp.down_proj", residual="norm2", gain=_GAIN)
_OLDER = Sublayer(  # transformers 4
    producers=("attention.attention.query", "attention.attention.key", "attention.attention.value"),
    consumer="attention.output.dense",
    residual="",
    core="attention.attention",
    gain="layer_scale1.lambda1",
)

ARCH = Arch(
    name="dinov2",
    model_types=("dinov2",),
    layouts=(
        Layout(layers="encoder.layer", attention=_ATTENTION, ffn=_FFN),
        Layout(layers="encoder.layer", attention=_ATTENTION, ffn=_GATED),
        Layout(layers="encoder.layer", attention=_OLDER, ffn=_FFN),
    ),
)
