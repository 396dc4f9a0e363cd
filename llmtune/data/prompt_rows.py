"""Read the rows of files whose labels or answers are to be predicted."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from llmtune.config.groups.data import AUTO
from llmtune.data.formats.format import FORMATS, RowFormat, detect_prompt_format
from llmtune.data.read.blocks import parse_rows
from llmtune.data.read.parse_sources import parse_sources
from llmtune.data.read.readers import read_blocks
from llmtune.data.read.sources import DataFile, Source, resolve_files
from llmtune.data.rows.conversation import Conversation
from llmtune.data.rows.json_text import with_lists
from llmtune.data.rows.problems import RowError, format_location
from llmtune.data.rows.values import Row, rename
from llmtune.errors import ConfigError, DataError
from llmtune.task.labels import LabelKind


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptRow:
    """A row of the input, in the order of the files."""

    file: str
    line: int
    fields: dict[str, Any]
    """Fields as the file has them; none of a row that cannot be parsed."""
    prompt: Conversation | RowError
    """Conversation that the model is given, or the reason why there is none."""


def parse_input(value: Any) -> list[Source]:
    """The sources of ``predict.input``, of which each row is taken once.

    Raises:
        ConfigError: It is not written as a source, or a source is mixed or drawn from.
    """
    sources = parse_sources(value, "predict.input", AUTO)
    for source in sources:
        for name, given, absent in (
            ("limit", source.limit, None),
            ("repeat", source.repeat, 1),
            ("weight", source.weight, None),
        ):
            if given != absent:
                raise ConfigError(
                    f"predict.input: {name}={given} of {source.path}: every row is predicted once;"
                    " leave it out"
                )
    return sources


def read_prompts(
    sources: list[Source], files: list[list[DataFile]], kind: LabelKind | None
) -> Iterator[PromptRow]:
    """Read every row of some sources, in order; blank lines are none.

    Args:
        files: The files of each source.
        kind: Of the labels that the model tells; None of a language model.

    Raises:
        DataError: A file cannot be read, or has not the fields that the model needs.
    """
    for source, of_source in zip(sources, files, strict=True):
        for file in of_source:
            yield from _read_file(source, file, kind)


def find_files(sources: list[Source]) -> list[list[DataFile]]:
    """The files of each source.

    Raises:
        DataError: There are none, or a file's kind is not known.
    """
    return [resolve_files(source) for source in sources]


def _read_file(source: Source, file: DataFile, kind: LabelKind | None) -> Iterator[PromptRow]:
    chosen: RowFormat | None = None
    for block in read_blocks(file, source):
        for line, row in parse_rows(block):
            if isinstance(row, RowError):
                yield PromptRow(file=file.path, line=line, fields={}, prompt=row)
                continue
            renamed = _rename(row, source)
            if chosen is None:
                chosen = _choose_format(source, renamed, kind, format_location(file.path, line))
            try:
                prompt: Conversation | RowError = _read_prompt(chosen, renamed)
            except RowError as error:
                prompt = RowError(str(error))
            yield PromptRow(file=file.path, line=line, fields=dict(row), prompt=prompt)


def _rename(row: Row, source: Source) -> Row:
    """The row under the names that formats know; columns of labels and answers may be missing."""
    return rename(row, {name: column for name, column in source.fields.items() if column in row})


def _choose_format(source: Source, row: Row, kind: LabelKind | None, where: str) -> RowFormat:
    if source.format == AUTO:
        try:
            return detect_prompt_format(row, kind)
        except RowError as error:
            raise DataError(f"{where}: {error}") from error
    chosen = FORMATS.find(source.format)
    if chosen.prompt is None or kind not in chosen.prompt.label_kinds:
        raise ConfigError(
            f"predict.input: format={source.format} of {source.path}: rows of this format are not"
            " what the model takes; leave it out"
        )
    return chosen


def _read_prompt(chosen: RowFormat, row: Row) -> Conversation:
    prompt = chosen.prompt
    assert prompt is not None
    return prompt.read(with_lists(row, prompt.lists, chosen.lists_may_be_texts))
