"""Flags of the command line: one per field of the recipe, and lists written with commas."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import typer
from pydantic import BaseModel

from .config import Recipe, load_recipe, load_settings

BundleArg = Annotated[Path, typer.Argument(metavar="BUNDLE", help="Folder of a bundle.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of tables.")]
ALIASES = {
    "formats": ("--formats", "--format"),
    "precisions": ("--precision", "--precisions"),
    "dialects": ("--dialects", "--dialect"),
    "schemes": ("--schemes", "--scheme"),
    "batches": ("--batches", "--batch"),
    "seqs": ("--seqs", "--seq"),
    "runtimes": ("--runtimes", "--runtime"),
}


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
    parameters += setting_flags(Recipe, leave_out=("model",))
    parameters.append(inspect.Parameter("as_json", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Json))

    def command(**values: Any) -> None:
        as_json, path = values.pop("as_json"), values.pop("recipe")
        function(load_recipe(path, **split_lists(Recipe, values)), as_json)

    return dressed(command, function, parameters)


def settings_command(
    settings: type[BaseModel], name: str, file: Any = None
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command one flag per field of its settings, which are its second parameter, and perhaps one for a file."""

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        own = list(inspect.signature(function, eval_str=True).parameters.values())
        first, rest = own[0], [p.replace(kind=p.KEYWORD_ONLY) for p in own[2:]]
        parameters = [first, *setting_flags(settings), *rest]
        if file is not None:
            annotation = Annotated[Path | None, file]
            parameters.append(
                inspect.Parameter("file", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
            )

        def command(**values: Any) -> None:
            given = split_lists(settings, {key: values.pop(key) for key in settings.model_fields if key in values})
            path = values.pop("file", None)
            loaded = {own[1].name: load_settings(settings, path, name, **given)}
            function(values.pop(first.name), **loaded, **values)

        return dressed(command, function, parameters)

    return decorate


def dressed(command: Any, function: Callable[..., None], parameters: list[inspect.Parameter]) -> Any:
    """Give a command the name and text of a function and the parameters that typer shall see."""
    command.__doc__ = function.__doc__
    command.__name__ = function.__name__
    command.__signature__ = inspect.Signature(parameters)
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    return command


def split_lists(settings: type[BaseModel], values: dict[str, Any]) -> dict[str, Any]:
    """Split at the commas what the settings take as lists."""
    lists = [n for n, f in settings.model_fields.items() if get_origin(f.annotation) is tuple]
    return {n: words(v) if n in lists and v is not None else v for n, v in values.items()}


def setting_flags(settings: type[BaseModel], leave_out: tuple[str, ...] = ()) -> list[inspect.Parameter]:
    """Return one flag per field, None where it is not given: the settings check the values."""
    parameters = []
    for name, field in settings.model_fields.items():
        if name in leave_out:
            continue
        flag = f"--{name.replace('_', '-')}"
        kind = _flag_type(field.annotation)
        both = kind is bool and field.default is None  # else leaving the flag out says no
        flags = (f"{flag}/--no-{name.replace('_', '-')}",) if both else ALIASES.get(name, (flag,))
        default = "" if field.default in (None, (), False) else f" [dim]\\[default: {_shown(field.default)}][/dim]"
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
    return parameters


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


def choices(flag: str, text: str, allowed: Sequence[str]) -> list[str]:
    """Read a list of names. Raises BadParameter naming the flag and what it allows."""
    found = words(text)
    if wrong := [name for name in found if name not in allowed]:
        raise typer.BadParameter(f"{wrong[0]!r} is not one of {', '.join(allowed)}", param_hint=flag)
    return found
