"""The recipe of a run: a pydantic model, read from TOML, overridden by flags, stored in the bundle."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError, field_validator, model_validator

from .documents import one_line, read_toml
from .errors import InputError

Settings = TypeVar("Settings", bound=BaseModel)
MIN_SAMPLES = 64
DEMO_MODELS = ("demo", "digits-vit")  # what `demo` makes
DEFAULT_KEEP = 0.5
ALLOW_CODE = "DEPLOY_PRUNE_ALLOW_CODE"  # environment variable: modules that module.json may call into, by commas
ALLOW_PICKLE = "DEPLOY_PRUNE_ALLOW_PICKLE"  # environment variable: read torch's own files, by its restricted unpickler
PROGRAMS = "pt2"  # in ALLOW_CODE: also open a bundle's .pt2 files, which name what torch calls
ENGINES = "engines"  # in ALLOW_CODE: also open a bundle's engines, which are programs for the GPU

Augment = Literal["none", "shift", "flip"]  # what the distillation does with images


def allowed_code() -> list[str]:
    """Return what the user lets run: Python modules that checkpoints name, perhaps `PROGRAMS` and `ENGINES`."""
    return [name.strip() for name in os.environ.get(ALLOW_CODE, "").split(",") if name.strip()]


def pickle_allowed() -> bool:
    """Say whether the user lets torch's own files (.pt, .bin) be read."""
    return os.environ.get(ALLOW_PICKLE, "") not in ("", "0")


def _field(default: Any, description: str, **limits: Any) -> Any:
    return Field(default=default, description=description, **limits)


class ExportSettings(BaseModel):
    """Say which files an export makes, and how."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    formats: tuple[str, ...] = _field(
        ("auto",), "onnx, openvino, tensorrt, rtx, pt2; auto is every one whose builder is installed."
    )
    precisions: tuple[str, ...] = _field(("fp32",), "fp32, fp16, bf16, int8.")
    dialects: tuple[str, ...] = _field(("opset23",), "Of ONNX: opset18, opset23, mha.")
    schemes: tuple[str, ...] = _field(("dynamic", "qdq"), "Of int8: dynamic (ONNX Runtime's CPU), qdq (static).")
    calibrate_by: Literal["minmax", "percentile", "entropy"] = _field("minmax", "Ranges of static int8.")
    calibration_rows: int = _field(256, "Rows of the calibration set that static int8 uses.", ge=1)
    profile: str | None = _field(
        None, "A fixed shape, 1x128, or an engine's smallest:usual:largest, 1x8:1x128:8x384 (batch x tokens)."
    )
    builder_level: int | None = _field(None, "TensorRT's builder optimisation level, 0 to 5.", ge=0, le=5)
    version_compatible: bool = _field(False, "Let later versions of TensorRT load the engine.")
    hardware_compatible: bool = _field(False, "Let other GPUs (Ampere and later) load the engine.")
    refit: bool = _field(False, "Let the engine's weights be replaced later.")
    strip: bool = _field(False, "Leave the weights out of the engine; they are refitted on the target.")
    compute_capabilities: tuple[str, ...] = _field(
        (), "GPUs that rtx engines are for (8.9); none: the builder's choice."
    )
    aot_inductor: bool = _field(False, "Compile pt2 ahead of time as well (needs a C++ compiler).")
    exporter: Literal["torch", "optimum"] = _field(
        "torch", "Who writes the ONNX file: torch, or optimum (in an environment that has it)."
    )

    @field_validator("formats", "precisions", "dialects", "schemes")
    @classmethod
    def _something(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not value:
            raise ValueError("an empty list leaves nothing to export")
        return value

    @field_validator("compute_capabilities")
    @classmethod
    def _capabilities(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if wrong := [c for c in value if not re.fullmatch(r"\d+\.\d", c)]:
            raise ValueError(f"'{wrong[0]}' is no compute capability; write it as 8.9")
        return value


class BenchSettings(BaseModel):
    """Say what is measured, where, and for how long: a matrix of runtimes, batches, lengths and threads."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    models: tuple[str, ...] = _field(
        (),
        "Variants, perhaps in a precision, as sliced:int8 (default: dense,virtual,sliced; of several bundles sliced).",
    )
    runtimes: tuple[str, ...] = _field(("ort-cpu", "torch"), "Runtimes, separated by commas.")
    batches: tuple[PositiveInt, ...] = _field((1,), "Batch sizes.")
    seqs: tuple[PositiveInt, ...] = _field((), "Sequence lengths (default: the budget's).")
    threads: tuple[PositiveInt, ...] = _field((), "Numbers of threads (default: the physical cores).")
    scenarios: tuple[str, ...] = _field((), "MLPerf's: single-stream, offline, server (needs the extra loadgen).")
    seconds: float = _field(4.0, "Time for the turns of one cell, and for each scenario of each model.", gt=0)
    min_rounds: int = _field(10, "Rounds that are taken even if they need longer.", ge=2)
    warmup_seconds: float = _field(3.0, "Time limit of a cell's warm-up; it ends when the models are steady.", gt=0)
    control: bool | None = Field(
        default=None, description="Run the baseline in a second process, to see the noise (default: yes)."
    )

    @field_validator("runtimes", "batches")
    @classmethod
    def _not_empty(cls, value: tuple[Any, ...]) -> tuple[Any, ...]:
        if not value:
            raise ValueError("an empty list leaves nothing to measure")
        return value


