"""An opened adapter: its settings, and its tensors by module and role."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from llmtune.errors import ExportError
from llmtune.storage.layout import ADAPTER_CONFIG
from llmtune.tuner.lora_settings import lora_scale, match_pattern


@dataclass(slots=True)
class ModuleTensors:
    """The tensors of one module of an adapter."""

    module: str
    keys: dict[str, str] = field(default_factory=dict)
    """Role, such as ``a`` for ``lora_A`` -> name in the file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """An opened adapter folder; tensors are mapped, and read on demand."""

    folder: Path
    settings: dict[str, Any]
    modules: dict[str, ModuleTensors]
    shapes: dict[str, tuple[int, ...]]
    handle: Any

    def read(self, key: str) -> torch.Tensor:
        """Read one tensor by its name in the file."""
        tensor: torch.Tensor = self.handle.get_tensor(key)
        return tensor

    def scale(self, module: str, rank: int) -> float:
        """Return the factor of ``B @ A``: alpha / r, or alpha / sqrt(r) for rsLoRA.

        Raises:
            ExportError: The matrices have another rank than the settings say.
        """
        expected = int(match_pattern(self.settings["rank_pattern"], module, self.settings["r"]))
        if rank != expected:
            raise ExportError(
                f"{self.folder}: {module} has rank {rank}, {ADAPTER_CONFIG} says {expected}"
            )
        alpha = float(
            match_pattern(self.settings["alpha_pattern"], module, self.settings["lora_alpha"])
        )
        return lora_scale(alpha, rank, bool(self.settings["use_rslora"]))

    def token_indices(self, module: str) -> tuple[int, ...]:
        """Return the trained rows of an embedding; a plain list is for the input embedding."""
        indices = self.settings.get("trainable_token_indices") or []
        if isinstance(indices, dict):
            indices = next((rows for name, rows in indices.items() if module.endswith(name)), [])
        return tuple(int(index) for index in indices)


def is_module_to_save(module: str, name: str) -> bool:
    """Return whether a name in ``modules_to_save`` is that of a module or of one around it.

    Ends of names are compared, as peft does.
    """
    while module:
        if module.endswith(name):
            return True
        module = module.rpartition(".")[0]
    return False
