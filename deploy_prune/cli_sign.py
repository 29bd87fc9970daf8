"""The commands that make keys and sign bundles."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from .bundle import Bundle
from .disk import locked

app = typer.Typer()
PASSWORD = "DEPLOY_PRUNE_KEY_PASSWORD"  # environment variable


@app.command()
def keygen(
    out: Annotated[Path, typer.Option(help="File for the secret key; the public one is written beside it, as .pub.")],
) -> None:
    """Make a key to sign bundles with, in minisign's format.

    It is encrypted by the password in DEPLOY_PRUNE_KEY_PASSWORD, or in a terminal by the one that you are asked for;
    an empty one leaves it as it is.

    [bold]Example[/bold]

      deploy-prune keygen --out release.key
    """
    from . import screen, signing

    password = _password(True)
    public = signing.make_key(out, password)
    screen.out.print(str(public), soft_wrap=True, highlight=False, markup=False)
    if not password:
        screen.err.print(f"{out} is not encrypted: whoever reads it can sign.", soft_wrap=True, markup=False)


@app.command()
def sign(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="Folder of a bundle.")],
    key: Annotated[Path, typer.Option(help="Secret key, by deploy-prune keygen or minisign -G.")],
) -> None:
    """Sign a bundle, whose hashes are checked first; whatever changes it later takes the signature away.

    The signature is minisign's, of manifest.json, which has the SHA-256 of every other file.

    [bold]Examples[/bold]

      deploy-prune sign bundles/demo --key release.key

      deploy-prune verify bundles/demo --public-key release.key.pub

      deploy-prune serve bundles/demo --public-key release.key.pub
    """
    from . import screen, signing

    with locked(bundle):
        opened = Bundle.open(bundle)
        opened.refuse_strays()
        path = signing.sign_manifest(opened.root, signing.read_secret_key(key, _password))
    screen.out.print(str(path), soft_wrap=True, highlight=False, markup=False)


def _password(confirm: bool = False) -> str | None:
    """Return the password in the environment, or the one that a person types."""
    if PASSWORD in os.environ or not sys.stdin.isatty():
        return os.environ.get(PASSWORD)
    answer = typer.prompt("Password of the key", hide_input=True, confirmation_prompt=confirm, default="", err=True)
    return str(answer) or None
