"""Labels as transformers has them, and the targets that they stand for."""

from __future__ import annotations

import torch

from llmtune.data.load.batch import Batch
from llmtune.task.targets import Targets

#: Label of a position that is not trained; torch's own default.
IGNORE = -100


def targets_of(labels: torch.Tensor) -> Targets:
    """The targets of language modeling, of labels that are not shifted. Shape (rows, length)."""
    following = labels[:, 1:]
    rows, columns = (following != IGNORE).nonzero(as_tuple=True)
    return Targets(
        positions=rows * labels.shape[1] + columns,
        values=following[rows, columns],
        weight=len(rows),
        row_length=labels.shape[1],
    )


def labels_of(batch: Batch) -> torch.Tensor:
    """The labels of a batch of language modeling. Shape (rows, length)."""
    labels = torch.full_like(batch.input_ids, IGNORE)
    labels.view(-1)[batch.targets.positions + 1] = batch.targets.values
    return labels
