"""Recipes by which the rows of a file become conversations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from llmtune.data.formats.format import FORMATS
from llmtune.data.rows.conversation import Conversation
from llmtune.data.rows.fields import find_unknown_fields, without_fields
from llmtune.data.rows.json_text import with_lists
from llmtune.data.rows.values import Row, rename
from llmtune.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Recipe:
    """The format of a file, the names of its columns, and the fields that are ignored."""

    format: str
    fields: Mapping[str, str]
    """Field of the format -> column of the file."""
    ignore: frozenset[str] = frozenset()
    """Fields that are left out knowingly."""

    def read(self, row: Row) -> tuple[Conversation, set[str]]:
        """Return the conversation of a row, and the fields that no format reads.

        Raises:
            RowError: The row cannot be used.
        """
        if self.ignore:
            row = without_fields(row, self.ignore)
        kind = FORMATS.find(self.format)
        row = with_lists(rename(row, self.fields), kind.lists, kind.lists_may_be_texts, self.ignore)
        conversation = kind.read(row)
        if not isinstance(conversation, Conversation):
            raise ConfigError(
                f"data.format={kind.name}: read() must return a Conversation, not {conversation!r}"
            )
        return conversation, find_unknown_fields(
            row, kind.fields | kind.more_fields(row), kind.lists
        )
