"""Token classification: every word of a row has a class, such as the kind of a name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from llmtune.task.labels import LabelKind, Labels
from llmtune.task.task import TASKS, Task

if TYPE_CHECKING:
    import torch

    from llmtune.metrics.confusion import ConfusionTable
    from llmtune.task.targets import Targets


class TokenClassification(Task):
    """Tell the class of every word, at the first of its tokens."""

    name = "token_classification"
    title = "token classification"
    model_class = "AutoModelForTokenClassification"
    peft_type = "TOKEN_CLS"
    label_kinds: ClassVar[Sequence[LabelKind | None]] = (LabelKind.tags,)
    smoothed_kinds: ClassVar[Sequence[LabelKind | None]] = (LabelKind.tags,)
    metric = "eval_f1"
    greater_is_better = True
    metric_keys = ("eval_accuracy", "eval_f1", "eval_precision", "eval_recall")
    judges_rows = False
    default_labels = Labels(kind=LabelKind.tags, names=("O", "B-NAME", "I-NAME"))

    def row_weights(self, counts: Any, labels: Sequence[Any], of: Labels) -> Any:
        """Return the words of each row, or the sum of their classes' weights. Shape (rows,)."""
        import numpy as np

        if not of.weights:
            return counts
        return np.array([sum(of.weights[of.numbers[str(tag)]] for tag in tags) for tags in labels])

    def make_targets(self, rows: Sequence[Any], length: int, labels: Labels) -> Targets:
        """Judge the logits at the first token of every word."""
        import numpy as np
        import torch

        from llmtune.task.targets import Targets

        positions = [np.zeros(0, dtype=np.int64)]
        tags: list[int] = []
        for index, row in enumerate(rows):
            if row is not None:
                positions.append(np.flatnonzero(row.mask) + index * length)
                tags += labels.encode(row.label)  # type: ignore[arg-type]
        weights = [labels.weights[tag] for tag in tags] if labels.weights else [1.0] * len(tags)
        return Targets(
            positions=torch.from_numpy(np.concatenate(positions)),
            values=torch.tensor(tags, dtype=torch.long),
            weight=float(sum(weights)),
            row_length=length,
        )

    def sum_losses(self, logits: torch.Tensor, targets: Targets, labels: Labels) -> torch.Tensor:
        """Return the summed cross entropy of the words."""
        from llmtune.task.losses import sum_cross_entropy

        return sum_cross_entropy(logits, targets, labels.weights)

    def sum_smoothed_losses(
        self, logits: torch.Tensor, targets: Targets, labels: Labels, smoothing: float
    ) -> torch.Tensor:
        """Return the summed cross entropy with smoothed targets."""
        from llmtune.task.losses import sum_cross_entropy

        return sum_cross_entropy(logits, targets, labels.weights, smoothing=smoothing)

    def observe(self, logits: torch.Tensor, targets: Targets) -> dict[str, torch.Tensor]:
        """Keep the class that the model gives to every word, its own, and the words per row."""
        import torch

        from llmtune.task.losses import pick

        rows = logits.shape[0]
        # ``bincount`` would wait for a GPU to find out how many rows there are.
        words = targets.positions.new_zeros(rows)
        words.index_add_(
            0, targets.positions // targets.row_length, torch.ones_like(targets.positions)
        )
        return {
            "predicted": pick(logits, targets).argmax(-1),
            "values": targets.values,
            "words": words,
        }

    def metrics(
        self, loss: float, observed: dict[str, torch.Tensor], labels: Labels
    ) -> dict[str, float]:
        """Compute the scores of the entities, and the accuracy of the tags."""
        from llmtune.metrics.entities import entity_metrics

        return entity_metrics(*_name_tags(observed, labels))

    def count(self, observed: dict[str, torch.Tensor], labels: Labels) -> ConfusionTable:
        """Count the entities of each type."""
        from llmtune.metrics.confusion import ConfusionTable

        return ConfusionTable.of_tags(*_name_tags(observed, labels))

    def describe_predictions(
        self, logits: torch.Tensor, rows: Sequence[Any], labels: Labels, top_k: int | None
    ) -> list[dict[str, Any]]:
        """Name the tag of every word, with its probability; None of words that were cut off."""
        import torch

        from llmtune.task.scores import rounded

        described: list[dict[str, Any]] = []
        for of_row, row in zip(logits, rows, strict=True):
            first = torch.from_numpy(row.mask.nonzero()[0]).to(of_row.device)
            shares, tags = of_row.index_select(0, first).float().softmax(-1).max(-1)
            cut = [None] * (len(row.label) - len(first))
            described.append(
                {
                    "prediction": [labels.names[tag] for tag in tags.tolist()] + cut,
                    "scores": [rounded(share) for share in shares.tolist()] + cut,
                }
            )
        return described


def _name_tags(
    observed: dict[str, torch.Tensor], labels: Labels
) -> tuple[list[list[str]], list[list[str]]]:
    """Name the tags of the words of every row: those that the model gave, and the row's own."""
    words = observed["words"].tolist()
    named = []
    for key in ("predicted", "values"):
        rows = observed[key].split(words)
        named.append([[labels.names[tag] for tag in row.tolist()] for row in rows])
    return named[0], named[1]


TASKS.register(TokenClassification())
