"""Check the ``data`` settings that need no file: sources, streaming, packing, template."""

from __future__ import annotations

from collections.abc import Iterable

from llmtune.config.groups.data import AUTO, DataConfig
from llmtune.data.formats.format import FORMATS
from llmtune.data.read.parse_sources import parse_sources
from llmtune.data.read.sources import Source
from llmtune.data.tokenize.chat_template import load_chat_template
from llmtune.errors import ConfigError


def check_data_settings(config: DataConfig) -> None:
    """Refuse settings that preparing the data would refuse, whatever is in the files.

    Raises:
        ConfigError: With the first such setting.
    """
    sources = parse_sources(config.train, "data.train", config.format)
    check_eval_sources(parse_sources(config.eval, "data.eval", config.format))
    if config.streaming:
        check_streamed_sources(sources)
    if config.packing:
        check_packed_formats([source.format for source in sources] or [config.format])
    load_chat_template(config.chat_template)


def check_eval_sources(sources: list[Source]) -> None:
    """Refuse evaluation sources that are to be mixed, which evaluation does not do.

    Raises:
        ConfigError: With the first of them.
    """
    for source in sources:
        for name, value in (("repeat", source.repeat), ("weight", source.weight)):
            if value not in (1, None):
                raise ConfigError(
                    f"data.eval: {name}={value} of {source.path}: evaluation takes each row once;"
                    " leave it out"
                )


def check_packed_formats(formats: Iterable[str]) -> None:
    """Refuse packing for rows with labels, because a label belongs to one text.

    Raises:
        ConfigError: One of the formats has labels.
    """
    for name in formats:
        if name != AUTO and FORMATS.find(name).has_labels:
            raise ConfigError(
                f"data.packing=true: {name} rows cannot share a row, since each has a label; take"
                " data.packing=false"
            )


def check_streamed_sources(sources: list[Source]) -> None:
    """Refuse sources with settings that a stream cannot have.

    Raises:
        ConfigError: With the first of them.
    """
    for source in sources:
        # An absent limit is None, an absent repeat 1.
        for name, value, absent in (("limit", source.limit, None), ("repeat", source.repeat, 1)):
            if value != absent:
                raise ConfigError(
                    f"data.streaming=true with {name}={value} of {source.path}: a stream has no"
                    f" {name}"
                )