class GateSettings(BaseModel):
    """Say what a release must keep to, and where that is measured."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    base: str | None = _field(None, "Bundle or ONNX file to compare with, run in the same job.")
    max_slowdown: float = _field(1.05, "Allowed ratio of the new model's time to the base's.", gt=0)
    max_memory: float | None = _field(None, "Allowed ratio of the new model's peak memory to the base's.", gt=0)
    max_quality_loss: float | None = _field(None, "Points of quality (0.01) that may be lost.", ge=0)
    max_latency_ms: float | None = _field(None, "Allowed median latency, whatever the base takes.", gt=0)
    max_bytes: int | None = _field(None, "Allowed size of the model's file.", gt=0)
    model: str = _field("sliced", "Which of a bundle's models: dense, sliced, sliced:int8.")
    runtime: str = _field("ort-cpu", "Runtime to measure in.")
    batch: int = _field(1, "Batch size.", ge=1)
    seq: int | None = _field(None, "Sequence length (default: the budget's, or 128).", ge=1)
    threads: int = _field(1, "Threads; a single one is disturbed least by other work.", ge=1)
    clock: Literal["auto", "wall", "cpu"] = _field("auto", "auto: the one by which the base agrees best with itself.")
    max_seconds: float = _field(120.0, "Time limit; what is sure sooner ends sooner.", gt=0)
    resolution: float = _field(0.03, "Slow-down above the limit that must not go unseen, else it is too noisy.", gt=0)


class ServeSettings(BaseModel):
    """Say how bundles are served; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    variant: Literal["dense", "virtual", "sliced"] = _field("sliced", "Which of a bundle's models.")
    runtime: str = _field("ort", "ort, openvino, tensorrt or another runtime by its name.")
    precision: Literal["fp32", "fp16", "bf16", "int8"] = _field("fp32", "Precision of the exported file.")
    threads: int | None = _field(None, "Threads of each model (default: the runtime's choice).", ge=1)
    compare: bool = _field(False, "Serve the dense model beside each bundle's, as NAME-dense.")
    host: str = _field("127.0.0.1", "Address to listen on; loopback alone by default.")
    port: int = _field(8000, "Port of HTTP; 0 takes a free one.", ge=0, le=65535)
    grpc_port: int = _field(8001, "Port of gRPC; 0 takes a free one, -1 leaves it out.", ge=-1, le=65535)
    token_file: str | None = _field(None, "File whose first line clients must give as a bearer token.")
    public_key: str | None = _field(None, "Serve only bundles that were signed by this key (minisign's format).")
    tls_cert: str | None = _field(None, "Certificate chain (PEM), for TLS.")
    tls_key: str | None = _field(None, "Private key (PEM) of the certificate.")
    batch_rows: int = _field(32, "Rows that go into one run at most.", ge=1)
    queue_rows: int = _field(256, "Rows that may wait; more are refused with 503.", ge=1)
    wait_ms: float = _field(0.0, "How long an idle model waits for company for a request.", ge=0)
    request_rows: int = _field(128, "Rows of one request at most.", ge=1)
    max_bytes: int = _field(1 << 26, "Bytes of one request at most.", ge=1024)
    request_seconds: float = _field(30.0, "Time limit of a request, queue included.", gt=0)
    drain_seconds: float = _field(30.0, "Time that running requests have when the server ends.", gt=0)
    poll: bool = _field(False, "Look for newer versions on disk every two seconds.")


