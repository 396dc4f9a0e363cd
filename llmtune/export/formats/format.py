"""The interface of an export format, and the registry of formats.

A format is one file of this folder that registers one :class:`Format`, and one YAML in
``conf/export/``. The file is imported wherever a configuration is checked, so its functions import
slow modules (torch, a writer) themselves.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmtune.config.groups.export import ExportConfig, ExportDtype
from llmtune.errors import ConfigError, MissingPrerequisiteError
from llmtune.registry import NONE, Registry

if TYPE_CHECKING:
    from llmtune.export.export_model import ExportModel
    from llmtune.export.publish.shards import Journal
    from llmtune.export.usage import Usage

#: Writes the weights into a folder that has the model files already, where the format has some.
Writer = Callable[["ExportModel", Path, "Journal", ExportConfig], None]

#: Options on which the files of every merged model depend: the card says what was compared.
MERGED_OPTIONS = frozenset({"merge_onto", "parity", "parity_bound"})


def _nothing(_config: ExportConfig) -> None:
    return None


@dataclass(frozen=True, kw_only=True, slots=True)
class Format:
    """One format of export; the defaults are those of a merged model for transformers."""

    name: str
    """Its value of ``export=``."""
    describe: Callable[[ExportConfig], str]
    """The name of the format in the model card: "a GGUF file in q8_0"."""
    describe_usage: Callable[[Usage], str]
    """Markdown for the model card: the code and the commands that load and serve it."""
    load_writer: Callable[[], Writer]
    """Imports the function that writes the format."""
    library: str = "transformers"
    """The library that loads it, in the words of the hub."""
    options: frozenset[str] = MERGED_OPTIONS | {"dtype"}
    """Keys of ``export`` on which one of its files depends, beside ``format`` and ``upload``."""
    is_merged: bool = True
    """False for a format that holds only the adapter."""
    has_model_files: bool = True
    """Configuration and tokenizer are files beside the weights, and not inside the one file."""
    space: float = 0.0
    """Space on the disk as a share of the weights; 0 where the writer checks that itself."""
    loads_from_hub: bool = False
    """Loaders take the name of a repository, and not only a folder."""
    tells_dtype: bool = False
    """The card says in which dtype the weights are stored, where ``export.dtype`` was set."""
    is_checked_on_disk: bool = False
    """transformers reads it, so that the files are compared, and not the tensors before writing."""
    find_problems: Callable[[ExportConfig], str | None] = _nothing
    """Finds why the format does not take these options; None where it does."""
    check_base: Callable[[Path], None] | None = None
    """Refuses a model folder that cannot be written so.

    Raises ExportError, or MissingPrerequisiteError for a missing package.
    """
    compared_dtype: Callable[[ExportConfig], ExportDtype] = lambda _: ExportDtype.auto
    """Dtype to which each merged fp32 number is rounded; ``auto`` is the model's own dtype."""
    quantization: Callable[[ExportConfig], str | None] = _nothing
    """Type in which blocks of numbers are stored; None where each number is stored by itself."""


FORMATS: Registry[Format] = Registry(
    "export.format", __package__ or "", also=(NONE,), interface=Format
)


def find_format(name: str) -> Format:
    """Find the format of a name.

    Raises:
        ConfigError: There is none, with the nearest name; or it is ``none``.
    """
    if name == NONE:
        raise ConfigError("export=none writes nothing; take export=safetensors or export=adapter")
    return FORMATS.find(name)


def render_usage(template: str, usage: Usage, **values: Any) -> str:
    """Render the usage text of a format from a template of ``card/templates/``.

    Args:
        values: What the template needs beside ``usage``.
    """
    from llmtune.export.markdown import render

    return render(template, usage=usage, **values)


def require_package(package: str, wanted: str) -> None:
    """Check that a package which a format needs can be imported.

    Raises:
        MissingPrerequisiteError: It cannot.
    """
    try:
        importlib.import_module(package)
    except ImportError as error:
        raise MissingPrerequisiteError(
            f"{wanted} needs {package} ({error}): pip install {package}"
        ) from error
