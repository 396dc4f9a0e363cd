"""Look at the first rows of the data for the kind of their labels."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator

from omegaconf import MISSING

from llmtune.config.groups.data import AUTO, DataConfig
from llmtune.data.formats.format import FORMATS
from llmtune.data.read.blocks import parse_rows
from llmtune.data.read.find_recipes import find_recipe
from llmtune.data.read.parse_sources import parse_sources
from llmtune.data.read.readers import read_blocks
from llmtune.data.read.sources import Source, resolve_files
from llmtune.data.report.label_checks import find_kind
from llmtune.data.rows.problems import RowError
from llmtune.errors import ConfigError, LlmtuneError
from llmtune.task.labels import Label, LabelKind

#: The kind of labels that a format has where no row can be read.
_KINDS = {"classification": LabelKind.name, "token_classification": LabelKind.tags}

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)

#: Rows that are looked at: integers may be followed by numbers with a fraction.
ROWS = 1000


def peek_label_kind(config: DataConfig) -> LabelKind | None:
    """Return the kind of the labels of the first rows; None where they have none.

    Nothing is fetched. Where the rows cannot be read yet, the format decides alone.

    Raises:
        ConfigError: The labels are texts such as 3.8, which may be classes or real numbers.
    """
    if config.train == MISSING:
        return _KINDS.get(config.format)
    source = parse_sources(config.train, "data.train", config.format)[0]
    if source.format != AUTO and not FORMATS.find(source.format).has_labels:
        return None
    try:
        labels = list(itertools.islice(_read_labels(source), ROWS))
    except (LlmtuneError, OSError):
        # The preparation of the data reports it.
        labels = []
    if labels:
        _check_plain(labels)
        return find_kind(labels)
    return _KINDS.get(source.format)


def _check_plain(labels: list[Label]) -> None:
    """Refuse to guess where every label is a number with a fraction that is written as text.

    A CSV file has nothing but text. Other programs take such a column for real numbers.
    """
    texts = [label for label in labels if isinstance(label, str) and _NUMBER.fullmatch(label)]
    fraction = next((text for text in texts if not text.lstrip("+-").isdecimal()), None)
    if fraction is not None and len(texts) == len(labels):
        raise ConfigError(
            f"model.task=auto: the labels of data.train are numbers that are written as text, such"
            f" as {fraction}: take model.task=regression if they are real numbers, or"
            " model.task=sequence_classification if they are names of classes"
        )


def _read_labels(source: Source) -> Iterator[Label]:
    for file in resolve_files(source):
        if "://" in file.path or file.kind == "hub":
            return
        recipe = find_recipe(source, file)
        if recipe is None:
            continue
        if not FORMATS.find(recipe.format).has_labels:
            return
        for block in read_blocks(file, source):
            for _, row in parse_rows(block):
                try:
                    if isinstance(row, RowError):
                        raise row
                    conversation, _ = recipe.read(row)
                except RowError:
                    continue
                if conversation.label is not None:
                    yield conversation.label
