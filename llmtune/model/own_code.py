"""Python code that is part of a model: it runs only if this command's overrides ask for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llmtune.errors import ConfigError
from llmtune.security.trust import read_foreign
from llmtune.storage.plain_json import parse_json

KEY = "model.trust_remote_code"

#: Files of a model folder that may name its own classes, under this key.
_FILES = ("config.json", "tokenizer_config.json", "processor_config.json", "generation_config.json")
_NAMED = "auto_map"


def find_own_code(folder: Path) -> list[str]:
    """Return the Python classes that a model folder brings, such as ``modeling_x.XForCausalLM``.

    They may be in another repository.
    """
    classes: set[str] = set()
    for name in _FILES:
        try:
            named = parse_json(read_foreign(folder / name, ConfigError)).get(_NAMED)
        except (ConfigError, ValueError, AttributeError):
            continue
        values = named.values() if isinstance(named, dict) else [named]
        for value in values:
            entries = value if isinstance(value, list) else [value]
            classes |= {str(entry) for entry in entries if entry}
    return sorted(classes)


def describe_own_code(folder: Path) -> str:
    """Warn that a folder's code is about to run; an empty string for a model without any."""
    classes = find_own_code(folder)
    if not classes:
        return ""
    return f"note: Python code that {folder} names runs now ({KEY}=true): {', '.join(classes)}"


@contextmanager
def explain_own_code(
    folder: Path, asked_by: str | None, of_adapter: bool = False
) -> Iterator[None]:
    """Turn a library's refusal to run a model's code into an error with the next step.

    Args:
        asked_by: The owner of a stored configuration that asked for it, which does not count.
        of_adapter: The folder is an adapter's, whose code never runs.

    Raises:
        ConfigError: The folder needs its own code.
    """
    try:
        yield
    except ValueError as error:
        if KEY.partition(".")[2] not in str(error):
            raise
        asked = ""
        if asked_by:
            asked = f" {asked_by} asks for that itself, which does not count: it may be anybody's."
        advice = f"Read it; if you trust it, add {KEY}=true to this command"
        if of_adapter:
            advice = (
                f"It need not: the code of an adapter never runs, but {KEY}=true has the base's"
                " class read its tokens"
            )
        classes = ", ".join(find_own_code(folder)) or "of another repository"
        raise ConfigError(
            f"{folder} needs its own Python code ({classes}), which would run as you.{asked}"
            f" {advice}"
        ) from error
