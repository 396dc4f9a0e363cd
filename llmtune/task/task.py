"""The interface of a task, and the registry of tasks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from llmtune.registry import Registry
from llmtune.task.labels import LabelKind, Labels

if TYPE_CHECKING:
    import torch

    from llmtune.metrics.confusion import ConfusionTable
    from llmtune.task.targets import Targets

#: The value of ``model.task`` that goes by the labels of the rows.
AUTO = "auto"


class Task:
    """A task that a model is trained for.

    The methods here describe a task whose rows have labels, with one vector of logits per row.
    """

    name: ClassVar[str]
    """Its value of ``model.task``."""
    title: ClassVar[str]
    """Its name in texts."""
    model_class: ClassVar[str]
    """The class of transformers that builds its models."""
    peft_type: ClassVar[str]
    """peft's ``task_type``."""
    label_kinds: ClassVar[Sequence[LabelKind | None]]
    """Kinds of labels that it learns from; None stands for rows without labels."""
    smoothed_kinds: ClassVar[Sequence[LabelKind | None]] = ()
    """Those of them with which ``train.label_smoothing`` has a meaning."""
    metric: ClassVar[str]
    """The key of evaluation records that decides which model is best."""
    greater_is_better: ClassVar[bool]
    """A greater value of that metric is better."""
    metric_keys: ClassVar[Sequence[str]] = ()
    """The keys that :meth:`metrics` may return; empty where they are not known beforehand."""
    keeps_best: ClassVar[bool] = True
    """``train.load_best_model_at_end=auto`` takes the best model, not the last."""
    generates: ClassVar[bool] = False
    """Its models answer prompts with text."""
    judges_rows: ClassVar[bool] = True
    """A row has one vector of logits, and not one per token."""
    default_labels: ClassVar[Labels]
    """Labels that a plan counts where those of the data are not known yet."""

    @property
    def needs_labels(self) -> bool:
        """Tell whether its rows must have labels."""
        return None not in self.label_kinds

    @property
    def learns_numbers(self) -> bool:
        """Tell whether labels that are numbers are values to it, not classes."""
        return LabelKind.value in self.label_kinds

    @property
    def judges_words(self) -> bool:
        """Tell whether its loss is the cross entropy of words, computed in the output projection.

        Its other losses and metrics are those of :meth:`sum_losses` and :meth:`observe` then, of
        which :meth:`observe_correct` takes the place.
        """
        return False

    def head_settings(self, labels: Labels) -> dict[str, Any]:
        """Return the keys of ``config.json`` that describe the head."""
        return {
            "id2label": dict(enumerate(labels.names)),
            "label2id": labels.numbers,
        }

    def head_modules(self, model: Any) -> list[str]:
        """Name the modules of a model that are its head, which are trained with every tuner.

        Args:
            model: A transformers model, on any device.
        """
        base = model.base_model_prefix
        return [
            name
            for name, module in model.named_children()
            if name != base and any(True for _ in module.parameters())
        ]

    def row_weights(self, counts: Any, labels: Sequence[Any], of: Labels) -> Any:
        """Return the share of each row in the divisor of a step's summed loss. Shape (rows,).

        Args:
            counts: Targets of each row. Shape (rows,).
            labels: The label of each row, as its file has it.
            of: The labels of the run.
        """
        raise NotImplementedError

    def make_targets(self, rows: Sequence[Any], length: int, labels: Labels) -> Targets:
        """Find the targets of a batch.

        Args:
            rows: Each with ``ids``, ``mask`` and ``label``; None for one that fills the batch up.
            length: Tokens of the padded rows.
        """
        raise NotImplementedError

    def sum_losses(self, logits: torch.Tensor, targets: Targets, labels: Labels) -> torch.Tensor:
        """Return the summed loss in fp32, a scalar.

        Args:
            logits: As the model returns them; the last dimension is the outputs.
        """
        raise NotImplementedError

    def sum_smoothed_losses(
        self, logits: torch.Tensor, targets: Targets, labels: Labels, smoothing: float
    ) -> torch.Tensor:
        """Return the summed loss of training with ``train.label_smoothing``, a scalar.

        Args:
            logits: As for :meth:`sum_losses`.
            smoothing: Share of a target that is spread over all classes.
        """
        raise NotImplementedError

    def observe(self, logits: torch.Tensor, targets: Targets) -> dict[str, torch.Tensor]:
        """Keep what the metrics need of a batch, as tensors that are joined over batches and ranks.

        Args:
            logits: As the model returns them.
        """
        raise NotImplementedError

    def observe_correct(self, correct: torch.Tensor, targets: Targets) -> dict[str, torch.Tensor]:
        """Return what :meth:`observe` would, where :attr:`judges_words`.

        Args:
            correct: Targets that were the likeliest word, a scalar.
        """
        raise NotImplementedError

    def metrics(
        self, loss: float, observed: dict[str, torch.Tensor], labels: Labels
    ) -> dict[str, float]:
        """Compute the metrics of an evaluation record, beside ``eval_loss``.

        Args:
            loss: The mean loss.
            observed: What :meth:`observe` returned for all batches of all ranks, joined.
        """
        raise NotImplementedError

    def count(self, observed: dict[str, torch.Tensor], labels: Labels) -> ConfusionTable | None:
        """Count which classes were taken for which; None for a task without classes.

        Args:
            observed: As for :meth:`metrics`.
        """
        return None

    def describe_predictions(
        self, logits: torch.Tensor, rows: Sequence[Any], labels: Labels, top_k: int | None
    ) -> list[dict[str, Any]]:
        """Say what the logits of a batch mean: plain values, ``prediction`` and ``scores``.

        Args:
            logits: As the model returns them.
            rows: Each with ``mask`` and ``label``.
            top_k: Classes in the scores; None is all.
        """
        raise NotImplementedError


TASKS: Registry[Task] = Registry("model.task", "llmtune.task.kinds", also=(AUTO,), interface=Task)


def find_task(name: str) -> Task:
    """Return the task of a name; language modeling where none was chosen.

    Raises:
        ConfigError: No task has this name; with the nearest one.
    """
    return TASKS.find("causal_lm" if name == AUTO else name)
