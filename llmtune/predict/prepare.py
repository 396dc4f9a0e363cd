"""Read the input, refuse what cannot be predicted, and write the windows of rows."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llmtune.config.groups.data import OnBadRow
from llmtune.data.prompt_encoder import PromptEncoder
from llmtune.data.prompt_rows import PromptRow
from llmtune.data.rows.problem_report import refuse
from llmtune.data.rows.problems import Problem, RowError
from llmtune.data.store.vocabulary import (
    check_padding,
    describe_unknown_token,
    embedding_rows,
)
from llmtune.data.tokenize.encode import Encoder
from llmtune.data.tokenize.settings import EncodeSettings
from llmtune.data.tokenize.token_row import Outcome, Overflow, TokenRow
from llmtune.data.tokenize.workers import make_encoder
from llmtune.errors import DataError
from llmtune.plan.abilities import check_row_length, max_positions
from llmtune.predict.folder import JobFolder, Prepared, PreparedRow
from llmtune.predict.share import window_size
from llmtune.run.target import Target
from llmtune.task.labels import Tags
from llmtune.task.task import find_task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ADVICE = (
    "Fix them, or take data.on_bad_row=skip, which gives such rows no prediction and says why; no"
    " row has been predicted"
)

#: Problems that are collected before the input is refused.
_MOST_PROBLEMS = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class RowEncoder:
    """Makes the rows that a target takes of the rows of the input."""

    target: Target
    tokenizer: PreTrainedTokenizerBase
    encoder: Encoder | PromptEncoder
    known_tokens: int | None
    """Tokens that the model has embeddings for; None where its configuration does not say."""

    @classmethod
    def of(cls, target: Target, tokenizer: PreTrainedTokenizerBase) -> RowEncoder:
        """Make the encoder of a target.

        Raises:
            ConfigError: The rows of ``data.max_seq_length`` tokens are longer than the model has
                positions for, or rows cannot be padded.
        """
        check_padding(target.model_folder, tokenizer)
        settings = EncodeSettings.from_config(target.config.data)
        positions = _find_positions(target)
        encoder: Encoder | PromptEncoder
        if find_task(target.config.model.task).generates:
            answer = target.config.predict.max_new_tokens
            encoder = PromptEncoder(
                tokenizer, settings, None if positions is None else positions - answer
            )
        else:
            check_row_length(settings.max_seq_length, positions, target.base_name)
            encoder = make_encoder(tokenizer, settings)
        return cls(
            target=target,
            tokenizer=tokenizer,
            encoder=encoder,
            known_tokens=embedding_rows(target.model_folder),
        )

    def encode(self, rows: Sequence[PromptRow]) -> list[tuple[PreparedRow, bool, bool]]:
        """Each row as the model takes it, whether it is a bad one, and whether it was cut.

        Raises:
            ConfigError: A chat template is needed, and there is none that works.
        """
        prompts = [row.prompt for row in rows if not isinstance(row.prompt, RowError)]
        encoded: Any = self.encoder.encode(prompts)
        outcomes: Iterator[Outcome | TokenRow] = iter(encoded)
        made: list[tuple[PreparedRow, bool, bool]] = []
        for row in rows:
            outcome: Outcome | TokenRow = (
                row.prompt if isinstance(row.prompt, RowError) else next(outcomes)
            )
            made.append(self._prepare(row, outcome))
        return made

    def _prepare(self, row: PromptRow, outcome: Any) -> tuple[PreparedRow, bool, bool]:
        if isinstance(outcome, RowError):
            return PreparedRow(fields=row.fields, error=str(outcome)), True, False
        if isinstance(outcome, Overflow):
            limit = self.target.config.data.max_seq_length
            error = (
                f"the row has {outcome.tokens or 'many'} tokens, more than"
                f" data.max_seq_length={limit}, and data.overlong=drop leaves such rows out"
            )
            return PreparedRow(fields=row.fields, error=error), False, False
        (tokens,) = outcome if isinstance(outcome, list) else [outcome]
        if (unknown := self._find_unknown_token(tokens)) is not None:
            return PreparedRow(fields=row.fields, error=unknown), True, False
        assert not isinstance(row.prompt, RowError)
        label = row.prompt.label
        prepared = PreparedRow(
            fields=row.fields,
            ids=tokens.ids,
            mask=tokens.mask,
            words=len(label) if isinstance(label, Tags) else 0,
            plain=row.prompt.plain,
        )
        return prepared, False, tokens.truncated

    def _find_unknown_token(self, row: TokenRow) -> str | None:
        known = self.known_tokens
        if known is None or int(row.ids.max()) < known:
            return None
        token = int(row.ids[row.ids >= known][0])
        return describe_unknown_token(token, known, self.target.model_folder, self.tokenizer)


def prepare_windows(rows: Iterator[PromptRow], encoder: RowEncoder, folder: JobFolder) -> Prepared:
    """Write the windows of all rows.

    Raises:
        DataError: There is no row, or some cannot be predicted; with ``file:line``.
    """
    config = encoder.target.config
    size = window_size(encoder.target)
    refuses = config.data.on_bad_row is OnBadRow.error
    problems: list[Problem] = []
    count = windows = skipped = truncated = 0
    while window := list(itertools.islice(rows, size)):
        encoded = encoder.encode(window)
        for source, (row, is_bad, is_cut) in zip(window, encoded, strict=True):
            if is_bad and refuses:
                problems.append(Problem(source.file, source.line, str(row.error)))
            skipped += row.error is not None
            truncated += is_cut
        if len(problems) >= _MOST_PROBLEMS:
            break
        # Once something is refused, the rest is only looked through.
        if not problems:
            folder.write_window(windows, [row for row, _, _ in encoded])
        count += len(window)
        windows += 1
    if problems:
        raise refuse(problems, _ADVICE)
    if not count:
        raise DataError("predict.input: there are no rows in it")
    prepared = Prepared(rows=count, windows=windows, skipped=skipped, truncated=truncated)
    folder.write_prepared(prepared)
    return prepared


def _find_positions(target: Target) -> int | None:
    """The tokens of the longest row that the model has positions for."""
    from transformers import AutoConfig

    from llmtune.plan.architecture.meta_model import build_meta_model

    trusted = target.config.model.trust_remote_code
    task = find_task(target.config.model.task)
    architecture = AutoConfig.from_pretrained(str(target.model_folder), trust_remote_code=trusted)
    model, _ = build_meta_model(architecture, trusted, task.model_class)
    return max_positions(model, architecture)
