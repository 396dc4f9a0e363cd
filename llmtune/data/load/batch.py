"""Hold the tensors of a forward pass and their targets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import torch

from llmtune.task.targets import Targets

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True, slots=True)
class VarlenIndex:
    """Borders of documents in a flattened batch, for kernels that take them and no mask."""

    cu_seq_lens: torch.Tensor
    """First token of each document, and the number of tokens, int32. Shape (documents + 1,)."""
    max_length: int
    """Tokens of the longest document."""
    row_lengths: tuple[int, ...]
    """Tokens of each row that was flattened; in a part of a batch, those that are in it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Rows of one forward pass, padded on the right. Shapes: (rows, longest row)."""

    input_ids: torch.Tensor
    targets: Targets
    attention_mask: torch.Tensor | None = None
    """1 for tokens, 0 for padding; None for causal models, which do not attend to later tokens."""
    token_type_ids: torch.Tensor | None = None
    """1 for the second text of a pair, for models such as BERT that are told."""
    position_ids: torch.Tensor | None = None
    """Position in the document; None where rows hold one each.

    The model keeps documents apart where they restart.
    """
    varlen: VarlenIndex | None = None
    """Borders for attention that reads no mask: then the batch is one row, without padding."""

    def split(self) -> list[Batch]:
        """Split it into a batch for each row."""
        targets = self.targets
        lengths = [targets.row_length] * len(self.input_ids)
        if self.varlen is not None:
            lengths = list(self.varlen.row_lengths)
        cut = {
            one.name: self._split_rows(getattr(self, one.name))
            for one in fields(self)
            if isinstance(getattr(self, one.name), torch.Tensor)
        }
        batches: list[Batch] = []
        start = 0
        for row, length in enumerate(lengths):
            pieces: dict[str, Any] = {name: rows[row] for name, rows in cut.items()}
            batches.append(Batch(targets=targets.within(start, length), **pieces))
            start += length
        return batches

    def split_logits(self, logits: torch.Tensor) -> Sequence[torch.Tensor]:
        """Split the logits of this batch, as :meth:`split` does its rows."""
        return self._split_rows(logits)

    def _split_rows(self, values: torch.Tensor) -> Sequence[torch.Tensor]:
        if self.varlen is None:
            return list(torch.split(values, 1))
        return list(torch.split(values, list(self.varlen.row_lengths), dim=1))

    @property
    def inputs(self) -> Mapping[str, Any]:
        """Return the arguments of the model's forward pass."""
        given: dict[str, Any] = {"input_ids": self.input_ids}
        if self.attention_mask is not None:
            given["attention_mask"] = self.attention_mask
        if self.token_type_ids is not None:
            given["token_type_ids"] = self.token_type_ids
        if self.position_ids is not None:
            given["position_ids"] = self.position_ids
        if self.varlen is not None:
            for side in ("q", "k"):
                given[f"cu_seq_lens_{side}"] = self.varlen.cu_seq_lens
                given[f"max_length_{side}"] = self.varlen.max_length
        return given

    def to(self, device: torch.device | str) -> Batch:
        """Copy it to another device."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """Copy it into page-locked host memory; torch's DataLoader calls it by this name."""
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, change: Any) -> Batch:
        values = {}
        for one in fields(self):
            value = getattr(self, one.name)
            if isinstance(value, torch.Tensor):
                value = change(value)
            elif isinstance(value, VarlenIndex):
                value = replace(value, cu_seq_lens=change(value.cu_seq_lens))
            elif isinstance(value, Targets):
                value = value.map(change)
            values[one.name] = value
        return Batch(**values)
