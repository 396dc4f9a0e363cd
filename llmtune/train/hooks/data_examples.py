"""Write some training rows with what is trained of them, and the rows' lengths, for the report."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmtune.data.prepared_data import open_rows
from llmtune.data.report.statistics import TextSpan, measure_lengths, redact_texts, show_row
from llmtune.data.rows.problems import format_location
from llmtune.engine.distributed import Rank
from llmtune.storage import layout
from llmtune.storage.atomic import write_atomically
from llmtune.train.training_state import TrainingState

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from llmtune.data.store.token_store import Rows
    from llmtune.plan.prepared_data import PreparedData

#: Rows that are shown, and letters of each.
_SHOWN_ROWS, _MOST_LETTERS = 2, 4000

log = logging.getLogger(__name__)


class DataExamples:
    """Writes ``data_examples.json`` on rank 0 before the first step."""

    def __init__(
        self,
        run: Path,
        rank: Rank,
        data: PreparedData,
        tokenizer: PreTrainedTokenizerBase,
        say: Callable[[str], None],
    ):
        self.run = run
        self.rank = rank
        self.data = data
        self.tokenizer = tokenizer
        self.say = say

    def on_start(self, progress: TrainingState) -> None:  # noqa: ARG002 - as all hooks
        """Write the rows; a run goes on without them."""
        if not self.rank.is_first:
            return
        try:
            values = describe_rows(open_rows(self.data, "train"), self.tokenizer)
            text = json.dumps(values).encode(errors="backslashreplace")
            write_atomically(self.run / layout.DATA_EXAMPLES, text)
        except Exception as error:
            log.exception("%s", layout.DATA_EXAMPLES)
            self.say(f"{layout.DATA_EXAMPLES} is not written ({type(error).__name__}: {error})")

    def on_end(self, progress: TrainingState) -> None:
        """Do nothing: the rows are the same."""


def describe_rows(rows: Rows, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return the lengths of all documents, and the first and the middle row as pieces of text."""
    numbers = range(0, len(rows), max(1, len(rows) // _SHOWN_ROWS))[:_SHOWN_ROWS]
    shown = []
    for number in numbers:
        pieces = _cut(redact_texts(show_row(rows, number, tokenizer)))
        where = format_location(*rows.location(rows.first_document(number)))
        shown.append({"from": where, "pieces": [[piece.text, piece.trained] for piece in pieces]})
    return {"lengths": measure_lengths(rows).to_dict(), "rows": shown}


def _cut(pieces: list[TextSpan]) -> list[TextSpan]:
    """Cut a long row off."""
    kept: list[TextSpan] = []
    left = _MOST_LETTERS
    for piece in pieces:
        kept.append(TextSpan(piece.text[:left], piece.trained))
        left -= len(piece.text)
        if left < 0:
            return [*kept, TextSpan(" ...", False)]
    return kept
