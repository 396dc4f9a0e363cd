"""The way to the loss of a batch: a model's logits, or its output projection."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from llmtune.task.labels import Labels
from llmtune.task.task import Task

if TYPE_CHECKING:
    import torch

    from llmtune.task.language_head.head_loss import HeadLoss
    from llmtune.task.targets import Targets

ForwardPass = Callable[[], Any]
"""Runs a model on a batch, and returns what it returns."""


class Objective:
    """Finds the summed loss of a batch, and what the metrics of its task need."""

    def __init__(
        self,
        task: Task,
        labels: Labels,
        smoothing: float = 0.0,
        head: HeadLoss | None = None,
    ):
        """Args:
        smoothing: ``train.label_smoothing``.
        head: Computes the loss in the output projection; None takes the logits.
        """
        self.task = task
        self.labels = labels
        self.smoothing = smoothing
        self.head = head

    @classmethod
    def of_model(cls, model: Any, task: Task, labels: Labels, smoothing: float = 0.0) -> Objective:
        """Make the objective of a model, which computes its loss where that takes least memory.

        Args:
            model: A transformers model, wrapped by peft or not, before DeepSpeed's engine is built.
        """
        from llmtune.task.language_head.head_loss import find_head_loss

        head = find_head_loss(model) if task.judges_words else None
        return cls(task, labels, smoothing, head)

    def install(self) -> None:
        """Change the model as the loss needs it. With DeepSpeed, after its engine was built."""
        if self.head is not None:
            self.head.install()

    def train(self, run: ForwardPass, targets: Targets) -> torch.Tensor:
        """Return the summed loss that is trained, in fp32, a scalar."""
        if self.head is not None:
            return self.head.find(run, targets, self.smoothing)[0]
        logits = run().logits
        if self.smoothing:
            return self.task.sum_smoothed_losses(logits, targets, self.labels, self.smoothing)
        return self.task.sum_losses(logits, targets, self.labels)

    def judge(
        self, run: ForwardPass, targets: Targets
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return the summed loss of an evaluation, and what metrics need, as ``Task.observe``."""
        if self.head is not None:
            loss, correct = self.head.find(run, targets, counts=True)
            return loss, self.task.observe_correct(correct, targets)
        logits = run().logits
        return self.of_logits(logits, targets), self.task.observe(logits, targets)

    def of_logits(self, logits: torch.Tensor, targets: Targets) -> torch.Tensor:
        """Return the summed loss of logits, without smoothing, in fp32, a scalar."""
        return self.task.sum_losses(logits, targets, self.labels)
