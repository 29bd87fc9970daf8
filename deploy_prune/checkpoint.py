"""Load dense checkpoints, save sliced ones, and load them again strictly."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from . import modeling_sliced
from .archs import check_prunable, config_of, of_transformers
from .bounds import LARGEST_CUT, bounded_weights, check_counts
from .bundle import Bundle, Variant
from .config import pickle_allowed
from .disk import disk_errors, sha256_file, share
from .documents import one_line, read_json
from .errors import BundleError, InputError, SystemStateError, UnsupportedModelError
from .heads import Head
from .image_settings import SETTINGS
from .images import ImageProcessor, check_fit
from .masking import OutputWeights
from .module_checkpoint import FILE, WEIGHTS, ModuleConfig, check_stored, load_module, read_module_config, save_module
from .renaming import renamed
from .signature import Signature, image_signature, takes_images, token_inputs
from .surgery import ChannelSurgery, surgery_of_plan
from .tasks.base import HeadKind

AUTO_CLASSES: dict[HeadKind, str] = {
    "classification": "AutoModelForSequenceClassification",
    "regression": "AutoModelForSequenceClassification",
    "token": "AutoModelForTokenClassification",
    "qa": "AutoModelForQuestionAnswering",
    "embedding": "AutoModel",
}
IMAGE_CLASS = "AutoModelForImageClassification"
UNSEEN_WEIGHTS = 1 << 30  # of a model whose safetensors the hub makes as they are asked for


@dataclass
class Dense:
    """Hold a loaded dense model in fp32 evaluation mode, its tokenizer or image processor, and its weights' origin."""

    model: Any
    processor: Any
    source: str
    sha256: str

    @property
    def config(self) -> Any:
        """Return the model's transformers config, or its `ModuleConfig`."""
        return config_of(self.model)

    @property
    def pad_id(self) -> int:
        """Return the token id that rows are padded with; 0 for images."""
        return int(getattr(self.processor, "pad_token_id", None) or 0)

    @property
    def preparing(self) -> dict[str, Any]:
        """Return what `load_task` is given to prepare inputs by: the tokenizer, or the image processor."""
        return preparing(self.processor)

    @property
    def signature(self) -> Signature:
        """Return what the model takes, as its tokenizer or image processor makes it."""
        return input_signature(self.model, self.processor)


def load_config(source: str) -> Any:
    """Read a model's config and refuse what cannot be pruned. Raises InputError or UnsupportedModelError."""
    with _loading(source):
        folder = _module_folder(source)
        config: Any = read_module_config(folder) if folder else _read_config(source)
    check_prunable(config)
    return config


def load_dense(source: str, head: HeadKind) -> Dense:
    """Load a fine-tuned checkpoint from a hub id or a local folder, with the head that the task needs.

    Models compute in fp32 whatever the file holds. Raises InputError when it is not there, lacks
    weights (a head that was never trained), or holds NaN or Inf.
    """
    config = load_config(source)
    images = takes_images(config)
    if images and head != "classification":
        raise InputError(f"{source} takes images: it can only classify them here.", hint="Name an image task.")
    if isinstance(config, ModuleConfig):
        with _loading(source), bounded_weights(source, _weight_bytes(source)):
            model, processor = load_module(str(_module_folder(source))), load_processor(source, config)
        check_weights(model, source)
        return Dense(model, processor, source, _hash_source(source))
    auto = getattr(transformers, IMAGE_CLASS if images else AUTO_CLASSES[head])
    _refuse_pickles(source)
    safe = {"use_safetensors": None if pickle_allowed() else True, "weights_only": True, "trust_remote_code": False}
    with _loading(source), quiet_transformers(), bounded_weights(source, _weight_bytes(source)):
        model, info = auto.from_pretrained(source, dtype=torch.float32, output_loading_info=True, **safe)
        processor = load_processor(source, config)
    missing = sorted(k for k in info["missing_keys"] if not (head == "embedding" and "pooler" in k))
    if missing:
        raise InputError(
            f"{source} has no weights for {', '.join(missing[:4])}: {type(model).__name__} was not fine-tuned.",
            hint="Fine-tune it for the task first, or name the task that the checkpoint was made for.",
        )
    if head == "embedding" and getattr(model, "pooler", None) is not None:
        model.pooler = None  # embeddings are pooled from the hidden states
    check_weights(model, source)
    return Dense(model.eval(), processor, source, _hash_source(source))


def load_processor(source: str, config: Any) -> Any:
    """Load the tokenizer or image processor of a checkpoint, from a hub id or a local folder.

    Raises InputError for a folder without preprocessor_config.json, or with one that does not fit the model.
    """
    if not takes_images(config):
        return transformers.AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    if getattr(config, "processor", None):
        return ImageProcessor.from_dict(config.processor, config)
    local = Path(source).is_dir()
    folder = Path(source) if local else Path(str(transformers.utils.cached_file(source, SETTINGS))).parent
    processor = ImageProcessor.from_folder(folder, config)
    check_fit(processor, config)
    return processor


