"""Flags of the command line: one per field of the recipe, and lists written with commas."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import typer

from .config import Recipe, load_recipe

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of tables.")]
ALIASES = {"formats": ("--formats", "--format"), "precisions": ("--precision", "--precisions")}


def recipe_command(function: Callable[..., None]) -> Callable[..., None]:
    """Give a command one flag per field of the recipe, so that file and flags cannot drift apart."""
    parameters = [
        inspect.Parameter(
            "model",
            inspect.Parameter.POSITIONAL_OR_KEYWORD,
            default=None,
            annotation=Annotated[str | None, typer.Argument(help=str(Recipe.model_fields["model"].description))],
        ),
        inspect.Parameter(
            "recipe",
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=Annotated[Path | None, typer.Option("--config", "-c", help="Recipe (TOML); flags override it.")],
        ),
    ]
    for name, field in Recipe.model_fields.items():
        if name == "model":
            continue
        flag = f"--{name.replace('_', '-')}"
        flags = (f"{flag}/--no-{name.replace('_', '-')}",) if name == "label_free" else ALIASES.get(name, (flag,))
        default = "" if field.default is None else f" [dim]\\[default: {_shown(field.default)}][/dim]"
        kind = _flag_type(field.annotation)
        metavar = None if kind is bool else "NUMBER" if kind in (int, float) else "TEXT"
        option = typer.Option(*flags, help=f"{field.description}{default}", show_default=False, metavar=metavar)
        parameters.append(
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=None,
                annotation=Annotated[bool | None if kind is bool else str | None, option],  # the recipe checks it
            )
        )
    parameters.append(inspect.Parameter("as_json", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Json))

    def command(**values: Any) -> None:
        as_json, path = values.pop("as_json"), values.pop("recipe")
        for name in ("formats", "precisions", "runtimes", "batches"):
            if values[name] is not None:
                values[name] = [part.strip() for part in values[name].split(",") if part.strip()]
        function(load_recipe(path, **values), as_json)

    command.__doc__ = function.__doc__
    command.__name__ = function.__name__
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    return command


def _flag_type(annotation: Any) -> type:
    """Return the type that a flag's value stands for: bool, a number, or text (lists and choices too)."""
    options = [a for a in get_args(annotation) if a is not type(None)] if type(None) in get_args(annotation) else []
    single = options[0] if options else annotation
    return str if get_origin(single) in (tuple, Literal) else single


def _shown(value: Any) -> str:
    return ",".join(str(v) for v in value) if isinstance(value, tuple) else str(value)


def words(text: str) -> list[str]:
    """Split a list at its commas."""
    return [part.strip() for part in text.split(",") if part.strip()]


def shares(flag: str, text: str) -> list[float]:
    """Read a list of shares in (0, 1]. Raises BadParameter naming the flag."""
    try:
        found = [float(word) for word in words(text)]
    except ValueError as error:
        raise typer.BadParameter(f"{text!r} is not a list of numbers", param_hint=flag) from error
    if wrong := [s for s in found if not 0 < s <= 1]:
        raise typer.BadParameter(f"{wrong[0]:g} is not a share in (0, 1]", param_hint=flag)
    return found


def numbers(flag: str, text: str) -> list[int]:
    """Read a list of whole numbers. Raises BadParameter naming the flag."""
    try:
        return [int(word) for word in words(text)]
    except ValueError as error:
        raise typer.BadParameter(f"{text!r} is not a list of whole numbers", param_hint=flag) from error
