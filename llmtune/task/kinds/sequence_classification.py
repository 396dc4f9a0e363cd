"""Sequence classification: a row has one class, or any number of several."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from llmtune.task.labels import LabelKind, Labels
from llmtune.task.task import TASKS, Task

if TYPE_CHECKING:
    import torch

    from llmtune.metrics.confusion import ConfusionTable
    from llmtune.task.targets import Targets


class SequenceClassification(Task):
    """Tell the class, or the classes, of a text or of a pair of texts."""

    name = "sequence_classification"
    title = "sequence classification"
    model_class = "AutoModelForSequenceClassification"
    peft_type = "SEQ_CLS"
    label_kinds: ClassVar[Sequence[LabelKind | None]] = (LabelKind.name, LabelKind.names)
    smoothed_kinds: ClassVar[Sequence[LabelKind | None]] = (LabelKind.name,)
    metric = "eval_f1"
    greater_is_better = True
    metric_keys = (
        *("eval_accuracy", "eval_f1", "eval_f1_micro", "eval_precision", "eval_recall"),
        *("eval_matthews", "eval_auroc"),
    )
    default_labels = Labels(kind=LabelKind.name, names=("0", "1"))

    def head_settings(self, labels: Labels) -> dict[str, Any]:
        """Return the names of the classes, and whether a row has one of them or several."""
        problem = "single_label_classification"
        if labels.kind is LabelKind.names:
            problem = "multi_label_classification"
        return {**super().head_settings(labels), "problem_type": problem}

    def row_weights(self, counts: Any, labels: Sequence[Any], of: Labels) -> Any:
        """Return 1, the weight of the row's class, or the number of classes. Shape (rows,)."""
        import numpy as np

        if of.kind is LabelKind.names:
            return np.full(len(labels), float(len(of.names)))
        if not of.weights:
            return np.ones(len(labels))
        return np.array([of.weights[of.numbers[str(label)]] for label in labels])

    def make_targets(self, rows: Sequence[Any], length: int, labels: Labels) -> Targets:
        """Judge the logits of every row."""
        import torch

        from llmtune.task.targets import Targets

        judged = [index for index, row in enumerate(rows) if row is not None]
        of_rows = [rows[index].label for index in judged]
        several = labels.kind is LabelKind.names
        values = torch.tensor(
            [labels.encode(label) for label in of_rows],
            dtype=torch.float32 if several else torch.long,
        )
        return Targets(
            positions=torch.tensor(judged, dtype=torch.long),
            values=values.reshape(-1, len(labels.names)) if several else values,
            weight=float(self.row_weights(None, of_rows, labels).sum()),
            row_length=1,
        )

    def sum_losses(self, logits: torch.Tensor, targets: Targets, labels: Labels) -> torch.Tensor:
        """Return the summed cross entropy, of one class or of each."""
        from llmtune.task.losses import sum_binary_cross_entropy, sum_cross_entropy

        if labels.kind is LabelKind.names:
            return sum_binary_cross_entropy(logits, targets, labels.weights)
        return sum_cross_entropy(logits, targets, labels.weights)

    def sum_smoothed_losses(
        self, logits: torch.Tensor, targets: Targets, labels: Labels, smoothing: float
    ) -> torch.Tensor:
        """Return the summed cross entropy with smoothed targets."""
        from llmtune.task.losses import sum_cross_entropy

        return sum_cross_entropy(logits, targets, labels.weights, smoothing=smoothing)

    def observe(self, logits: torch.Tensor, targets: Targets) -> dict[str, torch.Tensor]:
        """Keep the logits and labels of the rows."""
        from llmtune.task.losses import pick

        return {"logits": pick(logits, targets), "values": targets.values}

    def metrics(
        self, loss: float, observed: dict[str, torch.Tensor], labels: Labels
    ) -> dict[str, float]:
        """Compute accuracy, F1, precision, recall and more, of one class per row or of several."""
        from llmtune.metrics.classification import classification_metrics
        from llmtune.metrics.multilabel import multilabel_metrics

        if labels.kind is LabelKind.names:
            return multilabel_metrics(observed["logits"], observed["values"])
        return classification_metrics(observed["logits"], observed["values"])

    def count(self, observed: dict[str, torch.Tensor], labels: Labels) -> ConfusionTable:
        """Count which classes were taken for which; of several, each by itself."""
        from llmtune.metrics.confusion import ConfusionTable

        several = labels.kind is LabelKind.names
        make = ConfusionTable.of_labels if several else ConfusionTable.of_classes
        return make(observed["logits"], observed["values"], labels.names)

    def describe_predictions(
        self, logits: torch.Tensor, rows: Sequence[Any], labels: Labels, top_k: int | None
    ) -> list[dict[str, Any]]:
        """Name the most probable class, or all with a logit above 0; and every probability."""
        from llmtune.task.scores import name_scores

        logits = logits.float()
        several = labels.kind is LabelKind.names
        shares = (logits.sigmoid() if several else logits.softmax(-1)).tolist()
        chosen = (logits > 0).tolist() if several else logits.argmax(-1).tolist()
        described: list[dict[str, Any]] = []
        for share, choice in zip(shares, chosen, strict=True):
            prediction: Any = None
            if several:
                prediction = [name for name, has in zip(labels.names, choice, strict=True) if has]
            else:
                prediction = labels.names[choice]
            scores = name_scores(share, labels.names, top_k)
            described.append({"prediction": prediction, "scores": scores})
        return described


TASKS.register(SequenceClassification())
