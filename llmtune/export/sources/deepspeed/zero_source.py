"""DeepSpeed's own checkpoints of ZeRO 1, 2 and 3 as a tensor source, without DeepSpeed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from llmtune.errors import ExportError
from llmtune.export.sources.deepspeed.rank_files import RankStates, read_rank_states
from llmtune.export.sources.deepspeed.step_folder import COPY_AGAIN, find_step_folder
from llmtune.export.sources.deepspeed.zero_parameters import (
    frozen_parameters,
    other_tensors,
    trained_parameters,
)
from llmtune.storage.tensors.dtypes import to_safetensors
from llmtune.storage.tensors.tensor_spec import TensorSpec
from llmtune.units import some


class ZeroSource:
    """The fp32 master weights of what was trained, and everything else as it is stored."""

    def __init__(self, folder: Path) -> None:
        """Map every file and locate every tensor; no numbers are read.

        Raises:
            ExportError: The checkpoint is of another kind, incomplete or damaged; the files and
                tensors are named.
        """
        self.folder = find_step_folder(folder)
        try:
            states = read_rank_states(self.folder)
            self.world_size = len(states.flats)
            self._find_tensors(states)
        except (
            TypeError,
            ValueError,
            LookupError,
            AttributeError,
            ArithmeticError,
            RuntimeError,
            MemoryError,
        ) as error:
            # Names, shapes and offsets come from the files, which may hold anything.
            raise ExportError(
                f"{self.folder} is not as DeepSpeed writes it ({type(error).__name__}: {error});"
                f" {COPY_AGAIN}"
            ) from error

    def _find_tensors(self, states: RankStates) -> None:
        tensors = dict(trained_parameters(states))
        self.trained = frozenset(tensors)
        """Parameters with master weights."""
        for name, tensor in (*frozen_parameters(states), *other_tensors(states)):
            tensors.setdefault(name, tensor)

        shared = states.model.get("shared_params") or {}
        self.shared = {name: owner for name, owner in dict(shared).items() if owner in tensors}
        """Second name of a tensor -> the name under which it is stored."""
        tensors |= {name: tensors[owner] for name, owner in self.shared.items()}

        # In the order of the model's state_dict, and then tensors that it does not name.
        self._tensors = {
            name: tensors[name]
            for name in dict.fromkeys((*states.module, *tensors))
            if name in tensors
        }
        self.specs = {
            name: TensorSpec(name, tensor.spec.dtype, tensor.spec.shape)
            for name, tensor in self._tensors.items()
        }
        unsupported = [
            f"{name} ({spec.dtype})"
            for name, spec in self.specs.items()
            if to_safetensors(spec.dtype) is None
        ]
        if unsupported:
            raise ExportError(f"{self.folder}: dtypes that cannot be exported: {some(unsupported)}")

    def blocks(self, name: str) -> Iterator[torch.Tensor]:
        """Yield rows of one tensor, put together from the files of the ranks."""
        return self._tensors[name].blocks()
