"""BERT (Devlin et al. 2018): post-norm, separate query, key and value projections."""

from .base import Arch, Layout, Sublayer

ARCH = Arch(
    name="bert",
    model_types=("bert",),
    layouts=(
        Layout(
            layers="encoder.layer",
            attention=Sublayer(
                producers=("attention.self.query", "attention.self.key", "attention.self.value"),
                consumer="attention.output.dense",
                residual="",
                core="attention.self",
            ),
            ffn=Sublayer(producers=("intermediate.dense",), consumer="output.dense", residual="intermediate.dense"),
        ),
    ),
)
