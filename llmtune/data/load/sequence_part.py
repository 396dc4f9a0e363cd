"""Cut the rows of a batch among the ranks of a sequence group (``launch.sequence_parallel_size``).

The rows lie one behind the other as one row of tokens, of which each rank gets an equal part. The
labels are found before that, so that the last token of a part is judged by the first one of the
next. Attention alone needs the other parts (:mod:`llmtune.engine.head_exchange`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from llmtune.data.load.batch import Batch


@dataclass(frozen=True, slots=True)
class SequencePart:
    """The part of a rank: ``index`` of ``count`` equal ones."""

    index: int = 0
    count: int = 1

    def cut(self, batch: Batch, pad_token_id: int) -> Batch:
        """Return this part of a joined batch, which gets padding to a multiple of the parts.

        Borders stay those of all tokens, because attention sees them all.

        Args:
            batch: Its rows are one row, of shape (1, tokens), with borders.

        Returns:
            Shape (1, tokens of a part).
        """
        if self.count == 1:
            return batch
        batch = _fill_up(batch, -batch.input_ids.shape[1] % self.count, pad_token_id)
        assert batch.varlen is not None
        assert batch.position_ids is not None
        length = batch.input_ids.shape[1] // self.count
        start = self.index * length
        own = slice(start, start + length)

        targets = batch.targets.within(start, length)

        # What each row has of its tokens here; of rows in other parts that is nothing.
        ends = torch.tensor(batch.varlen.row_lengths).cumsum(0).clamp(start, start + length)
        row_lengths = ends.diff(prepend=torch.tensor([start])).tolist()
        return replace(
            batch,
            input_ids=batch.input_ids[:, own].contiguous(),
            position_ids=batch.position_ids[:, own].contiguous(),
            targets=replace(targets, weight=len(targets)),
            varlen=replace(batch.varlen, row_lengths=tuple(row_lengths)),
        )


def _fill_up(batch: Batch, missing: int, pad_token_id: int) -> Batch:
    """Add a document of padding, which trains nothing, as a row of its own."""
    if not missing:
        return batch
    assert batch.varlen is not None
    assert batch.position_ids is not None
    borders, positions = batch.varlen.cu_seq_lens, torch.arange(missing)[None]
    return replace(
        batch,
        input_ids=torch.nn.functional.pad(batch.input_ids, (0, missing), value=pad_token_id),
        position_ids=torch.cat([batch.position_ids, positions], dim=1),
        varlen=replace(
            batch.varlen,
            cu_seq_lens=torch.cat([borders, borders[-1:] + missing]),
            max_length=max(batch.varlen.max_length, missing),
            row_lengths=(*batch.varlen.row_lengths, missing),
        ),
    )
