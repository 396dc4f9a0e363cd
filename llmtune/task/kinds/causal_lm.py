"""Language modeling: each token is predicted from those before it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from llmtune.task.labels import LabelKind, Labels
from llmtune.task.task import TASKS, Task

if TYPE_CHECKING:
    import torch

    from llmtune.task.targets import Targets


class CausalLanguageModel(Task):
    """Predict the next token wherever the mask of a row says so."""

    name = "causal_lm"
    title = "language modeling"
    model_class = "AutoModelForCausalLM"
    peft_type = "CAUSAL_LM"
    label_kinds: ClassVar[Sequence[LabelKind | None]] = (None,)
    smoothed_kinds: ClassVar[Sequence[LabelKind | None]] = (None,)
    metric = "eval_loss"
    greater_is_better = False
    metric_keys = ("eval_perplexity", "eval_token_accuracy")
    keeps_best = False
    generates = True
    judges_rows = False
    default_labels = Labels()

    @property
    def judges_words(self) -> bool:
        """Tell whether targets, loss and counts are those of this task, not those of a subclass."""
        changed = ("make_targets", "sum_losses", "sum_smoothed_losses", "observe")
        return all(
            getattr(type(self), name) is getattr(CausalLanguageModel, name) for name in changed
        )

    def head_settings(self, labels: Labels) -> dict[str, Any]:
        """Return nothing: the model has its head."""
        return {}

    def head_modules(self, model: Any) -> list[str]:
        """Name no modules: the head is one of the model's trained weights."""
        return []

    def row_weights(self, counts: Any, labels: Sequence[Any], of: Labels) -> Any:
        """Return the trained tokens of each row. Shape (rows,)."""
        return counts

    def make_targets(self, rows: Sequence[Any], length: int, labels: Labels) -> Targets:
        """Predict the trained tokens from the positions before them."""
        from llmtune.task.targets import next_token_targets

        return next_token_targets(rows, length)

    def sum_losses(self, logits: torch.Tensor, targets: Targets, labels: Labels) -> torch.Tensor:
        """Return the summed cross entropy of the tokens."""
        from llmtune.task.losses import sum_cross_entropy

        return sum_cross_entropy(logits, targets)

    def sum_smoothed_losses(
        self, logits: torch.Tensor, targets: Targets, labels: Labels, smoothing: float
    ) -> torch.Tensor:
        """Return the summed cross entropy with smoothed targets."""
        from llmtune.task.losses import sum_cross_entropy

        return sum_cross_entropy(logits, targets, smoothing=smoothing)

    def observe(self, logits: torch.Tensor, targets: Targets) -> dict[str, torch.Tensor]:
        """Count the tokens that the model would have chosen."""
        from llmtune.task.losses import pick

        chosen = pick(logits, targets).argmax(-1)
        return self.observe_correct((chosen == targets.values).sum(), targets)

    def observe_correct(self, correct: torch.Tensor, targets: Targets) -> dict[str, torch.Tensor]:
        """Count the tokens, too."""
        return {"correct": correct.reshape(1), "tokens": correct.new_tensor([len(targets)])}

    def metrics(
        self, loss: float, observed: dict[str, torch.Tensor], labels: Labels
    ) -> dict[str, float]:
        """Compute perplexity and token accuracy."""
        from llmtune.metrics.language import language_metrics

        correct, tokens = int(observed["correct"].sum()), int(observed["tokens"].sum())
        return language_metrics(loss, correct, tokens)


TASKS.register(CausalLanguageModel())
