"""The commands that write files for runtimes and servers, and check them again."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from . import screen
from .bundle import VARIANTS, Bundle, Variant
from .config import ExportSettings
from .disk import locked
from .errors import InputError
from .flags import BundleArg, Json, settings_command, words

if TYPE_CHECKING:
    from .export import Exported

app = typer.Typer()
SERVERS = ("triton", "kserve")  # formats of whole servers, made of the files of other formats
IMAGE = "deploy-prune-serve:latest"


@app.command()
@settings_command(ExportSettings, "export")
def export(
    bundle: BundleArg,
    settings: ExportSettings,
    variants: Annotated[str, typer.Option(help="Variants to export.")] = "dense,virtual,sliced",
    data: Annotated[
        bool, typer.Option(help="Read the task's data: static int8 and measured quality need them.")
    ] = True,
    out: Annotated[
        Path | None, typer.Option(help="Of triton: the model repository (folder); of kserve: the YAML file.")
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="Of triton, kserve: the model's name (default: the folder's).")
    ] = None,
    image: Annotated[str, typer.Option(help="Of kserve: the container's image.")] = IMAGE,
    storage: Annotated[
        str | None, typer.Option(metavar="URI", help="Of kserve: where the cluster finds the bundle.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Export a bundle's models; every file is compared with its model before it is kept.

    Formats of whole servers: triton (a model repository, a new version in it each time) and kserve (an
    InferenceService); they take the sliced model unless --variants names another.

    [bold]Examples[/bold]

      deploy-prune export bundles/demo --variants sliced

      deploy-prune export bundles/demo --format onnx,openvino --precision fp32,fp16,int8

      deploy-prune export bundles/demo --format triton --out model_repository

      deploy-prune export bundles/demo --format kserve --out demo.yaml --storage s3://models/demo
    """
    chosen, server = _variants(variants), _server(settings, out, storage)
    with locked(bundle):
        opened = Bundle.open(bundle)
        if server is not None:
            target: Variant = chosen[0] if len(chosen) == 1 else "sliced"
            if not _has_onnx(opened, target, settings.precisions[0], free=server == "triton"):
                onnx = settings.model_copy(update={"formats": ("onnx",)})
                _export(opened, onnx, [target], data).check()
        else:
            made = _export(opened, settings, chosen, data)
    if server is not None:
        assert out is not None
        paths = _deploy(opened, server, out, name, target, settings.precisions[0], image, storage)
        if as_json:
            screen.print_json([str(path) for path in paths])
        else:
            for path in paths:
                screen.out.print(str(path), soft_wrap=True, highlight=False, markup=False)
        return
    if as_json:
        screen.print_json([a.model_dump() for a in made.artifacts])
    else:
        for artifact in made.artifacts:
            screen.print_artifact(artifact)
    for line in made.left_out():
        screen.err.print(line, soft_wrap=True, highlight=False, markup=False)
    made.check()


@app.command()
def verify(
    bundle: BundleArg,
    public_key: Annotated[
        Path | None, typer.Option(help="Refuse a bundle that was not signed by this key; it is then left as it is.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Run every artifact that can run on this machine against the bundle's golden outputs.

    What was not run where it was built (engines without their GPU) is completed; a difference is exit 1. The quality of
    lower precisions is not measured again.

    [bold]Example[/bold]

      deploy-prune verify bundles/demo
    """
    from .export import verify_bundle

    with locked(bundle):
        opened = Bundle.open(bundle, public_key=public_key)
        found = verify_bundle(opened)
        if public_key is None:
            opened.commit()
    if as_json:
        screen.print_json([a.model_dump() for a in opened.manifest.artifacts])
    else:
        for artifact in found.artifacts:
            screen.print_artifact(artifact, quality=False)
        for artifact, reason in found.unchecked:
            screen.out.print(
                f"{artifact.path}  not checked here: {reason}", highlight=False, soft_wrap=True, markup=False
            )
    found.check()


def _export(opened: Bundle, settings: ExportSettings, variants: list[Variant], data: bool) -> Exported:
    from .export import Options, evaluation_of, export_bundle
    from .runtime_bench.report import store_report

    lower = any(p != "fp32" for p in settings.precisions)
    with screen.Bars() as bars, bars.stage("export"):
        made = export_bundle(
            opened,
            formats=settings.formats,
            precisions=settings.precisions,
            variants=variants,
            options=Options.of(settings),
            evaluation=evaluation_of(opened) if data and lower else None,
        )
    store_report(opened)
    return made


def _server(settings: ExportSettings, out: Path | None, storage: str | None) -> str | None:
    """Return the server to write for, or None. Raises InputError for what does not go together."""
    from .export import available_exporters

    known = [*available_exporters(), *SERVERS, "auto"]
    if unknown := [f for f in settings.formats if f not in known]:
        raise InputError(f"No format '{unknown[0]}'.", hint=f"There are: {', '.join(sorted(known))}.")
    servers = [f for f in settings.formats if f in SERVERS]
    if not servers:
        return None
    if len(settings.formats) > 1 or len(settings.precisions) > 1:
        raise InputError(f"{servers[0]} is written alone, of one precision.", hint=f"Give --format {servers[0]} alone.")
    if out is None:
        raise InputError(f"Say where {servers[0]} goes.", hint="Give --out.")
    if servers[0] == "kserve" and not storage:
        raise InputError("Say where the cluster finds the bundle.", hint="Give --storage, as s3://bucket/bundle.")
    return servers[0]


def _has_onnx(bundle: Bundle, variant: Variant, precision: str, free: bool) -> bool:
    """Say whether a bundle has the ONNX file of a variant and precision; `free`: one of any shape."""
    wanted = (variant, "onnx", precision)
    found = [a for a in bundle.manifest.artifacts if (a.variant, a.format, a.precision) == wanted]
    return any(a.shape is None or not free for a in found)


def _deploy(
    bundle: Bundle,
    server: str,
    out: Path,
    name: str | None,
    variant: Variant,
    precision: str,
    image: str,
    storage: str | None,
) -> list[Path]:
    from .export.serving.kserve import write_kserve
    from .export.serving.triton import write_triton

    if server == "triton":
        return write_triton(bundle, out, name=name, variant=variant, precision=precision)
    assert storage is not None
    return [write_kserve(bundle, out, name=name, variant=variant, precision=precision, image=image, storage=storage)]


def _variants(text: str) -> list[Variant]:
    unknown = [word for word in words(text) if word not in VARIANTS]
    if unknown:
        raise typer.BadParameter(f"{unknown[0]!r} is none of {', '.join(VARIANTS)}", param_hint="--variants")
    if not words(text):
        raise typer.BadParameter("an empty list leaves nothing to do", param_hint="--variants")
    return [v for v in VARIANTS if v in words(text)]
