"""A signed folder is what whoever has the private key wrote; whatever else it became is named, with
exit code 5.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization as forms
from cryptography.hazmat.primitives.asymmetric import ed25519, rsa

from llmtune.checkpoint.mirror import Mirror, fetch_remote
from llmtune.checkpoint.result import link_result
from llmtune.cli.main import main
from llmtune.errors import ConfigError
from llmtune.export.publish.folder import write_export
from llmtune.export.publish.upload import upload_export
from llmtune.storage.hashing import hash_file
from llmtune.storage.manifest import find_damage, mark_complete, write_manifest
from llmtune.storage.signature import Signer, find_forgery, read_public_key, read_signer
from tests.support import TINY, run_cli

PEM, PLAIN = forms.Encoding.PEM, forms.NoEncryption()


def write_keys(folder: Path, name: str = "ours") -> tuple[Path, Path]:
    """A private and a public key, as openssl writes them."""
    key = ed25519.Ed25519PrivateKey.generate()
    private, public = folder / f"{name}.pem", folder / f"{name}.pub.pem"
    private.write_bytes(key.private_bytes(PEM, forms.PrivateFormat.PKCS8, PLAIN))
    public.write_bytes(key.public_key().public_bytes(PEM, forms.PublicFormat.SubjectPublicKeyInfo))
    return private, public


@pytest.fixture
def keys(tmp_path: Path) -> tuple[Path, Path]:
    return write_keys(tmp_path)


@pytest.fixture
def capsys(capfd: pytest.CaptureFixture[str]) -> pytest.CaptureFixture[str]:
    """By descriptor: the verb writes to a duplicate of standard output."""
    return capfd


def write_checkpoint(
    run: Path, signer: Signer | None, step: int = 5, text: str = "weights"
) -> Path:
    """A published folder."""
    folder = run / f"checkpoint-{step}"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "a.txt").write_text(text)
    (folder / "b.txt").write_text("small")
    files = {name: hash_file(folder / name) for name in ("b.txt", "sub/a.txt")}
    write_manifest(folder, files, {"step": step}, signer)
    mark_complete(folder)
    return folder


def rewrite(folder: Path, change: Callable[[Path], None]) -> None:
    """As somebody does who knows how folders are published, and has no key."""
    about = json.loads((folder / "manifest.json").read_text())
    signature = (folder / "manifest.json.sig").read_bytes()
    change(folder)
    files = {
        name: {**entry, **hash_file(folder / name)} for name, entry in about.pop("files").items()
    }
    about.pop("llmtune_version")
    write_manifest(folder, files, about)
    (folder / "manifest.json.sig").write_bytes(signature)
    mark_complete(folder)


def test_what_was_signed_is_right_by_its_key_and_by_no_other(
    keys: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    private, public = keys
    folder = write_checkpoint(tmp_path / "run", read_signer(str(private)))
    assert find_damage(folder) == find_forgery(folder, public) == []
    assert len((folder / "manifest.json.sig").read_bytes()) == 64
    # As `openssl pkeyutl -verify -pubin -inkey PUBLIC.pem -rawin -in manifest.json -sigfile
    # manifest.json.sig` does it.
    read_public_key(public).verify(
        (folder / "manifest.json.sig").read_bytes(), (folder / "manifest.json").read_bytes()
    )
    assert main(["verify", f"run={tmp_path / 'run'}", f"key={public}"]) == 0
    assert (
        f"all files are as they were signed with the private key of {public}"
        in capsys.readouterr().out
    )

    _, other = write_keys(tmp_path, "theirs")
    assert main(["verify", f"run={tmp_path / 'run'}", f"key={other}"]) == 5
    captured = capsys.readouterr()
    assert (
        f"is not a signature of this manifest.json with the private key of {other}" in captured.out
    )
    assert "1 of 1 folder cannot be relied on" in captured.err


def test_without_a_key_only_damage_is_looked_for_and_that_is_said(
    keys: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_checkpoint(tmp_path / "run", None)
    assert not (folder / "manifest.json.sig").exists()
    assert "sha256" not in (folder / "manifest.json").read_text(), (
        "costs a second reading, and proves nothing alone"
    )
    assert main(["verify", f"run={tmp_path / 'run'}"]) == 0
    assert (
        "checked for damage, not for tampering (key=PUBLIC.pem checks signatures)"
        in capsys.readouterr().out
    )
    assert main(["verify", "--json", f"run={tmp_path / 'run'}", f"key={keys[1]}"]) == 5
    (report,) = json.loads(capsys.readouterr().out)["folders"]
    assert report["problems"] == ["manifest.json.sig is missing: nobody has signed this folder"]
    assert report["checked_for"] == "damage and tampering"


def write_file(file: Path, text: str) -> None:
    file.write_text(text)


def _write(name: str, text: str) -> Callable[[Path], None]:
    return lambda folder: rewrite(folder, lambda place: write_file(place / name, text))


def _swap(folder: Path) -> None:
    """Two right files, each in the place of the other."""

    def change(place: Path) -> None:
        first, second = (place / "b.txt").read_text(), (place / "sub" / "a.txt").read_text()
        (place / "b.txt").write_text(second)
        (place / "sub" / "a.txt").write_text(first)

    rewrite(folder, change)


def _keep_the_manifest(folder: Path) -> None:
    """As if somebody had found other contents of the same size and xxh3: the manifest stays as it
    was signed.
    """
    (folder / "sub" / "a.txt").write_text("w3ights")


def _of_another_step(folder: Path) -> None:
    shutil.rmtree(folder)
    shutil.copytree(folder.parent / "checkpoint-4", folder)


@pytest.mark.parametrize(
    ("forge", "said"),
    [
        (_write("sub/a.txt", "w3ights"), "is not a signature of this manifest.json"),
        (_swap, "is not a signature of this manifest.json"),
        (_keep_the_manifest, "sub/a.txt is not the file that was signed (sha256"),
        (lambda folder: (folder / "manifest.json.sig").unlink(), "manifest.json.sig is missing"),
        (
            lambda folder: (folder / "manifest.json.sig").write_bytes(b""),
            "is not a signature of this",
        ),
        (
            lambda folder: (folder / "manifest.json.sig").write_bytes(b"x" * 64),
            "is not a signature of this",
        ),
        (lambda folder: (folder / "sub" / "a.txt").unlink(), "sub/a.txt cannot be read"),
        (lambda folder: (folder / "manifest.json").unlink(), "manifest.json is missing"),
        (_of_another_step, "signed as the checkpoint of step 4, not of step 5"),
    ],
)
def test_every_forgery_is_named(
    forge: Callable[[Path], None],
    said: str,
    keys: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    signer = read_signer(str(keys[0]))
    write_checkpoint(tmp_path / "run", signer, step=4)
    folder = write_checkpoint(tmp_path / "run", signer)
    forge(folder)
    assert any(said in problem for problem in find_forgery(folder, keys[1])), find_forgery(
        folder, keys[1]
    )
    assert main(["verify", f"checkpoint={folder}", f"key={keys[1]}"]) == 5
    assert said in capsys.readouterr().out


def test_a_file_that_was_put_in_is_found(
    keys: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_checkpoint(tmp_path / "run", read_signer(str(keys[0])))
    (folder / "modeling_evil.py").write_text("x")
    assert main(["verify", f"checkpoint={folder}", f"key={keys[1]}"]) == 5
    assert "modeling_evil.py is not in manifest.json" in capsys.readouterr().out


def test_a_manifest_that_was_signed_without_sha256_is_not_enough(
    keys: tuple[Path, Path], tmp_path: Path
) -> None:
    folder = write_checkpoint(tmp_path / "run", None)
    signer = read_signer(str(keys[0]))
    assert signer is not None
    (folder / "manifest.json.sig").write_bytes(signer.sign((folder / "manifest.json").read_bytes()))
    assert find_forgery(folder, keys[1]) == [
        "manifest.json was signed without sha256 of every file"
    ]


def test_what_is_no_key_is_refused_before_anything_is_done(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    private, public = write_keys(tmp_path)
    other = rsa.generate_private_key(65537, 2048)
    (tmp_path / "rsa.pem").write_bytes(other.private_bytes(PEM, forms.PrivateFormat.PKCS8, PLAIN))
    (tmp_path / "rsa.pub.pem").write_bytes(
        other.public_key().public_bytes(PEM, forms.PublicFormat.SubjectPublicKeyInfo)
    )
    locked = ed25519.Ed25519PrivateKey.generate().private_bytes(
        PEM, forms.PrivateFormat.PKCS8, forms.BestAvailableEncryption(b"pw")
    )
    (tmp_path / "locked.pem").write_bytes(locked)
    (tmp_path / "text.pem").write_text(
        "-----BEGIN PRIVATE KEY-----\nplanted-in-the-file\n-----END PRIVATE KEY-----\n"
    )
    wrong = {
        "rsa.pem": (
            "a private key of another kind than ed25519; make one with: openssl genpkey -algorithm"
            " ed25519"
        ),
        "locked.pem": "the key has a password; store it without one",
        "text.pem": "not a private key in PEM; make a pair with: openssl genpkey",
        public.name: "not a private key in PEM",
        "absent.pem": "No such file or directory; make a pair of keys with: openssl genpkey",
    }
    for name, said in wrong.items():
        with pytest.raises(ConfigError) as caught:
            read_signer(str(tmp_path / name))
        assert str(caught.value).startswith(f"checkpoint.sign={tmp_path / name}: {said}")
        assert "planted" not in str(caught.value)
    assert read_signer(None) is None
    folder = write_checkpoint(tmp_path / "run", None)
    for name in ("rsa.pub.pem", private.name, "text.pem", "absent.pem"):
        assert main(["verify", f"checkpoint={folder}", f"key={tmp_path / name}"]) == 2
        assert f"error: key={tmp_path / name}: " in capsys.readouterr().err


def test_copies_keep_their_signature(keys: tuple[Path, Path], tmp_path: Path) -> None:
    signer = read_signer(str(keys[0]))
    run = tmp_path / "run"
    folder = write_checkpoint(run, signer)
    mirror = Mirror(str(tmp_path / "mirror"), "name", lambda _: None)
    mirror.put(folder, None)
    assert mirror.finish(30) == []
    copy = fetch_remote(str(tmp_path / "mirror" / "name" / "checkpoint-5"), tmp_path / "elsewhere")
    assert find_damage(copy) == find_forgery(copy, keys[1]) == []

    link_result(folder, run / "adapter", signer)
    assert find_forgery(run / "adapter", keys[1]) == []
    link_result(folder, run / "adapter")
    assert not (run / "adapter" / "manifest.json.sig").exists()

    unsigned = write_checkpoint(tmp_path / "plain", None)
    mirror = Mirror(str(tmp_path / "mirror"), "plain", lambda _: None)
    mirror.put(unsigned, None)
    assert mirror.finish(30) == []
    assert not (tmp_path / "mirror" / "plain" / "checkpoint-5" / "manifest.json.sig").exists()
    assert (
        find_damage(
            fetch_remote(str(tmp_path / "mirror" / "plain" / "checkpoint-5"), tmp_path / "third")
        )
        == []
    )


def test_exports_are_signed_and_uploaded_with_their_signature(
    keys: tuple[Path, Path], tmp_path: Path
) -> None:
    said: list[str] = []
    place, there = tmp_path / "export", tmp_path / "there"

    def write(signer: Signer | None, text: str) -> None:
        write_export(
            place,
            text,
            lambda folder, _: write_file(folder / "a.txt", text),
            {"format": "safetensors"},
            signer,
        )

    write(read_signer(str(keys[0])), "one")
    assert find_damage(place) == find_forgery(place, keys[1]) == []
    for _ in range(2):
        upload_export(place, str(there), False, False, said.append)
        assert find_damage(there) == find_forgery(there, keys[1]) == []
    assert "holds this export already" in said[-1]
    # Another one in its place, which nobody signed.
    write(None, "two")
    assert not (place / "manifest.json.sig").exists()
    upload_export(place, str(there), False, False, said.append)
    assert find_damage(there) == []
    assert not (there / "manifest.json.sig").exists()


@pytest.mark.process
def test_a_run_signs_all_that_it_publishes(keys: tuple[Path, Path], tmp_path: Path) -> None:
    private, public = keys
    run = tmp_path / "run"
    command = [
        *TINY,
        "train.max_steps=1",
        "data.val_set_size=0",
        "export=safetensors",
        f"output_dir={run}",
    ]
    done = run_cli(*command, f"checkpoint.sign={tmp_path / 'absent.pem'}")
    assert done.code == 2, done.err
    assert not list(run.glob("checkpoint-*")), "refused before anything was trained"
    done = run_cli(*command, f"checkpoint.sign={private}")
    assert done.code == 0, done.out + done.err
    folders = {file.parent.name for file in run.rglob("manifest.json.sig")}
    assert folders == {"checkpoint-1", "adapter", "merged"}
    assert all(find_forgery(run / name, public) == [] for name in folders)
    kept = [file for file in run.rglob("*") if file.is_file()]
    secret = "".join(private.read_text().splitlines()[1:-1]).encode()
    assert not [file for file in kept if secret in file.read_bytes()], "the key itself is nowhere"
