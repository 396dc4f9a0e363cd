"""Sign published folders, and verify their signatures.

``manifest.json.sig`` is an ed25519 signature (RFC 8032, 64 bytes) of the manifest's bytes. The
hashes of a manifest, xxh3-128, find damage, but another file with the same hash can be made on
purpose. So a signed manifest also lists the SHA-256 of every file; without them its signature says
nothing about the files.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmtune.errors import ConfigError
from llmtune.storage import layout
from llmtune.storage.hashing import sha256_file
from llmtune.storage.plain_json import parse_json

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import (
        Ed25519PrivateKey,
        Ed25519PublicKey,
    )

_SHA256 = "sha256"
_HASHING_THREADS = 4
_MAKE = (
    "openssl genpkey -algorithm ed25519 -out KEY.pem && openssl pkey -in KEY.pem -pubout -out"
    " PUBLIC.pem"
)


class Signer:
    """A private key, read once, because its file may change before the run's last checkpoint."""

    def __init__(self, path: Path):
        """
        Raises:
            ConfigError: The file holds no ed25519 private key.
        """
        self._key = _read_private_key(path)

    def sign(self, manifest: bytes) -> bytes:
        """Sign a manifest."""
        return self._key.sign(manifest)


def read_signer(path: str | None) -> Signer | None:
    """Read the key of ``checkpoint.sign``; None where nothing is to be signed.

    Raises:
        ConfigError: As :class:`Signer`.
    """
    return None if path is None else Signer(Path(path).expanduser())


def add_sha256(folder: Path, files: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Add the SHA-256 to the entry of every file of a manifest that has none yet."""
    missing = [name for name, entry in files.items() if _SHA256 not in entry]
    with ThreadPoolExecutor(_HASHING_THREADS) as pool:
        hashes = pool.map(sha256_file, [folder / name for name in missing])
        added = {name: {_SHA256: value} for name, value in zip(missing, hashes, strict=True)}
    return {name: {**entry, **added.get(name, {})} for name, entry in files.items()}


def find_forgery(folder: Path, public_key: Path) -> list[str]:
    """Compare a folder with what the owner of the key signed; reads every file.

    Returns:
        Every difference; none for a folder as it was signed.

    Raises:
        ConfigError: There is no ed25519 public key in ``public_key``.
    """
    from cryptography.exceptions import InvalidSignature

    key = read_public_key(public_key)
    try:
        manifest = (folder / layout.MANIFEST).read_bytes()
        signature = (folder / layout.SIGNATURE).read_bytes()
    except FileNotFoundError as error:
        return [f"{Path(str(error.filename)).name} is missing: nobody has signed this folder"]
    except OSError as error:
        return [f"{layout.SIGNATURE} cannot be read ({error.strerror})"]
    try:
        # The signature is of the manifest's bytes.
        key.verify(signature, manifest)
    except InvalidSignature:
        return [
            f"{layout.SIGNATURE} is not a signature of this {layout.MANIFEST} with the private key"
            f" of {public_key}"
        ]
    try:
        # The manifest has a hash of every file, and the step that the folder must have.
        about = parse_json(manifest)
        files = {str(name): str(entry[_SHA256]) for name, entry in about["files"].items()}
        step = layout.checkpoint_step(folder)
        if step is not None and about["step"] != step:
            return [f"it was signed as the checkpoint of step {about['step']}, not of step {step}"]
    except (ValueError, KeyError, TypeError, AttributeError):
        return [f"{layout.MANIFEST} was signed without {_SHA256} of every file"]
    return [
        problem
        for name, expected in sorted(files.items())
        if (problem := _compare(folder, name, expected))
    ]


def read_public_key(path: Path) -> Ed25519PublicKey:
    """Read the public key of ``key=PUBLIC.pem``.

    Raises:
        ConfigError: The file holds no ed25519 public key.
    """
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    key = _load(path, "key", "public", load_pem_public_key)
    if not isinstance(key, Ed25519PublicKey):
        raise ConfigError(
            f"key={path}: a public key of another kind than ed25519; take the PUBLIC.pem of:"
            f" {_MAKE}"
        )
    return key


def _compare(folder: Path, name: str, expected: str) -> str | None:
    try:
        actual = sha256_file(folder / name)
    except (OSError, ValueError) as error:
        return f"{name} cannot be read ({error})"
    if actual != expected:
        return f"{name} is not the file that was signed (sha256 {actual})"
    return None


def _read_private_key(path: Path) -> Ed25519PrivateKey:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    key = _load(
        path, "checkpoint.sign", "private", lambda text: load_pem_private_key(text, password=None)
    )
    if not isinstance(key, Ed25519PrivateKey):
        raise ConfigError(
            f"checkpoint.sign={path}: a private key of another kind than ed25519; make one with:"
            f" {_MAKE}"
        )
    return key


def _load(path: Path, name: str, what: str, load: Callable[[bytes], Any]) -> Any:
    try:
        return load(path.read_bytes())
    except OSError as error:
        raise ConfigError(
            f"{name}={path}: {error.strerror}; make a pair of keys with: {_MAKE}"
        ) from error
    except TypeError as error:
        raise ConfigError(
            f"{name}={path}: the key has a password; store it without one where only this user can"
            f" read it: openssl pkey -in {path} -out KEY.pem"
        ) from error
    except Exception as error:
        # The library's error classes differ from version to version. None of their texts is shown:
        # they may quote the file.
        raise ConfigError(
            f"{name}={path}: not a {what} key in PEM; make a pair with: {_MAKE}"
        ) from error
