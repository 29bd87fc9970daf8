"""Read and write bundles: a folder whose manifest.json names every file with its hash. No torch here.

A new bundle comes into its place as a whole (`publishing`). Later stages add files under names that carry their content
hash and then replace manifest.json alone (`Bundle.commit`): the manifest is the commit point, a file it does not name
does not exist.
"""

from __future__ import annotations

import math
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, field_validator

from .disk import disk_errors, fsync, sha256_file, share, write_atomically
from .documents import one_line, parse_json, read_json, read_text
from .errors import BundleError
from .signing import SIGNATURE, check_signature

if TYPE_CHECKING:
    from .units import SlicePlan

SCHEMA_VERSION = "1.0"
Variant = Literal["dense", "virtual", "sliced"]
VARIANTS: tuple[Variant, ...] = ("dense", "virtual", "sliced")
PRECISIONS = ("fp32", "fp16", "bf16", "int8")


class _Model(BaseModel):
    model_config = ConfigDict(extra="allow", protected_namespaces=(), defer_build=True)  # built at the first use


class Parity(_Model):
    """Say whether an artifact was compared with the model it was made from."""

    status: Literal["passed", "not_run"]
    max_abs: float | None = None
    agreement: float | None = None  # share of equal predictions on the golden rows
    reason: str | None = None


