"""Overrides of a command line, written in Python."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from llmtune.cli.arguments import Arguments, Options
from llmtune.cli.verbs import VERBS, compose
from llmtune.config.composed import Composed
from llmtune.errors import ConfigError

#: ``"tuner.lora_r=8"``, as it is typed in a shell, or ``{"tuner.lora_r": 8}``.
Override = str | Mapping[str, Any]

#: A key of a mapping that needs no quotes, of which Hydra's grammar has none there.
_KEY = re.compile(r"\w[\w./-]*")


def to_texts(overrides: tuple[Override, ...]) -> list[str]:
    """Return overrides as the command line has them.

    Args:
        overrides: Texts ``KEY=VALUE``, and mappings of keys to values. A text in a mapping arrives
            as it is: the word ``"null"`` is no null, and ``"8"`` no number.

    Raises:
        ConfigError: An argument is neither, or a value has no counterpart on the command line.
    """
    return [text for override in overrides for text in _to_texts(override)]


def compose_verb(verb: str, overrides: tuple[Override, ...], config_dir: str | None) -> Composed:
    """Compose the configuration of a verb.

    Args:
        config_dir: A folder with group files of your own, as ``--config-dir``.

    Raises:
        ConfigError: With every problem that was found.
    """
    arguments = Arguments(
        verb=verb, overrides=to_texts(overrides), options=Options(config_dir=config_dir)
    )
    return compose(VERBS[verb], arguments)


def _to_texts(override: Override) -> Iterator[str]:
    if isinstance(override, str):
        yield override
    elif isinstance(override, Mapping):
        for key, value in override.items():
            yield f"{key}={_to_value(str(key), value)}"
    else:
        raise ConfigError(
            f"{override!r} is no override: take a text such as 'model=tiny', or a mapping such as"
            " {'tuner.lora_r': 8}"
        )


def _to_value(key: str, value: Any) -> str:
    """Return a value as it is typed, in Hydra's grammar.

    See https://hydra.cc/docs/advanced/override_grammar/basic/.
    """
    if hasattr(value, "item") and getattr(value, "shape", None) == ():
        # A number of numpy or torch.
        value = value.item()
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int) or (isinstance(value, float) and math.isfinite(value)):
        return repr(value)
    if isinstance(value, str | Path):
        return _quote(str(value))
    if isinstance(value, list | tuple):
        return f"[{','.join(_to_value(key, item) for item in value)}]"
    if isinstance(value, Mapping) and all(_KEY.fullmatch(str(name)) for name in value):
        items = (f"{name}: {_to_value(key, item)}" for name, item in value.items())
        return f"{{{', '.join(items)}}}"
    raise ConfigError(f"{key}={value!r}: no override has such a value")


def _quote(text: str) -> str:
    """Quote a text, whose backslashes before a quote or at the end are read in pairs."""
    body, backslashes = "", 0
    for letter in text:
        if letter == "'":
            # Those before the quote are doubled, and one escapes it.
            body += "\\" * (backslashes + 1)
        body += letter
        backslashes = backslashes + 1 if letter == "\\" else 0
    return f"'{body}{chr(92) * backslashes}'"