def check_weights(model: nn.Module, source: str) -> None:
    """Raise InputError, naming the first tensor, when a weight is NaN or Inf."""
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise InputError(f"{source}: the weights of {name} hold NaN or Inf.", hint="Use an intact checkpoint.")


def preparing(processor: Any) -> dict[str, Any]:
    """Return a tokenizer or an image processor under the name that `load_task` knows it by."""
    return {"processor" if isinstance(processor, ImageProcessor) else "tokenizer": processor}


def input_signature(model: nn.Module, processor: Any) -> Signature:
    """Return the model inputs that its tokenizer or image processor makes, in the tokenizer's order."""
    if isinstance(processor, ImageProcessor):
        return image_signature(config_of(model), processor.output_size)
    return Signature(token_inputs(processor.model_input_names, config_of(model)))


def save_sliced(model: nn.Module, processor: Any, folder: Path) -> list[Path]:
    """Write a sliced model as a transformers folder that also loads with trust_remote_code.

    Returns the files: safetensors, config, tokenizer or image processor, and modeling_sliced.py; of a model that is
    no transformer those of `save_module`.
    """
    if not of_transformers(model):
        return sorted(save_module(model, folder, processor=processor))
    config: Any = model.config
    stock = type(model).__name__
    auto = next(name for name in (*AUTO_CLASSES.values(), IMAGE_CLASS) if _is_mapped(name, stock))
    config.auto_map = {auto: f"modeling_sliced.Sliced{stock}"}
    config.architectures = [stock]
    config.dtype = "float32"
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        config.save_pretrained(folder)
        processor.save_pretrained(folder)
        state = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        share(folder / "model.safetensors")
        code = Path(modeling_sliced.__file__).read_text("utf-8")
        (folder / "modeling_sliced.py").write_text(code + _SLICED_CLASS.format(stock=stock), encoding="utf-8")
    return sorted(p for p in folder.iterdir() if p.is_file())


_SLICED_CLASS = '''

import transformers  # noqa: E402


class Sliced{stock}(transformers.{stock}):
    """The stock class with the sizes that this folder's config.json names."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        try:
            resize(self, config.deploy_prune)
        except AttributeError as error:
            raise ValueError(
                f"This model was cut under transformers {{config.transformers_version}}, whose modules have other"
                f" names than in {{transformers.__version__}}: use that release, or load it by deploy_prune.load."
            ) from error
'''


def load_sliced(folder: Path) -> Any:
    """Rebuild a sliced model from its folder, every tensor strictly as saved."""
    if (folder / FILE).is_file():
        with bounded_weights(folder, LARGEST_CUT * _weight_bytes(str(folder))):
            return load_module(folder)
    with _loading(str(folder)):
        config = _read_config(str(folder))
    spec = getattr(config, "deploy_prune", None)
    kind = getattr(transformers, str((getattr(config, "architectures", None) or [""])[0]), None)
    if not spec or not isinstance(kind, type) or not issubclass(kind, transformers.PreTrainedModel):
        raise BundleError(f"{folder}/config.json does not describe a sliced model.", hint="Make the bundle again.")

    def cut(model: Any, stored: dict[str, Any]) -> dict[str, Any]:
        own, found = renamed(model, spec, stored)
        modeling_sliced.resize(model, own)
        model.config.deploy_prune = own
        return found

    path = folder / "model.safetensors"
    check_stored(lambda: kind(config), cut, path, layers=int(getattr(config, "num_hidden_layers", 0)))
    model = kind(config)
    try:
        model.load_state_dict(cut(model, load_file(path)), strict=True)
    except (RuntimeError, OSError) as error:
        raise BundleError(f"{folder} does not hold the weights its config describes: {error}") from error
    return model.eval()


def _refuse_pickles(source: str) -> None:
    """Raise InputError for a folder whose weights are pickles alone, unless they are allowed."""
    names = [p.name for p in Path(source).glob("*") if p.suffix in (".safetensors", ".bin", ".pt", ".pth")]
    if names and not pickle_allowed() and not any(name.endswith(".safetensors") for name in names):
        raise InputError(
            f"The weights in {source} are pickles ({', '.join(sorted(names)[:3])}).",
            hint="deploy-prune --allow-pickle reads them by torch's restricted unpickler; better, save safetensors.",
        )


def head_of(bundle: Bundle) -> Head:
    """Return the head that a bundle's models carry."""
    task = bundle.manifest.task
    return Head(task["head"], pooling=task.get("pooling") or "mean")


def load_variant(bundle: Bundle, variant: Variant = "sliced") -> Any:
    """Load one variant of a bundle as a torch model in evaluation mode.

    dense and virtual need the original checkpoint. Raises BundleError when it has moved or changed.
    """
    if variant == "sliced":
        return load_sliced(bundle.path("sliced"))
    origin = bundle.manifest.model
    try:
        dense = load_dense(origin["source"], bundle.manifest.task["head"])
    except InputError as error:
        raise BundleError(
            f"The dense model of this bundle cannot be loaded from {origin['source']}: {error.message}",
            hint="Put the original checkpoint back, or work with the sliced variant alone.",
        ) from error
    if dense.sha256 != origin["sha256"]:
        raise BundleError(
            f"The checkpoint at {origin['source']} has changed since this bundle was made.",
            hint="Restore it, or make the bundle again.",
        )
    if variant == "dense":
        return dense.model
    return virtual_of(dense.model, load_sliced(bundle.path("sliced")), bundle)