class Artifact(_Model):
    """Describe one exported file; `path` is relative to the bundle."""

    variant: Variant
    format: str
    dialect: str
    scheme: str | None = None
    precision: str
    shape: tuple[int, int] | None = None  # a fixed batch and sequence; None: both are free
    path: str
    sha256: str
    data_path: str | None = None  # weights beside the file: of ONNX above 2 GB, of OpenVINO's IR
    key: str | None = None  # hash of all that the file was made from
    source: str | None = None  # the artifact that this one was built from
    parity: Parity
    quality: dict[str, Any] | None = None  # of lower precisions, on the evaluation rows
    signature: dict[str, list[Any]] = Field(default_factory=dict)  # inputs and outputs, where the file has no names
    engine: dict[str, Any] | None = None  # builder, versions, profile and GPUs of an engine
    reproduce: list[str] = Field(default_factory=list)  # command lines that build it again from `source`

    @field_validator("quality")
    @classmethod
    def _quality_is_whole(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        if value is None:
            return None
        to_fp32 = value.get("to_fp32")
        if not isinstance(to_fp32, dict) or "metric" not in value:
            raise ValueError("needs metric and to_fp32")
        for number in (value.get("value"), value.get("fp32"), to_fp32.get("agreement")):
            if number is not None and (type(number) not in (int, float) or abs(number) > sys.float_info.max):
                raise ValueError("holds what is no number")
        return value

    @property
    def label(self) -> str:
        """Say what sort of file it is: onnx opset23 int8 qdq."""
        shape = f"{self.shape[0]}x{self.shape[1]}" if self.shape else None
        return " ".join(filter(None, (self.format, self.dialect, self.precision, self.scheme, shape)))

    def quality_text(self) -> str:
        """Say what a lower precision costs: its metric beside fp32's, and the agreement with fp32."""
        if self.quality is None:
            return ""
        parts, metric = [], self.quality["metric"]
        if metric is not None:
            found = [self.quality.get(name) for name in ("value", "fp32")]
            value, fp32 = (math.nan if n is None else n for n in found)  # as JSON has it
            parts.append(f"{metric} {value:.4f} (fp32 {fp32:.4f})")
        if (agreement := self.quality["to_fp32"].get("agreement")) is not None:
            parts.append(f"agreement with fp32 {agreement:.4f}")
        return ", ".join(parts)


class Stage(_Model):
    """Record one stage that ran."""

    name: str
    seconds: float


class Manifest(_Model):
    """Hold the contents of manifest.json; unknown keys of a newer minor version are kept."""

    schema_version: str = SCHEMA_VERSION
    versions: dict[str, str] = Field(default_factory=dict)
    model: dict[str, Any] = Field(default_factory=dict)
    task: dict[str, Any] = Field(default_factory=dict)
    budget: dict[str, Any] = Field(default_factory=dict)
    recipe: dict[str, Any] = Field(default_factory=dict)
    stages: list[Stage] = Field(default_factory=list)
    plan: dict[str, Any] = Field(default_factory=dict)
    counts: dict[str, dict[str, int]] = Field(default_factory=dict)
    quality: dict[str, dict[str, Any]] = Field(default_factory=dict)
    fidelity: dict[str, Any] = Field(default_factory=dict)
    artifacts: list[Artifact] = Field(default_factory=list)
    golden: list[dict[str, Any]] = Field(default_factory=list)
    files: dict[str, str] = Field(default_factory=dict)  # path relative to the bundle -> sha256


@dataclass
class GoldenCase:
    """Hold one batch of inputs, (B, T) int64 or (B, C, H, W) float32, and each variant's outputs on it, float32."""

    inputs: dict[str, np.ndarray]
    outputs: dict[str, dict[str, np.ndarray]]  # variant -> output name -> array


class Bundle:
    """Give access to the files of a bundle folder through its manifest."""

    def __init__(self, root: Path, manifest: Manifest) -> None:
        self.root = root
        self.manifest = manifest

    @classmethod
    def open(cls, root: str | Path, *, verify: bool = True, public_key: Path | None = None) -> Bundle:
        """Open a bundle and check every hash; with `public_key` also that it was signed, and has no other files.

        Raises BundleError when it is missing, corrupted, not signed by that key, or of a newer major schema version.
        """
        root = Path(root)
        path = root / "manifest.json"
        if not path.is_file():
            raise BundleError(
                f"No bundle at {root}: it has no manifest.json.",
                hint="Make one with: deploy-prune run MODEL --out " + str(root),
            )
        try:
            text = read_text(path)
            if public_key is not None:
                check_signature(root, text.encode(), public_key)
            manifest = Manifest.model_validate(parse_json(text))
            manifest.model_dump_json()  # half of a surrogate pair can be read, but not be written again
        except ValueError as error:  # pydantic's is one
            raise BundleError(
                f"{path} is not a valid manifest: {one_line(error)}", hint="Make the bundle again."
            ) from error
        major = manifest.schema_version.split(".")[0]
        if not re.fullmatch("[0-9]{1,9}", major) or int(major) > int(SCHEMA_VERSION.split(".")[0]):
            raise BundleError(
                f"{path} has schema version {manifest.schema_version:.40}; this version reads up to {SCHEMA_VERSION}.",
                hint="Upgrade deploy-prune.",
            )
        bundle = cls(root, manifest)
        if public_key is not None:
            bundle.refuse_strays()
        if verify or public_key is not None:
            for name, digest in manifest.files.items():
                bundle.verify(name, digest)
        return bundle

    def path(self, relative: str) -> Path:
        """Resolve a path of the manifest; it may not leave the folder."""
        try:
            path = (self.root / relative).resolve()
            path.is_file()
        except (OSError, RuntimeError, ValueError) as error:  # too long, a loop of links, a zero byte
            raise BundleError(f"The manifest of {self.root} names no path: {relative!r:.80} ({error!s:.80})") from error
        if not path.is_relative_to(self.root.resolve()):
            raise BundleError(f"The manifest of {self.root} names a path outside the bundle: {relative:.200}")
        return path

    def verify(self, relative: str, digest: str) -> None:
        """Check one file against its SHA-256."""
        path = self.path(relative)
        if not path.is_file():
            raise BundleError(f"The bundle {self.root} lacks {relative}.", hint="Make the bundle again.")
        if (found := sha256_file(path)) != digest:
            raise BundleError(
                f"{relative} in the bundle {self.root} is corrupted (sha256 {found[:12]}, expected {digest[:12]}).",
                hint="Make the bundle again, or copy it again from where it came.",
            )

    def refuse_strays(self) -> None:
        """Raise BundleError for a file that the manifest does not name: libraries may read it all the same."""
        known = {"manifest.json", SIGNATURE, *self.manifest.files}
        for path in sorted(self.root.rglob("*")):
            name = path.relative_to(self.root).as_posix()
            if name not in known and (path.is_symlink() or not path.is_dir()):
                raise BundleError(
                    f"The bundle {self.root} has the file {name}, which its signed manifest does not name.",
                    hint="Remove it, or get the bundle again from where it was made.",
                )

    def plan(self) -> SlicePlan:
        """Read plan.json."""
        from .units import SlicePlan

        path = self.path("plan.json")
        try:
            return SlicePlan.from_dict(read_json(path))
        except (OSError, ValueError) as error:
            raise BundleError(f"{path} cannot be read: {one_line(error)}", hint="Make the bundle again.") from error

    def add_file(self, source: Path, folder: str, stem: str) -> str:
        """Move a file into the bundle under a name that carries its content hash; return its path.

        It exists for readers once `commit` has written the manifest that names it.
        """
        digest = sha256_file(source)
        return self.add_as(
            source, f"{folder}/{stem}-{digest[:12]}{source.suffix}" if folder else f"{stem}{source.suffix}"
        )

    def add_as(self, source: Path, relative: str) -> str:
        """Move a file into the bundle under a name that tells its contents from others'; return that name."""
        digest = sha256_file(source)
        target = self.path(relative)
        with disk_errors(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            fsync(source)
            shutil.move(source, target)
        self.manifest.files[relative] = digest
        return relative

    def register(self, relative: str) -> None:
        """Name a file already in place (staging only) in the manifest."""
        path = self.path(relative)
        fsync(path)
        self.manifest.files[relative] = sha256_file(path)

    def artifact_bytes(self, artifact: Artifact) -> int:
        """Return the size of an artifact with its companion, in bytes."""
        return sum(self.path(p).stat().st_size for p in (artifact.path, artifact.data_path) if p)

    def golden(self) -> list[GoldenCase]:
        """Read the golden cases: inputs and each variant's outputs at several shapes and paddings."""
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        cases = []
        for entry in self.manifest.golden:
            try:
                tensors = load_file(self.path(entry["path"]))
            except (KeyError, TypeError, OSError, SafetensorError) as error:
                raise BundleError(
                    f"A golden case of {self.root} cannot be read: {one_line(error)}", hint="Make the bundle again."
                ) from error
            case = GoldenCase({}, {})
            for key, array in tensors.items():
                owner, _, name = key.partition(".")
                target = case.inputs if owner == "input" else case.outputs.setdefault(owner, {})
                target[name] = array
            cases.append(case)
        return cases

    def add_golden(self, case: GoldenCase) -> None:
        """Store one golden case as golden/case<N>-<hash>.safetensors."""
        from safetensors.numpy import save_file

        tensors = {f"input.{name}": array for name, array in case.inputs.items()}
        for variant, outputs in case.outputs.items():
            tensors |= {f"{variant}.{name}": array for name, array in outputs.items()}
        temporary = self.root / ".golden.safetensors"
        with disk_errors(temporary):
            save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, temporary)
            share(temporary)
        stem = f"case{len(self.manifest.golden)}"
        self.manifest.golden.append({"path": self.add_file(temporary, "golden", stem)})

    def commit(self) -> None:
        """Replace manifest.json atomically; remove files that it does not name, and the signature of what it was."""
        path, text = self.root / "manifest.json", self.manifest.model_dump_json(indent=2) + "\n"
        changed = not path.is_file() or path.read_bytes() != text.encode()
        write_atomically(path, text)
        if changed:
            (self.root / SIGNATURE).unlink(missing_ok=True)
        self._collect()

    def _collect(self) -> None:
        named = {str(self.path(name)) for name in self.manifest.files}
        for folder in ("artifacts", "bench", "golden"):
            for path in (self.root / folder).glob("*"):
                if path.is_file() and str(path.resolve()) not in named:
                    path.unlink(missing_ok=True)
