"""Write an export aside, describe it, and give it its name in one rename."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from llmtune.checkpoint import names
from llmtune.checkpoint.manifest import flush, hash_file, publish, write_manifest
from llmtune.checkpoint.tensor_file import INDEX_FILE
from llmtune.errors import ExportError

#: Beside weights: what makes a folder a model. Weights, state and our own files are left out.
_KEPT_SUFFIXES = (".json", ".jinja", ".model", ".txt", ".py")
_LEFT_OUT = {names.MANIFEST, names.TRAINER_STATE, "adapter_config.json", INDEX_FILE}


def write_export(folder: Path, write: Callable[[Path], None], about: dict[str, str]) -> None:
    """Call ``write`` on a folder beside ``folder``, add the manifest, and publish it.

    Raises:
        ExportError: The folder exists and is not an export, or the disk refuses.
    """
    if folder.is_dir() and any(folder.iterdir()) and not _is_export(folder):
        raise ExportError(f"{folder} exists and is not an export of llmtune; take another output_dir=")
    aside = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
        write(aside)
        files = {}
        for file in sorted(aside.iterdir()):
            flush(file)
            files[file.name] = hash_file(file)
        write_manifest(aside, files, about)
        shutil.rmtree(folder, ignore_errors=True)
        publish(aside, folder)
    except OSError as error:
        raise ExportError(f"{folder} was not written: {error}") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _is_export(folder: Path) -> bool:
    """Only an export's manifest names a format; checkpoints and trained models have manifests too."""
    try:
        return "format" in json.loads((folder / names.MANIFEST).read_text())
    except (OSError, json.JSONDecodeError):
        return False


def copy_companions(sources: list[Path], folder: Path) -> None:
    """Copy configuration and tokenizer files; a later source wins."""
    for source in sources:
        for file in _companions(source):
            shutil.copyfile(file, folder / file.name)


def _companions(folder: Path) -> Iterator[Path]:
    for file in sorted(folder.iterdir()):
        if file.is_file() and file.suffix in _KEPT_SUFFIXES and file.name not in _LEFT_OUT:
            yield file