def virtual_of(dense: nn.Module, sliced: nn.Module, bundle: Bundle) -> nn.Module:
    """Rebuild the virtual model from the dense one, the plan, and those weights of the sliced one that differ."""
    plan, image = bundle.plan(), Signature.of_manifest(bundle.manifest.model).image
    surgery = surgery_of_plan(dense, plan, image)
    if bundle.manifest.plan.get("recovered") or isinstance(surgery, ChannelSurgery):
        return surgery.restore(plan, sliced.state_dict())
    updates = {}
    for g in surgery.groups:
        if g.name in bundle.manifest.plan.get("refitted", []):
            state = sliced.state_dict()
            empty = not plan[g.name].count
            bias = state[f"{g.stand_in if empty else g.consumer}.bias"]
            weight = bias.new_zeros(g.hidden, 0) if empty else state[f"{g.consumer}.weight"]
            updates[g.name] = OutputWeights(weight, bias)
    return surgery.mask(plan, updates)


def _module_folder(source: str) -> Path | None:
    """Return the local folder of a model that is none of transformers, from the hub if need be, or None."""
    folder: Path | None = Path(source)
    if not Path(source).is_dir():
        found = next(filter(None, (_hub_file(source, name) for name in ("config.json", FILE))), None)
        folder = Path(found).parent if found else None
    if folder is None or read_module_config(folder) is None:
        return None
    if not (folder / WEIGHTS).is_file() and _hub_file(source, WEIGHTS) is None:
        raise InputError(f"{source} has no {WEIGHTS}.", hint="Weights in other files are not read: save them so.")
    return folder


def _read_config(source: str) -> Any:
    """Read a config of transformers, unless it asks for lists that would fill the memory."""
    if (path := _hub_file(source, "config.json")) is not None:
        check_counts(path)
    return transformers.AutoConfig.from_pretrained(source, trust_remote_code=False)


def _weight_bytes(source: str) -> int:
    """Return how many bytes of weights a checkpoint has, got from the hub if need be: it has no more weights."""
    if Path(source).is_dir():
        files = [p for p in Path(source).rglob("*") if p.suffix in (".safetensors", ".bin") and p.is_file()]
        return sum(p.stat().st_size for p in files)
    names = [WEIGHTS]
    if (index := _hub_file(source, f"{WEIGHTS}.index.json")) is not None:
        listed = read_json(index)
        if not isinstance(listed, dict) or not isinstance(listed.get("weight_map"), dict):
            raise ValueError(f"{WEIGHTS}.index.json lists no files of weights")
        names = sorted(set(map(str, listed["weight_map"].values())))
    found = [_hub_file(source, name) for name in names]
    return sum(Path(path).stat().st_size for path in found if path) or UNSEEN_WEIGHTS


def _hub_file(source: str, name: str) -> str | None:
    path: str | None = transformers.utils.cached_file(source, name, _raise_exceptions_for_missing_entries=False)
    return path


def _is_mapped(auto_name: str, class_name: str) -> bool:
    mapping = getattr(transformers, auto_name)._model_mapping
    return any(class_name in str(v) for v in mapping._model_mapping.values())


def _hash_source(source: str) -> str:
    folder = Path(source)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(source, local_files_only=True, allow_patterns=["*.safetensors", "*.bin"]))
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    return "+".join(sha256_file(f) for f in files)


@contextmanager
def _loading(source: str) -> Iterator[None]:
    local = Path(source)
    looks_local = source.startswith((".", "/", "~")) or source.count("/") > 1 or local.exists()
    if looks_local and not local.is_dir():
        raise InputError(
            f"No model folder at {source}.", hint="Give a folder with config.json and weights, or a hub id."
        )
    try:
        yield
    except UnsupportedModelError:
        raise
    except OSError as error:
        lines = str(error).strip().splitlines()
        text = lines[0] if lines else type(error).__name__
        if looks_local:
            raise InputError(f"Could not load {source}: {text}", hint="Is the folder complete?") from error
        raise SystemStateError(
            f"Could not get {source} from the hub: {text}",
            hint="Check the name and the network, or download it and give its folder.",
        ) from error
    except (ValueError, KeyError) as error:
        raise UnsupportedModelError(f"Could not load {source}: {error}") from error
    except RuntimeError as error:  # other shapes than those of the config, or one that no memory holds
        raise InputError(
            f"Could not load {source}: {one_line(error)}", hint="Do config.json and the weights belong together?"
        ) from error


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers' own bars and warnings off the screen; errors stay."""
    logging = transformers.utils.logging
    level = logging.get_verbosity()
    bars = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
