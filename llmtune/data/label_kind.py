"""Look at the first rows of the data for the kind of their labels."""

from __future__ import annotations

import itertools
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
from llmtune.errors import LlmtuneError
from llmtune.task.labels import Label, LabelKind

#: The kind of labels that a format has where no row can be read.
_KINDS = {"classification": LabelKind.name, "token_classification": LabelKind.tags}

#: Rows that are looked at: integers may be followed by numbers with a fraction.
ROWS = 1000


def peek_label_kind(config: DataConfig) -> LabelKind | None:
    """Return the kind of the labels of the first rows; None where they have none.

    Nothing is fetched. Where the rows cannot be read yet, the format decides alone.
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
        return find_kind(labels)
    return _KINDS.get(source.format)


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
