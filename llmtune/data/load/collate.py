"""Make the tensors of a forward pass from rows: padded, or packed.

In a packed row, positions restart at each document.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

import torch

from llmtune.data.load.sequence_part import SequencePart
from llmtune.data.store.token_store import Row, Rows
from llmtune.task.targets import Targets, next_token_targets

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray


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
            mine = (targets.positions >= start) & (targets.positions < start + length)
            own = replace(
                targets,
                positions=targets.positions[mine] - start,
                values=targets.values[mine],
                row_length=length,
            )
            pieces: dict[str, Any] = {name: rows[row] for name, rows in cut.items()}
            batches.append(Batch(targets=own, **pieces))
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Collator:
    """Makes batches of rows."""

    pad_token_id: int
    varlen: bool = False
    """Flatten packed rows for attention that takes borders."""
    flat: bool = False
    """Flatten rows of one document each, so that there is no padding; needs ``varlen``."""
    masked: bool = False
    """Say where padding is.

    Causal models compute the same without it, and attention takes its fast kernels only where there
    is no mask.
    """
    token_types: bool = False
    """Say which tokens are of the second text of a pair."""
    part: SequencePart = field(default_factory=SequencePart)
    """The part of a flattened batch that is this rank's; the others' compute the rest."""
    find_targets: Callable[[Sequence[Row | None], int], Targets] = next_token_targets
    """Finds the targets of rows that are padded to a length."""
    find_weights: Callable[..., Any] | None = None
    """Finds the share of each row in the divisor of the loss, by its targets and its label."""

    def weigh(self, rows: Rows) -> NDArray[Any]:
        """Return the share of each row in the divisor of a step's loss. Shape (rows,).

        By default these are its trained tokens.
        """
        if self.find_weights is None:
            return rows.supervised_tokens
        weights: NDArray[Any] = self.find_weights(rows.supervised_tokens, rows.labels)
        return weights

    def collate(self, rows: Rows, numbers: Sequence[int | None]) -> Batch:
        """Make the batch of some rows; None makes an empty row, which trains nothing."""
        picked = [rows.row(number) if number is not None else None for number in numbers]
        return self.collate_rows(picked, rows.packed)

    def collate_rows(self, rows: Sequence[Row | None], packed: bool) -> Batch:
        """Make this rank's batch of rows; None is an empty row, which trains nothing."""
        collate = self.pack if packed else self.join if self.flat else self.pad
        batch = collate(rows)
        return self.part.cut(batch, self.pad_token_id)

    def pad(self, rows: Sequence[Row | None]) -> Batch:
        """One document a row."""
        input_ids = self._fill(rows)
        targets = self.find_targets(rows, input_ids.shape[1])
        attention_mask = torch.zeros_like(input_ids) if self.masked else None
        token_type_ids = torch.zeros_like(input_ids) if self.token_types else None
        for index, row in enumerate(rows):
            if attention_mask is not None:
                # One visible token of an empty row: attention over nothing is NaN.
                attention_mask[index, : len(row.ids) if row else 1] = 1
            if token_type_ids is not None and row is not None:
                token_type_ids[index, : len(row.ids)] = torch.tensor(row.second, dtype=torch.long)
        return Batch(
            input_ids=input_ids,
            targets=targets,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
        )

    def pack(self, rows: Sequence[Row | None]) -> Batch:
        """Pack several documents per row.

        The rest of a row is a document of padding, which trains nothing.
        """
        input_ids = self._fill(rows)
        height, width = input_ids.shape

        # The documents of all rows; the rest of a row is one more, of padding.
        lengths: list[int] = []
        for row in rows:
            documents = list(row.documents) if row else []
            rest = width - sum(documents)
            lengths += documents + ([rest] if rest else [])
        position_ids = _restarting_positions(lengths).view(height, width)
        targets = self.find_targets(rows, width)
        if not self.varlen:
            return Batch(input_ids=input_ids, targets=targets, position_ids=position_ids)
        shape = (1, height * width)
        return Batch(
            input_ids=input_ids.view(shape),
            targets=replace(targets, row_length=height * width),
            position_ids=position_ids.view(shape),
            varlen=_index_documents(lengths, [width] * height),
        )

    def join(self, rows: Sequence[Row | None]) -> Batch:
        """One document a row, one behind the other and without padding, as one row.

        An empty row is a document of one token, which trains nothing.
        """
        padded = self.pad(rows)
        width = padded.input_ids.shape[1]
        lengths = [max(1, len(row.ids)) if row else 1 for row in rows]
        ids = [padded.input_ids[index, :length] for index, length in enumerate(lengths)]

        # Positions of targets, from rows of the same width to rows one behind the other.
        targets = padded.targets
        shifts = torch.tensor([0, *lengths[:-1]]).cumsum(0) - torch.arange(len(rows)) * width
        positions = targets.positions + shifts[targets.positions // width]
        return Batch(
            input_ids=torch.cat(ids)[None],
            targets=replace(targets, positions=positions, row_length=sum(lengths)),
            position_ids=_restarting_positions(lengths)[None],
            varlen=_index_documents(lengths, lengths),
        )

    def _fill(self, rows: Sequence[Row | None]) -> torch.Tensor:
        width = max((len(row.ids) for row in rows if row), default=1)
        input_ids = torch.full((len(rows), width), self.pad_token_id, dtype=torch.long)
        for index, row in enumerate(rows):
            if row is not None:
                input_ids[index, : len(row.ids)] = torch.tensor(row.ids, dtype=torch.long)
        return input_ids


def _index_documents(lengths: list[int], row_lengths: list[int]) -> VarlenIndex:
    borders = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    return VarlenIndex(borders, max(lengths), tuple(row_lengths))


def _restarting_positions(lengths: list[int]) -> torch.Tensor:
    return torch.cat([torch.arange(length) for length in lengths])
