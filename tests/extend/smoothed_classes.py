"""A task that nobody needs: classes that are never quite sure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmtune.task.kinds.sequence_classification import SequenceClassification
from llmtune.task.labels import Labels
from llmtune.task.task import TASKS

if TYPE_CHECKING:
    import torch

    from llmtune.task.targets import Targets

SMOOTHING = 0.4


class SmoothedClasses(SequenceClassification):
    """Sequence classification with smoothed labels."""

    name = "smoothed_classes"
    title = "smoothed classification"
    metric = "eval_loss"
    greater_is_better = False

    def sum_losses(self, logits: torch.Tensor, targets: Targets, labels: Labels) -> torch.Tensor:
        """Return the summed cross entropy with smoothed labels."""
        from torch.nn.functional import cross_entropy

        from llmtune.task.losses import pick

        picked = pick(logits, targets)
        return cross_entropy(picked, targets.values, label_smoothing=SMOOTHING, reduction="sum")


TASKS.register(SmoothedClasses())
