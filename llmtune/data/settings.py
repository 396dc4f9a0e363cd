"""What ``data`` says, read without opening a file: sources that can be parsed, that can be
streamed, and a template.
"""

from __future__ import annotations

from llmtune.config.groups.data import DataConfig
from llmtune.data.read.sources import Source, parse_sources
from llmtune.data.tokenize.chat_template import load_chat_template
from llmtune.errors import ConfigError


def check_data_settings(config: DataConfig) -> None:
    """
    Raises:
        ConfigError: Preparing the data would refuse them, whatever is in the files.
    """
    sources = parse_sources(config.train, "data.train", config.format)
    check_eval_sources(parse_sources(config.eval, "data.eval", config.format))
    if config.streaming:
        check_streamed_sources(sources)
    load_chat_template(config.chat_template)


def check_eval_sources(sources: list[Source]) -> None:
    """
    Raises:
        ConfigError: A source is to be mixed, which evaluation does not do.
    """
    for source in sources:
        for name, value in (("repeat", source.repeat), ("weight", source.weight)):
            if value not in (1, None):
                raise ConfigError(
                    f"data.eval: {name}={value} of {source.path}: evaluation takes each row once;"
                    " leave it out"
                )


def check_streamed_sources(sources: list[Source]) -> None:
    """
    Raises:
        ConfigError: A source has what a stream cannot have.
    """
    for source in sources:
        # An absent limit is None, an absent repeat 1.
        for name, value, absent in (("limit", source.limit, None), ("repeat", source.repeat, 1)):
            if value != absent:
                raise ConfigError(
                    f"data.streaming=true with {name}={value} of {source.path}: a stream has no"
                    f" {name}"
                )
