"""Sign bundles with a local key, in minisign's format (Ed25519). No torch here.

The manifest holds the SHA-256 of every file of a bundle, so that its signature, manifest.json.minisig, stands for all
of them. `minisign -Vm manifest.json -p KEY.pub` checks it too, and keys made by minisign work here.
Source: jedisct1.github.io/minisign, "Signature format".
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import BundleError, InputError, MissingExtraError

if TYPE_CHECKING:
    from minisign import PublicKey, SecretKey

SIGNATURE = "manifest.json.minisig"


def make_key(path: Path, password: str | None = None) -> Path:
    """Write a new secret key, readable by its owner alone, and the public one as PATH.pub; return the latter's path.

    Raises InputError where there is a file already.
    """
    public = path.with_name(f"{path.name}.pub")
    for taken in (path, public):
        if taken.exists():
            raise InputError(f"There is a file {taken} already.", hint="Keys are never overwritten: name another.")
    pair = _minisign().KeyPair.generate()
    public_text = bytes(pair.public_key) + b"\n"
    if password:
        pair.secret_key.encrypt(password)
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(bytes(pair.secret_key) + b"\n")
        public.write_bytes(public_text)
    except OSError as error:
        raise InputError(f"Cannot write the key {path}: {error.strerror}.") from error
    return public


def read_secret_key(path: Path, ask: Callable[[], str | None] = lambda: None) -> SecretKey:
    """Read a secret key, and where it is encrypted ask for its password. Raises InputError."""
    minisign = _minisign()
    try:
        key: SecretKey = minisign.SecretKey.from_file(path)
        if key.is_encrypted():
            if not (password := ask()):
                raise InputError(f"The key {path} needs its password.", hint="Set DEPLOY_PRUNE_KEY_PASSWORD.")
            key.decrypt(password)
    except (OSError, minisign.Error) as error:
        raise InputError(
            f"{path} cannot be used as a secret key: {_reason(error)}.",
            hint="deploy-prune keygen, or minisign -G, makes one.",
        ) from error
    return key


def read_public_key(path: Path) -> PublicKey:
    """Read a public key. Raises InputError."""
    minisign = _minisign()
    try:
        key: PublicKey = minisign.PublicKey.from_file(path)
    except (OSError, minisign.Error) as error:
        raise InputError(
            f"{path} is no public key: {_reason(error)}.", hint="deploy-prune keygen, or minisign -G, makes one."
        ) from error
    return key


def _reason(error: Exception) -> str:
    return (isinstance(error, OSError) and error.strerror) or str(error)


def sign_manifest(root: Path, key: SecretKey) -> Path:
    """Sign a bundle's manifest as it is; return the signature's path. The caller has checked the bundle."""
    said = f"timestamp:{int(time.time())}\tfile:manifest.json\thashed"
    signature = key.sign((root / "manifest.json").read_bytes(), trusted_comment=said)
    path = root / SIGNATURE
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(bytes(signature) + b"\n")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def check_signature(root: Path, manifest: bytes, public_key: Path) -> None:
    """Raise BundleError unless a bundle's manifest has a signature by this key."""
    minisign, key = _minisign(), read_public_key(public_key)
    try:
        with open(root / SIGNATURE, "rb") as file:
            key.verify(manifest, minisign.Signature.from_bytes(file.read(1 << 14)))
    except FileNotFoundError as error:
        raise BundleError(
            f"The bundle {root} is not signed.", hint="deploy-prune sign signs it; later changes take that away."
        ) from error
    except (OSError, minisign.Error) as error:
        raise BundleError(
            f"The bundle {root} is not signed by the key {public_key}, or was changed: {error}.",
            hint="Do not use it, unless you know why; get it again from where it was made.",
        ) from error


def _minisign() -> Any:
    try:
        import minisign
    except ImportError as error:
        raise MissingExtraError("py-minisign", "sign") from error
    return minisign
