"""TensorRT and TensorRT-RTX engines from the ONNX file, by one builder written against what both share."""

from __future__ import annotations

import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from platformdirs import user_cache_path

from ..bundle import Artifact
from ..errors import InputError, SystemStateError, VerdictError
from ..runtimes import Runner
from ..runtimes.engine import API, RTX, TENSORRT, EngineRunner, gpu_name, load_api, missing_gpu
from ..signature import Signature
from .registry import Kind, Options, Profile, Shape, Source

DIALECT = "opset23"  # of the ONNX file that engines are built from
LARGEST_BATCH, LONGEST = 8, 512


@dataclass(frozen=True)
class EngineExporter:
    """Write a serialised engine.

    TensorRT builds for the GPU that is here and needs one; TensorRT-RTX builds ahead of time, without, and
    compiles its kernels where the engine is loaded.
    """

    api: API
    suffix = ".engine"

    @property
    def packages(self) -> tuple[str, ...]:
        return ("torch", "onnx", "onnxscript", self.api.package)

    def missing(self) -> Exception | None:
        try:
            load_api(self.api)
        except Exception as error:
            return error
        if self.api.needs_gpu_to_build and (reason := missing_gpu()):
            return SystemStateError(
                f"TensorRT builds engines on the GPU that runs them: {reason}.",
                hint="Build on the target machine, or export rtx, which is built without a GPU.",
            )
        return None

    def kinds(self, precision: str, options: Options) -> Sequence[Kind] | str:
        if precision == "bf16":
            return "its ONNX file could not be checked: ONNX Runtime's CPU provider does not compute in bf16"
        if precision == "int8" and "qdq" not in options.schemes:
            return "engines take static int8 only (--scheme qdq)"
        scheme = "qdq" if precision == "int8" else None
        return [Kind(self.api.format, DIALECT, precision, scheme, options.shape)]

    def export(self, kind: Kind, source: Source, path: Path) -> Mapping[str, Any]:
        onnx_kind = Kind("onnx", kind.dialect, kind.precision, kind.scheme, kind.shape)
        onnx_file, options = source.made(onnx_kind), source.options
        profile = _profile(source, kind.shape)
        if (options.refit or options.strip) and (reason := missing_gpu()):
            raise SystemStateError(f"Engines to refit or to strip are built on a GPU: {reason}.", hint="Leave it out.")
        trt = load_api(self.api)
        log = _log(trt)
        builder = trt.Builder(log)
        network = _parsed(trt, builder, log, onnx_file)
        _allow_decomposition(trt, network)
        _check_signature(network, source)
        config = builder.create_builder_config()
        flags = _configure(trt, builder, config, network, source, profile)
        cache = self._timing_cache(trt, config)
        started = time.perf_counter()
        engine = builder.build_serialized_network(network, config)
        if engine is None:
            raise VerdictError(f"{self.api.title} could not build the engine: {log.errors()}")
        path.write_bytes(memoryview(engine))
        if cache is not None:
            cache.parent.mkdir(parents=True, exist_ok=True)
            fresh = cache.with_suffix(".new")
            fresh.write_bytes(memoryview(config.get_timing_cache().serialize()))
            fresh.replace(cache)
        return {
            "source": onnx_kind,
            "engine": {
                "builder": self.api.package,
                "version": trt.__version__,
                "gpu": gpu_name() if self.api.needs_gpu_to_build else None,
                "compute_capabilities": list(options.compute_capabilities),
                "profile": str(profile),
                "flags": flags,
                "inputs": {t.name: str(t.dtype).rpartition(".")[2] for t in _tensors(network, "input")},
                "outputs": {t.name: str(t.dtype).rpartition(".")[2] for t in _tensors(network, "output")},
                "seconds": round(time.perf_counter() - started, 2),
            },
            "reproduce": self._commands(profile, options, source.signature),
        }

    def _timing_cache(self, trt: Any, config: Any) -> Path | None:
        """Load the timings of earlier builds with this version on this GPU; RTX times nothing when it builds."""
        if not self.api.needs_gpu_to_build:
            return None
        gpu = (gpu_name() or "gpu").replace(" ", "-")
        path = user_cache_path("deploy_prune") / "timing" / f"{self.api.package}-{trt.__version__}-{gpu}.cache"
        config.set_timing_cache(config.create_timing_cache(path.read_bytes() if path.is_file() else b""), False)
        return path

    def _commands(self, profile: Profile, options: Options, signature: Signature) -> list[str]:
        """Return command lines that build the engine again; {onnx} and {engine} are filled in by the bundle."""

        def shapes(shape: Shape) -> str:
            return ",".join(f"{n}:{'x'.join(map(str, size))}" for n, size in signature.shapes(*shape).items())

        ranges = {"min": profile.smallest, "opt": profile.usual, "max": profile.largest}
        first = [self.api.command, "--onnx={onnx}", "--saveEngine={engine}", "--skipInference"]
        first += [f"--{name}Shapes={shapes(shape)}" for name, shape in ranges.items()]
        if options.builder_level is not None:
            first.append(f"--builderOptimizationLevel={options.builder_level}")
        first += [f for f, wanted in (("--refit", options.refit), ("--stripWeights", options.strip)) if wanted]
        first += ["--versionCompatible"] if options.version_compatible else []
        first += ["--hardwareCompatibilityLevel=ampere+"] if options.hardware_compatible else []
        lines = [shlex.join(first)]
        if self.api.format == "tensorrt":
            second = ["polygraphy", "convert", "{onnx}", "--convert-to", "trt", "-o", "{engine}"]
            for name, shape in ranges.items():
                sizes = signature.shapes(*shape).items()
                second += [f"--trt-{name}-shapes", *(f"{n}:[{','.join(map(str, size))}]" for n, size in sizes)]
            lines.append(shlex.join(second))
        lines.append("# IAttention.decomposable was set, which no flag of these tools does")
        return lines

    def runner(self, artifact: Artifact, path: Path) -> Runner | str:
        return missing_gpu() or EngineRunner(path, self.api, artifact.engine)

    def rename_data(self, path: Path, name: str) -> None:
        """Do nothing: an engine is one file."""


