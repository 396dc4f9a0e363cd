"""The parts of a page: what is said, in tables, charts and texts; nothing of how it is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """A table; a cell is written as it is."""

    kind: ClassVar[str] = "table"
    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    """The first cell of a row is its heading."""
    is_folded: bool = False
    """Shown only when the reader opens it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """A picture that Vega draws, with a text for those who do not see it."""

    kind: ClassVar[str] = "chart"
    name: str
    """Identifier within the page: letters, digits and dashes."""
    title: str
    spec: dict[str, Any]
    """Vega-Lite's description of the picture."""
    text: str
    """The text alternative: sentences that say what the picture shows."""
    table: Table | None = None
    """Its last values."""


@dataclass(frozen=True, slots=True)
class Text:
    """A paragraph."""

    kind: ClassVar[str] = "text"
    text: str


@dataclass(frozen=True, slots=True)
class Code:
    """Commands or code, to be copied."""

    kind: ClassVar[str] = "code"
    text: str


@dataclass(frozen=True, slots=True)
class Row:
    """A row of the data, as pieces of text that are trained on or not."""

    kind: ClassVar[str] = "row"
    title: str
    pieces: Sequence[tuple[str, bool]]
    """Text, and whether it is trained on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """The answers of the model to a prompt, before and after training."""

    kind: ClassVar[str] = "answer"
    prompt: str
    before: str
    after: str
    expected: str


@dataclass(frozen=True, slots=True)
class Heading:
    """A heading within a section."""

    kind: ClassVar[str] = "heading"
    text: str


Block = Table | Chart | Text | Code | Row | Answer | Heading


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """A section of a page."""

    name: str
    """Identifier within the page: letters, digits and dashes."""
    title: str
    blocks: Sequence[Block]


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """A whole page."""

    title: str
    state: str
    """One word or two beside the title, such as ``running``."""
    summary: Sequence[tuple[str, str]]
    """Name and value of the numbers at the top."""
    sections: Sequence[Section]
    notes: Sequence[str] = field(default_factory=tuple)
    """Sentences on what could not be read."""
    written: str = ""
    """The time of writing, as text."""

    @property
    def charts(self) -> list[Chart]:
        """List the charts of all sections."""
        return [
            block
            for section in self.sections
            for block in section.blocks
            if isinstance(block, Chart)
        ]
