"""Regression: a row has a number, or several."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from llmtune.task.labels import LabelKind, Labels
from llmtune.task.task import TASKS, Task

if TYPE_CHECKING:
    import torch

    from llmtune.task.targets import Targets


class Regression(Task):
    """Predict the numbers of a text or of a pair of texts."""

    name = "regression"
    title = "regression"
    model_class = "AutoModelForSequenceClassification"
    peft_type = "SEQ_CLS"
    label_kinds: ClassVar[Sequence[LabelKind | None]] = (LabelKind.value,)
    metric = "eval_mse"
    greater_is_better = False
    metric_keys = ("eval_mse", "eval_pearson", "eval_spearman")
    default_labels = Labels(kind=LabelKind.value, names=("value",))

    def head_settings(self, labels: Labels) -> dict[str, Any]:
        """Return the names of the numbers, and that they are numbers."""
        return {**super().head_settings(labels), "problem_type": "regression"}

    def row_weights(self, counts: Any, labels: Sequence[Any], of: Labels) -> Any:
        """Return the numbers per row. Shape (rows,)."""
        import numpy as np

        return np.full(len(labels), float(len(of.names)))

    def make_targets(self, rows: Sequence[Any], length: int, labels: Labels) -> Targets:
        """Judge the outputs of every row."""
        import torch

        from llmtune.task.targets import Targets

        judged = [index for index, row in enumerate(rows) if row is not None]
        values = [labels.encode(rows[index].label) for index in judged]
        return Targets(
            positions=torch.tensor(judged, dtype=torch.long),
            values=torch.tensor(values, dtype=torch.float32).reshape(-1, len(labels.names)),
            weight=float(len(judged) * len(labels.names)),
            row_length=1,
        )

    def sum_losses(self, logits: torch.Tensor, targets: Targets, labels: Labels) -> torch.Tensor:
        """Return the summed squared errors."""
        from llmtune.task.losses import sum_squared_errors

        return sum_squared_errors(logits, targets)

    def observe(self, logits: torch.Tensor, targets: Targets) -> dict[str, torch.Tensor]:
        """Keep the outputs and the numbers of the rows."""
        from llmtune.task.losses import pick

        return {"logits": pick(logits, targets), "values": targets.values}

    def metrics(
        self, loss: float, observed: dict[str, torch.Tensor], labels: Labels
    ) -> dict[str, float]:
        """Compute the mean squared error and the correlations."""
        from llmtune.metrics.regression import regression_metrics

        return regression_metrics(observed["logits"], observed["values"])

    def describe_predictions(
        self, logits: torch.Tensor, rows: Sequence[Any], labels: Labels, top_k: int | None
    ) -> list[dict[str, Any]]:
        """Return the number, or the list of several."""
        from llmtune.task.scores import rounded

        values = [[rounded(value) for value in row] for row in logits.float().tolist()]
        return [{"prediction": row[0] if len(row) == 1 else row} for row in values]


TASKS.register(Regression())
