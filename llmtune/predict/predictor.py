"""Predict windows of rows with a loaded model, in batches of rows of like length."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from llmtune.config.groups.verbs.predict import PredictConfig
from llmtune.data.load.collate import Collator
from llmtune.data.store.token_store import Row
from llmtune.draws import Draw, draw_shares
from llmtune.errors import DoesNotFitError
from llmtune.launch.supervise.out_of_memory import memory_pool
from llmtune.model.build import sees_padding
from llmtune.model.generate import Decoding, generate_tokens
from llmtune.predict.folder import WindowRow
from llmtune.run.artifact import load_model
from llmtune.run.target import Target
from llmtune.task.targets import Targets
from llmtune.task.task import find_task

#: Of a forward pass with ``predict.batch_size=auto``: tokens, answers included, and rows. Both are
#: of the rows alone, so that no result depends on the machine's free memory.
AUTO_TOKENS, AUTO_ROWS = 8192, 32


def split_batches(lengths: Sequence[int], batch_size: int | str, answer: int) -> list[list[int]]:
    """Split rows into batches, the longest first.

    Little is padded, and what needs most memory comes first.

    Args:
        lengths: Tokens of each row.
        batch_size: Rows of a batch, or ``auto``.
        answer: Tokens that each row may get in addition.
    """
    order = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
    batches: list[list[int]] = []
    while order:
        size = batch_size
        if not isinstance(size, int):
            size = max(1, min(AUTO_ROWS, AUTO_TOKENS // (lengths[order[0]] + answer)))
        batches.append(order[:size])
        order = order[size:]
    return batches


@dataclass(frozen=True, slots=True, kw_only=True)
class Predictor:
    """A loaded model, and what it is asked."""

    target: Target
    model: Any
    tokenizer: Any

    @classmethod
    def load(cls, target: Target) -> Predictor:
        """Load the model of a target.

        Raises:
            As :func:`llmtune.run.artifact.load_model`.
        """
        model, tokenizer = load_model(target)
        return cls(target=target, model=model, tokenizer=tokenizer)

    def predict(
        self,
        rows: Sequence[WindowRow | None],
        first: int,
        tell: Callable[[int], None] = lambda _: None,
    ) -> list[dict[str, Any]]:
        """Predict each row of a window; those that are not predicted have nothing.

        Args:
            first: Number of the window's first row in the whole input.
            tell: Told of the rows that are done, batch by batch.

        Raises:
            DoesNotFitError: Memory ran out.
        """
        results: list[dict[str, Any]] = [{} for _ in rows]
        for batch in self._split(rows):
            chosen = [row for number in batch if (row := rows[number]) is not None]
            try:
                made = self._predict_batch(chosen, [first + number for number in batch])
            except Exception as error:
                if memory_pool(error) is None:
                    raise
                raise DoesNotFitError(
                    f"out of memory with {len(batch)} rows of {max(len(r.row.ids) for r in chosen)}"
                    f" tokens: {str(error).strip().splitlines()[0][:300]}\nTake a smaller"
                    " predict.batch_size, such as 1, and for a longer input a smaller"
                    " data.max_seq_length"
                ) from error
            for number, result in zip(batch, made, strict=True):
                results[number] = result
            tell(len(batch))
        return results

    @property
    def _settings(self) -> PredictConfig:
        return self.target.config.predict

    def _split(self, rows: Sequence[WindowRow | None]) -> Iterator[list[int]]:
        numbers = [number for number, row in enumerate(rows) if row is not None]
        lengths = [len(row.row.ids) for row in rows if row is not None]
        generates = find_task(self.target.config.model.task).generates
        answer = self._settings.max_new_tokens if generates else 0
        for batch in split_batches(lengths, self._settings.batch_size, answer):
            yield [numbers[index] for index in batch]

    def _predict_batch(
        self, rows: Sequence[WindowRow], numbers: Sequence[int]
    ) -> list[dict[str, Any]]:
        if find_task(self.target.config.model.task).generates:
            return [{"text": text} for text in self._answer(rows, numbers)]
        return self._judge([row.row for row in rows])

    def _judge(self, rows: Sequence[Row]) -> list[dict[str, Any]]:
        """The labels of rows, from the logits that an evaluation sees."""
        task, labels = find_task(self.target.config.model.task), self.target.labels
        collator = Collator(
            pad_token_id=self.tokenizer.pad_token_id,
            masked=sees_padding(self.model),
            token_types="token_type_ids" in self.tokenizer.model_input_names,
            find_targets=_no_targets,
        )
        batch = collator.pad(rows).to(next(self.model.parameters()).device)
        with torch.no_grad():
            logits = self.model(**batch.inputs, use_cache=False).logits
        return task.describe_predictions(logits, rows, labels, self._settings.top_k)

    def _answer(self, rows: Sequence[WindowRow], numbers: Sequence[int]) -> list[str]:
        settings = self._settings
        prompts = [row.row.ids.tolist() for row in rows]
        draws = None
        if settings.temperature > 0:
            of_rows = [
                draw_shares(settings.max_new_tokens, settings.seed, Draw.answer, number)
                for number in numbers
            ]
            draws = torch.tensor([shares.tolist() for shares in of_rows], dtype=torch.float64)
        decoding = Decoding(
            max_new_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            top_p=settings.top_p,
            draws=draws,
        )
        answers = generate_tokens(self.model, self.tokenizer, prompts, decoding)
        return [
            self._to_text(row, prompt, answer)
            for row, prompt, answer in zip(rows, prompts, answers, strict=True)
        ]

    def _to_text(self, row: WindowRow, prompt: list[int], answer: list[int]) -> str:
        """The words of an answer; what continues a plain text keeps its white space."""
        if not row.plain:
            return str(self.tokenizer.decode(answer, skip_special_tokens=True)).strip()
        # By itself, the first word of some tokenizers loses the space before it.
        before = str(self.tokenizer.decode(prompt, skip_special_tokens=True))
        whole = str(self.tokenizer.decode(prompt + answer, skip_special_tokens=True))
        if whole.startswith(before):
            return whole[len(before) :]
        return str(self.tokenizer.decode(answer, skip_special_tokens=True))


def _no_targets(_rows: Sequence[Row | None], length: int) -> Targets:
    empty = torch.zeros(0, dtype=torch.long)
    return Targets(positions=empty, values=empty, weight=0.0, row_length=length)
