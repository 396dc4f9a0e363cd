"""Training and judging of labeled rows in plain PyTorch, transformers and scikit-learn.

Imports nothing of llmtune: the loss is the one that transformers' models compute themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tokenizers.pre_tokenizers import ByteLevel
from torch.nn.utils import clip_grad_norm_

IGNORE = -100


class PlainJob:
    """A model folder with a head, and rows as their file has them."""

    def __init__(self, folder: Path, model_class: str, length: int):
        self.tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder)
        self.model: Any = getattr(transformers, model_class).from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager"
        )
        self.length = length
        self.numbers = {str(name): int(n) for name, n in self.model.config.label2id.items()}
        self.names = {number: name for name, number in self.numbers.items()}

    def train(self, steps: Sequence[Sequence[dict[str, Any]]], rate: float) -> list[float]:
        """The loss of each step, before its update."""
        optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=rate, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0
        )
        losses = []
        self.model.train()
        for rows in steps:
            optimizer.zero_grad()
            loss = self.model(**self.batch(rows)).loss
            loss.backward()
            clip_grad_norm_(self.model.parameters(), 1.0)
            optimizer.step()
            losses.append(float(loss.detach()))
        return losses

    def judge(self, rows: Sequence[dict[str, Any]]) -> tuple[float, Any, Any]:
        """The mean loss of rows, the logits of each row, and its labels."""
        self.model.eval()
        with torch.no_grad():
            batch = self.batch(rows)
            output = self.model(**batch)
        return float(output.loss), output.logits.numpy(), batch["labels"].numpy()

    def batch(self, rows: Sequence[dict[str, Any]]) -> Any:
        if "tokens" in rows[0]:
            return self._words(rows)
        texts: Any = [row.get("text", row.get("sentence1")) for row in rows]
        pairs: Any = [row["sentence2"] for row in rows] if "sentence2" in rows[0] else None
        batch = self.tokenizer(
            texts,
            pairs,
            truncation=True,
            max_length=self.length,
            padding=True,
            return_tensors="pt",
        )
        batch["labels"] = self._labels([row["label"] for row in rows])
        return batch

    def _labels(self, labels: list[Any]) -> torch.Tensor:
        problem = self.model.config.problem_type
        if problem == "regression":
            values = torch.tensor(labels, dtype=torch.float32)
            return values if values.dim() == 1 else values.view(len(labels), -1)
        if problem == "multi_label_classification":
            sets = torch.zeros(len(labels), len(self.numbers))
            for row, names in enumerate(labels):
                for name in names:
                    sets[row, self.numbers[str(name)]] = 1.0
            return sets
        return torch.tensor([self.numbers[str(label)] for label in labels])

    def _words(self, rows: Sequence[dict[str, Any]]) -> Any:
        backend = self.tokenizer.backend_tokenizer
        if isinstance(backend.pre_tokenizer, ByteLevel):
            # transformers' ``add_prefix_space``, which only RoBERTa's own class takes.
            backend.pre_tokenizer = ByteLevel(add_prefix_space=True)
        batch = self.tokenizer(
            [row["tokens"] for row in rows],
            is_split_into_words=True,
            truncation=True,
            max_length=self.length,
            padding=True,
            return_tensors="pt",
        )
        labels = torch.full_like(batch["input_ids"], IGNORE)
        for index, row in enumerate(rows):
            before = None
            for at, word in enumerate(batch.word_ids(index)):
                if word is not None and word != before:
                    labels[index, at] = self.numbers[str(row["tags"][word])]
                before = word
        batch["labels"] = labels
        return batch

    def scores(self, rows: Sequence[dict[str, Any]]) -> dict[str, float]:
        """The metrics of rows by scikit-learn, scipy and seqeval."""
        loss, logits, labels = self.judge(rows)
        problem = self.model.config.problem_type
        if "tokens" in rows[0]:
            return {"eval_loss": loss, **self._tag_scores(logits, labels)}
        if problem == "regression":
            return {"eval_loss": loss, **number_scores(logits.squeeze(-1), labels)}
        if problem == "multi_label_classification":
            return {"eval_loss": loss, **set_scores(logits, labels)}
        return {"eval_loss": loss, **class_scores(logits, labels)}

    def _tag_scores(self, logits: Any, labels: Any) -> dict[str, float]:
        from seqeval.metrics import accuracy_score, f1_score, precision_score, recall_score

        chosen = logits.argmax(-1)
        true, found = [], []
        for row, own in enumerate(labels):
            at = np.flatnonzero(own != IGNORE)
            true.append([self.names[int(number)] for number in own[at]])
            found.append([self.names[int(number)] for number in chosen[row, at]])
        return {
            "eval_accuracy": accuracy_score(true, found),
            "eval_f1": f1_score(true, found),
            "eval_precision": precision_score(true, found),
            "eval_recall": recall_score(true, found),
        }


def class_scores(logits: Any, labels: Any) -> dict[str, float]:
    from sklearn import metrics

    found = logits.argmax(-1)
    shares = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    return {
        "eval_accuracy": metrics.accuracy_score(labels, found),
        "eval_f1": metrics.f1_score(labels, found, average="macro", zero_division=0),
        "eval_f1_micro": metrics.f1_score(labels, found, average="micro", zero_division=0),
        "eval_precision": metrics.precision_score(labels, found, average="macro", zero_division=0),
        "eval_recall": metrics.recall_score(labels, found, average="macro", zero_division=0),
        "eval_matthews": metrics.matthews_corrcoef(labels, found),
        "eval_auroc": metrics.roc_auc_score(labels, shares, multi_class="ovr", average="macro"),
    }


def set_scores(logits: Any, labels: Any) -> dict[str, float]:
    from sklearn import metrics

    found = (logits > 0).astype(int)
    return {
        "eval_accuracy": metrics.accuracy_score(labels, found),
        "eval_f1": metrics.f1_score(labels, found, average="macro", zero_division=0),
        "eval_f1_micro": metrics.f1_score(labels, found, average="micro", zero_division=0),
        "eval_auroc": metrics.roc_auc_score(labels, logits, average="macro"),
    }


def number_scores(values: Any, labels: Any) -> dict[str, float]:
    from scipy.stats import pearsonr, spearmanr

    return {
        "eval_mse": float(((values - labels) ** 2).mean()),
        "eval_pearson": float(pearsonr(values, labels).statistic),
        "eval_spearman": float(spearmanr(values, labels).statistic),
    }