class Recipe(ExportSettings):
    """Describe a run completely; unknown keys are refused."""

    model: str = Field(
        default="demo",
        description="Hub id or folder of a fine-tuned checkpoint; 'demo' (texts) and 'digits-vit' are built in.",
    )
    task: str | None = Field(
        default=None, description="Task name; inferred from the model's head where that is possible."
    )
    data: str | None = _field(None, "File or folder with the task's data; by default from the hub.")
    text_column: str | None = _field(None, "Text column, or two separated by a comma for a pair.")
    label_column: str | None = _field(None, "Label column.")
    max_length: int | None = _field(None, "Truncate rows to this many tokens.", ge=8)
    pooling: Literal["mean", "cls"] = _field("mean", "Pooling of the embedding task.")
    label_free: bool | None = Field(
        default=None,
        description="Draw labels from the model (default: where data has none, and for convolutional networks).",
    )

    keep_flops: float | None = Field(
        default=None, gt=0, le=1, description="Share of the dense encoder's FLOPs to keep (0.5 without any budget)."
    )
    keep_params: float | None = _field(None, "Share of the encoder's parameters to keep, in (0, 1].", gt=0, le=1)
    max_bytes: int | None = _field(None, "Bytes that the whole model's fp32 weights may have.", gt=0)
    keep_latency: float | None = Field(
        default=None, gt=0, le=1, description="Share of the whole model's latency to keep, by --lut."
    )
    lut: str | None = _field(None, "Latency table of this model, made by deploy-prune probe.")
    seq_len: int | None = Field(
        default=None, ge=1, description="Budget's length in tokens (default: mean of the samples)."
    )
    lengths: Literal["one", "data"] = _field(
        "one", "Bind FLOPs and latency at one length, or (data) over all samples at their own."
    )
    lengths_batch: int | None = _field(
        None, "Rows that run together, each padded to the longest; with a --lut, its batch.", ge=1
    )
    min_heads: int = _field(1, "Heads that every layer keeps at least.", ge=0)
    min_neurons: int | None = _field(
        None, "Neurons kept at least in every layer (default: a sixteenth with the refit, else 1).", ge=0
    )

    cut_residual: bool = _field(
        False, "Also cut the channels of residual streams, which many layers share (convolutional networks)."
    )
    align: int = _field(1, "Keep widths that are multiples of this: 8, 16, 32, 64.", ge=1)
    search: Literal["exact", "paper"] = _field("exact", "exact, or the paper's greedy search.")
    scope: Literal["global", "local"] = Field(
        default="global", description="Units compete in the whole model, or (local) every layer keeps the same share."
    )

    drop_layers: int | float = _field(
        0, "Whole layers to leave out, by the measured change of the loss: a number, or a share (0.25 or 25%)."
    )
    drop_sublayers: int | float = _field(
        0, "Attentions and FFNs to leave out, after the layers, likewise: a number, or a share of all."
    )
    depth_rows: int = _field(256, "Calibration rows on which each is measured.", ge=1)
    depth_order: Literal["before", "after"] = _field(
        "before", "Leave them out before the widths are searched, or after that and recovery, which then runs again."
    )

    steps: int = _field(1, "Prune in so many steps of a cubic schedule, with fresh statistics in each.", ge=1)

    samples: int = _field(2048, "Training rows to calibrate on, drawn without replacement.")
    seed: int = _field(0, "Seed of the draw.", ge=0)
    device: str = _field("auto", "auto, cpu, cuda or cuda:N.")
    forward_dtype: Literal["fp32", "bf16", "fp16"] = Field(
        default="fp32", description="Precision of calibration's forward."
    )
    criterion: str = Field(
        default="auto", description="How units are scored (auto: obs before the refit, else fisher)."
    )
    cache_gb: float = _field(
        16.0, "GB of hidden states that scores and compensation may keep; others are recomputed.", gt=0
    )
    offload: bool = _field(
        False, "Keep the layers in main memory, one at a time on the GPU: for models larger than its memory."
    )
    rearrange: Literal["auto", "sample", "batch", "none"] = _field(
        "auto", "By the Fisher of samples, of mini-batches (the paper's code), or not; auto: not before the refit."
    )
    compensate: str = _field(
        "refit", "refit, refit-parallel, mask-tuning, mask-tuning-exact or none; convolutions also fold and batch-norm."
    )
    recover_epochs: float | None = _field(
        None, "Distil the pruned model from the dense one, so many times over the rows.", gt=0
    )
    recover_minutes: float | None = _field(
        None, "Distil for so many minutes; with --recover-epochs what ends first counts.", gt=0
    )
    recover_lr: float = _field(1e-5, "Largest learning rate of the distillation.", gt=0)
    recover_samples: int | None = _field(
        None, "Training rows to distil on, a tenth of which judges (default: all, at most 16384).", ge=MIN_SAMPLES
    )
    recover_batch: int = _field(32, "Rows of one step of the distillation.", ge=1)
    recover_augment: Augment = _field(
        "none", "none, shift (images by up to an eighth, anew at each step of the distillation) or flip (mirror, too)."
    )
    recover_label_share: float = _field(
        0.0, "Share of the true labels in the distillation's loss; 0 needs no labels.", ge=0, le=1
    )
    min_agreement: float | None = Field(
        default=None, ge=0, le=1, description="Fail below this agreement with dense, 0..1."
    )
    max_quality_loss: float | None = Field(
        default=None, ge=0, description="Fail above this loss of quality, in points (0.01)."
    )

    runtimes: tuple[str, ...] = _field(("ort-cpu", "torch"), "Runtimes to measure in.")
    batches: tuple[int, ...] = _field((1,), "Batch sizes to measure at.")
    bench_seconds: float = _field(4.0, "Time limit of one latency measurement, in seconds.", gt=0)
    out: str | None = _field(None, "Folder of the bundle.")

    @field_validator("samples")
    @classmethod
    def _enough_samples(cls, value: int) -> int:
        if value < MIN_SAMPLES:
            raise ValueError(f"{value} samples are too few to calibrate on; give at least {MIN_SAMPLES}")
        return value

    @field_validator("drop_layers", "drop_sublayers", mode="before")
    @classmethod
    def _number_or_share(cls, value: Any) -> int | float:
        percent = isinstance(value, str) and value.endswith("%")
        try:
            number = float(value[:-1]) / 100 if percent else float(value)
        except (TypeError, ValueError):
            number = -1.0  # refused below
        share = 0 < number < 1
        if isinstance(value, bool) or not (share or (not percent and number >= 0 and number.is_integer())):
            raise ValueError("give a whole number, or a share in (0, 1): 0.25 or 25%")
        return number if share else int(number)

    @model_validator(mode="after")
    def _one_budget_at_least(self) -> Recipe:
        if self.keep_latency is not None and self.lut is None:
            raise ValueError("a latency budget needs a measured table (lut); deploy-prune probe makes one")
        if self.lut is not None and self.keep_latency is None:
            raise ValueError("a latency table (lut) is given, but no latency budget (keep_latency)")
        if self.lengths == "data" and self.seq_len is not None:
            raise ValueError("a budget at the data's own lengths (lengths) has no seq_len")
        if self.lengths_batch is not None and self.lengths == "one" and self.lut is None:
            raise ValueError("lengths_batch is given, but neither lengths = data nor a latency table (lut)")
        if self.keep_flops is self.keep_params is self.max_bytes is self.keep_latency is None:
            object.__setattr__(self, "keep_flops", DEFAULT_KEEP)
        if self.lengths == "data" and self.keep_flops is self.keep_latency is None:
            raise ValueError("the budget bounds neither FLOPs nor latency, which alone depend on lengths")
        return self

    @model_validator(mode="after")
    def _recovery_has_a_length(self) -> Recipe:
        given = sorted(name for name in self.model_fields_set if name.startswith("recover_"))
        if given and not self.recovers and any(getattr(self, n) != Recipe.model_fields[n].default for n in given):
            raise ValueError(f"{given[0]} is given, but neither recover_epochs nor recover_minutes switches it on")
        return self

    @property
    def recovers(self) -> bool:
        """Say whether the pruned model is distilled from the dense one."""
        return self.recover_epochs is not None or self.recover_minutes is not None

    def destination(self, task: str) -> Path:
        """Return the bundle's folder: `out`, or bundles/<model>-<task>-<keep>."""
        if self.out:
            return Path(self.out)
        if self.model in DEMO_MODELS:
            return Path("bundles") / self.model
        name = Path(self.model).name or "model"
        return Path("bundles") / f"{name}-{task}-{self._budget_name()}"

    def _budget_name(self) -> str:
        parts = {"": self.keep_flops, "params": self.keep_params, "bytes": self.max_bytes, "latency": self.keep_latency}
        lengths = f"-lengths{self.lengths_batch or 1}" if self.lengths == "data" else ""
        return "-".join(f"{kind}{value:g}" for kind, value in parts.items() if value is not None) + lengths


