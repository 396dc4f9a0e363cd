"""Make the tensors of a forward pass from rows: padded, or packed.

In a packed row, positions restart at each document.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch

from llmtune.data.store.token_store import Row, Rows

if TYPE_CHECKING:
    from collections.abc import Mapping

#: Label of a position that is not trained; torch's own default.
IGNORE = -100


@dataclass(frozen=True, slots=True)
class VarlenIndex:
    """Borders of documents in a flattened batch, for FlashAttention's varlen kernels."""

    cu_seq_lens: torch.Tensor
    """First token of each document, and the number of tokens, int32. Shape (documents + 1,)."""
    max_length: int
    """Tokens of the longest document."""


@dataclass(frozen=True, slots=True)
class Targets:
    """The targets of a batch, found on the host so that no step waits for a GPU."""

    positions: torch.Tensor
    """Positions of the logits to score, in the flattened batch: ``row * length + column``.

    Shape (trained tokens,).
    """
    tokens: torch.Tensor
    """The tokens that follow there. Shape (trained tokens,)."""

    def __len__(self) -> int:
        return len(self.tokens)

    @classmethod
    def of_labels(cls, labels: torch.Tensor) -> Targets:
        """Return the targets of labels as transformers has them: not shifted, shape (rows, length).

        A position that is not trained has the label ``IGNORE``.
        """
        following = labels[:, 1:]
        rows, columns = (following != IGNORE).nonzero(as_tuple=True)
        return cls(rows * labels.shape[1] + columns, following[rows, columns])


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Rows of one forward pass, padded on the right. Shapes: (rows, longest row)."""

    input_ids: torch.Tensor
    targets: Targets
    attention_mask: torch.Tensor | None = None
    """1 for tokens, 0 for padding; None for causal models, which do not attend to later tokens."""
    position_ids: torch.Tensor | None = None
    """Position in the document; None where rows hold one each.

    The model keeps documents apart where they restart.
    """
    varlen: VarlenIndex | None = None
    """Borders for FlashAttention, which reads no mask: then the batch is one row."""

    @property
    def labels(self) -> torch.Tensor:
        """Return ``input_ids`` where trained, ``IGNORE`` elsewhere; not shifted."""
        labels = torch.full_like(self.input_ids, IGNORE)
        labels.view(-1)[self.targets.positions + 1] = self.targets.tokens
        return labels

    def split(self) -> list[Batch]:
        """Split it into a batch for each row."""
        tensors = (self.input_ids, self.labels, self.attention_mask, self.position_ids)
        pieces = (
            [None] * len(self.input_ids) if tensor is None else tensor.split(1)
            for tensor in tensors
        )
        return [
            Batch(
                input_ids=ids,
                targets=Targets.of_labels(labels),
                attention_mask=mask,
                position_ids=positions,
                varlen=self.varlen,
            )
            for ids, labels, mask, positions in zip(*pieces, strict=True)
        ]

    @property
    def inputs(self) -> Mapping[str, Any]:
        """Return the arguments of the model's forward pass."""
        given: dict[str, Any] = {"input_ids": self.input_ids}
        if self.attention_mask is not None:
            given["attention_mask"] = self.attention_mask
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
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, torch.Tensor):
                value = change(value)
            elif isinstance(value, VarlenIndex):
                value = VarlenIndex(change(value.cu_seq_lens), value.max_length)
            elif isinstance(value, Targets):
                value = Targets(change(value.positions), change(value.tokens))
            values[field.name] = value
        return Batch(**values)


@dataclass(frozen=True, slots=True)
class Collator:
    """Makes batches of rows."""

    pad_token_id: int
    varlen: bool = False
    """Flatten packed rows for FlashAttention."""
    masked: bool = False
    """Say where padding is.

    Causal models compute the same without it, and attention takes its fast kernels only where there
    is no mask.
    """

    def collate(self, rows: Rows, numbers: Sequence[int | None]) -> Batch:
        """Make the batch of some rows; None makes an empty row, which trains nothing."""
        picked = [rows.row(number) if number is not None else None for number in numbers]
        return self.pack(picked) if rows.packed else self.pad(picked)

    def pad(self, rows: Sequence[Row | None]) -> Batch:
        """Pad rows of one document each."""
        input_ids, labels = self._fill(rows)
        if not self.masked:
            return Batch(input_ids=input_ids, targets=Targets.of_labels(labels))
        attention_mask = torch.zeros_like(input_ids)
        for number, row in enumerate(rows):
            # One visible token of an empty row: attention over nothing is NaN.
            attention_mask[number, : len(row.ids) if row else 1] = 1
        return Batch(
            input_ids=input_ids, targets=Targets.of_labels(labels), attention_mask=attention_mask
        )

    def pack(self, rows: Sequence[Row | None]) -> Batch:
        """Pack several documents per row.

        The rest of a row is a document of padding, which trains nothing.
        """
        input_ids, labels = self._fill(rows)
        height, width = input_ids.shape

        # The documents of each row; the rest of a row is one more, of padding.
        lengths = []
        for row in rows:
            documents = list(row.documents) if row else []
            rest = width - sum(documents)
            lengths.append(documents + ([rest] if rest else []))
        position_ids = torch.stack([_restarting_positions(of_row) for of_row in lengths])
        if not self.varlen:
            return Batch(
                input_ids=input_ids, targets=Targets.of_labels(labels), position_ids=position_ids
            )

        # FlashAttention takes all rows as one, with the borders of their documents.
        flat = torch.tensor([0, *(length for row in lengths for length in row)], dtype=torch.int32)
        index = VarlenIndex(torch.cumsum(flat, 0, dtype=torch.int32), int(flat.max()))
        shape = (1, height * width)
        targets = Targets.of_labels(labels.view(shape))
        return Batch(
            input_ids=input_ids.view(shape),
            targets=targets,
            position_ids=position_ids.view(shape),
            varlen=index,
        )

    def _fill(self, rows: Sequence[Row | None]) -> tuple[torch.Tensor, torch.Tensor]:
        width = max((len(row.ids) for row in rows if row), default=1)
        input_ids = torch.full((len(rows), width), self.pad_token_id, dtype=torch.long)
        labels = torch.full((len(rows), width), IGNORE, dtype=torch.long)
        for number, row in enumerate(rows):
            if row is None:
                continue
            ids = torch.tensor(row.ids, dtype=torch.long)
            input_ids[number, : len(ids)] = ids
            labels[number, : len(ids)] = torch.where(
                torch.tensor(row.mask), ids, torch.tensor(IGNORE)
            )
        return input_ids, labels


def _restarting_positions(lengths: list[int]) -> torch.Tensor:
    return torch.cat([torch.arange(length) for length in lengths])
