"""What the program asks of a format of export, and which formats there are.

A format is one file of this folder that registers one :class:`Format`, and one YAML in
``conf/export/``. It is imported wherever a configuration is checked, so that what takes long to
import (torch, a writer) is imported by the functions that need it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from llmtune.config.groups.export import ExportConfig
from llmtune.errors import ConfigError, MissingPrerequisiteError
from llmtune.registry import Registry

if TYPE_CHECKING:
    import torch

    from llmtune.export.model import ExportModel
    from llmtune.export.publish.shards import Journal
    from llmtune.export.usage import Usage

#: ``export.format`` of a run that only keeps what was trained.
NONE = "none"

#: Options on which the files of every merged model depend: what was compared stands in the card.
MERGED_OPTIONS = frozenset({"merge_onto", "parity", "parity_bound"})


def _nothing(_config: ExportConfig) -> None:
    return None


@dataclass(frozen=True, kw_only=True, slots=True)
class Format:
    """One format of export."""

    name: str
    """As ``export=`` takes it."""
    describe: Callable[[ExportConfig], str]
    """What it is called in the model card: "a GGUF file in q8_0"."""
    library: str
    """The library that loads it, in the words of the hub."""
    describe_usage: Callable[[Usage], str]
    """Markdown for the model card: the code and the commands that load and serve it."""
    write: Callable[[ExportModel, Path, Journal, ExportConfig], None]
    """Write the weights into a folder that has the model files already."""
    options: frozenset[str]
    """Keys of ``export`` on which one of its files depends, beside ``format`` and ``upload``."""
    is_merged: bool = True
    """False of what holds only the adapter."""
    has_model_files: bool = True
    """Configuration and tokenizer are files beside the weights, and not inside the one file."""
    space: float = 0.0
    """Space that it takes on the disk, as a share of the weights; 0 where the writer checks that
    itself.
    """
    loads_from_hub: bool = False
    """Loaders take the name of a repository, and not only a folder."""
    tells_dtype: bool = False
    """The card says in which dtype the weights are stored, where ``export.dtype`` was set."""
    is_checked_on_disk: bool = False
    """transformers reads it, so that it is compared as it lies on the disk, and not before it is
    written.
    """
    find_problems: Callable[[ExportConfig], str | None] = _nothing
    """Why these options cannot be exported so; None where they can."""
    check_base: Callable[[Path], None] | None = None
    """Raises what the model folder alone tells against it: ExportError, or MissingPrerequisiteError
    of a missing package.
    """
    compared_dtype: Callable[[ExportConfig], torch.dtype | None] = _nothing
    """What the merged fp32 becomes in the file, number by number; None where that is the stored
    dtype of the model.
    """
    quantization: Callable[[ExportConfig], str | None] = _nothing
    """In how few bits blocks of numbers are stored; None where each number is stored by itself."""


FORMATS: Registry[Format] = Registry("export.format", __package__ or "", also=(NONE,))


def find_format(name: str) -> Format:
    """The format of a name.

    Raises:
        ConfigError: There is none, with the nearest name; or it is ``none``.
    """
    if name == NONE:
        raise ConfigError("export=none writes nothing; take export=safetensors or export=adapter")
    return FORMATS.find(name)


def require_package(package: str, wanted: str) -> None:
    """
    Raises:
        MissingPrerequisiteError: A package that a format needs cannot be imported.
    """
    try:
        importlib.import_module(package)
    except ImportError as error:
        raise MissingPrerequisiteError(
            f"{wanted} needs {package} ({error}): pip install {package}"
        ) from error