def _log(trt: Any) -> Any:
    class Log(trt.ILogger):
        """Keep the messages: what went wrong is said there only."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.messages: list[tuple[Any, str]] = []

        def log(self, severity: Any, message: str) -> None:
            self.messages.append((severity, message))

        def errors(self) -> str:
            bad = (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR)
            return "; ".join(text for severity, text in self.messages if severity in bad) or "it gave no reason"

    return Log()


def _parsed(trt: Any, builder: Any, log: Any, onnx_file: Path) -> Any:
    """Parse an ONNX file into a network. Raises VerdictError with the parser's report of what it does not support."""
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, log)
    if parser.parse_from_file(str(onnx_file)):
        return network
    reasons = []
    for index in range(parser.num_errors):
        error = parser.get_error(index)
        reasons.append(f"{error.node_operator() or 'the graph'} {error.node_name()}: {error.desc()}".strip())
    report = "; ".join(dict.fromkeys(reasons)) or log.errors()
    raise VerdictError(
        f"The parser does not support this graph: {report}",
        hint="Another --dialect may do: opset18 has no Attention nodes.",
    )


def _allow_decomposition(trt: Any, network: Any) -> None:
    """Let attention fall apart into products and a softmax where there is no fused kernel (fp32, narrow heads)."""
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type == trt.LayerType.ATTENTION_INPUT:
            layer.__class__ = trt.IAttentionInputLayer  # the binding hands out the base class
            layer.attention.decomposable = True


def _tensors(network: Any, side: str) -> list[Any]:
    count, get = getattr(network, f"num_{side}s"), getattr(network, f"get_{side}")
    return [get(index) for index in range(count)]


def _check_signature(network: Any, source: Source) -> None:
    """Raise VerdictError unless the network has the inputs and outputs of the model."""
    found = [[t.name for t in _tensors(network, side)] for side in ("input", "output")]
    wanted = [list(source.input_names), list(source.head.output_names)]
    if found != wanted:
        raise VerdictError(f"The engine's inputs and outputs are {found}, not {wanted}.")


def _configure(trt: Any, builder: Any, config: Any, network: Any, source: Source, profile: Profile) -> list[str]:
    """Set the profile and the options; return the names of the flags that were set."""
    options, ends = source.options, (profile.smallest, profile.usual, profile.largest)
    shapes = builder.create_optimization_profile()
    for tensor in _tensors(network, "input"):
        shapes.set_shape(tensor.name, *(source.signature.shape(*end) for end in ends))
    if config.add_optimization_profile(shapes) < 0:
        raise InputError(f"The builder refuses the profile {profile}.", hint="Give another --profile.")
    wanted = {"VERSION_COMPATIBLE": options.version_compatible, "REFIT": options.refit, "STRIP_PLAN": options.strip}
    for name in (flags := [name for name, on in wanted.items() if on]):
        config.set_flag(getattr(trt.BuilderFlag, name))
    config.clear_flag(trt.BuilderFlag.TF32)  # fp32 means fp32
    if options.builder_level is not None:
        config.builder_optimization_level = options.builder_level
    if options.hardware_compatible:
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
        flags.append("AMPERE_PLUS")
    if options.compute_capabilities:
        if not hasattr(trt, "ComputeCapability"):
            raise InputError("Only rtx takes compute capabilities.", hint="TensorRT builds for the GPU that is here.")
        names = [f"SM{c.replace('.', '')}" for c in options.compute_capabilities]
        if unknown := [n for n in names if not hasattr(trt.ComputeCapability, n)]:
            there = [n for n in dir(trt.ComputeCapability) if n.startswith("SM")]
            raise InputError(f"No compute capability {unknown[0]}.", hint=f"There are: {', '.join(there)}.")
        config.num_compute_capabilities = len(names)
        for index, name in enumerate(names):
            config.set_compute_capability(getattr(trt.ComputeCapability, name), index)
    return flags


def _profile(source: Source, shape: Shape | None) -> Profile:
    """Return the profile asked for, or one from (1, 1) to what the model takes, with the budget's length as usual."""
    from ..archs import max_positions

    if shape is not None:
        return Profile(shape, shape, shape)
    limit = max_positions(source.model)
    if (profile := source.options.profile) is not None:
        if profile.largest[1] > limit:
            raise InputError(f"The profile {profile} is longer than the model's {limit} positions.")
        return profile
    if tokens := source.signature.tokens:
        return Profile((1, tokens), (1, tokens), (LARGEST_BATCH, tokens))
    longest = min(LONGEST, limit)
    return Profile((1, 1), (1, min(source.usual_length, longest)), (LARGEST_BATCH, longest))


EXPORTERS = {api.format: EngineExporter(api) for api in (TENSORRT, RTX)}