def load_recipe(path: str | Path | None = None, **flags: Any) -> Recipe:
    """Read a TOML recipe, let the given flags (those not None) override it, and validate. Raises InputError."""
    return load_settings(Recipe, path, "run", **flags)


def load_settings(settings: type[Settings], path: str | Path | None, command: str, **flags: Any) -> Settings:
    """Read settings from TOML, let the given flags (those not None) override them, and validate.

    Raises InputError naming the file, the key and what is allowed, and whose --help says more.
    """
    values: dict[str, Any] = {}
    if path is not None:
        try:
            values = read_toml(path)
        except OSError as error:
            raise InputError(f"Could not read the recipe {path}: {error.strerror}.") from error
        except ValueError as error:
            raise InputError(f"{path} is not valid TOML: {one_line(error)}.") from error
    values |= {k: v for k, v in flags.items() if v is not None}
    try:
        return settings.model_validate(values)
    except ValidationError as error:
        raise InputError(_explain(error, path, settings), hint=f"See: deploy-prune {command} --help") from error


def _explain(error: ValidationError, path: str | Path | None, settings: type[BaseModel]) -> str:
    lines = []
    for item in error.errors():
        key = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            lines.append(f"unknown key '{key}'; known: {', '.join(sorted(_table(settings, item['loc']).model_fields))}")
        else:
            message = item["msg"].removeprefix("Value error, ")
            shown = f"{key} = {item['input']!r:.200}: " if key else ""  # no key: several fields do not fit together
            lines.append(f"{shown}{message[0].lower()}{message[1:]}")
    where = f"The recipe {path}" if path else "The settings"
    return f"{where} cannot be used: " + "; ".join(lines) + "."


def _table(settings: type[BaseModel], place: tuple[Any, ...]) -> type[BaseModel]:
    """Return the model that a key's place lies in: the settings themselves, or one of a list of tables of theirs."""
    for name in place[:-1]:
        if name in settings.model_fields:
            kinds = [k for k in get_args(settings.model_fields[name].annotation) if isinstance(k, type)]
            settings = next((k for k in kinds if issubclass(k, BaseModel)), settings)
    return settings
