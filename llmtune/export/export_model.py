"""A model that is ready to be written in any format."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from llmtune.config.groups.export import ExportDtype
from llmtune.export.merge.adapter import Adapter
from llmtune.export.merge.merged_source import MergedSource
from llmtune.export.request import ExportRequest
from llmtune.export.sources.tensor_source import TensorSource, usual_dtype
from llmtune.storage.tensors.dtypes import configured_dtype


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportModel:
    """A model that is ready to be written in any format."""

    request: ExportRequest
    base: TensorSource
    """The model that the adapter is added to; without an adapter, the trained model itself."""
    source: TensorSource
    """The tensors as they are to be stored, an adapter merged."""
    model_files: list[Path]
    """Folders with configuration and tokenizer; a later one wins."""
    config_changes: dict[str, Any]
    """Keys of ``config.json`` that are no longer the base's."""
    adapter: Adapter | None
    merged: MergedSource | None
    """The base with the adapter merged into it; None without one."""
    base_changes: dict[str, Any] = field(default_factory=dict)
    """Changes of ``config.json`` that describe a head which the adapter brings."""

    @property
    def dtype(self) -> torch.dtype | None:
        """Return the dtype that most of the floating numbers are stored in."""
        return usual_dtype(self.source)

    @property
    def computed(self) -> bool:
        """Tell whether tensors are computed on the way, rather than copied."""
        return self.source is not self.base

    @property
    def nbytes(self) -> int:
        """Return the size of all tensors as they are stored."""
        return sum(spec.nbytes for spec in self.source.specs.values())


def find_dtype(setting: ExportDtype) -> torch.dtype | None:
    """Return the dtype of ``export.dtype``; None for ``auto``."""
    return None if setting is ExportDtype.auto else configured_dtype(setting.value)
