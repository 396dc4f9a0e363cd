"""Python code that a model brings along: it runs only where the command line of this call asks for
it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llmtune.errors import ConfigError
from llmtune.security.trust import read_foreign
from llmtune.storage.plain_json import parse_json

KEY = "model.trust_remote_code"

#: Files of a model folder that may name classes of its own, under this key.
_FILES = ("config.json", "tokenizer_config.json", "processor_config.json", "generation_config.json")
_NAMED = "auto_map"


def find_own_code(folder: Path) -> list[str]:
    """The classes of its own that a model folder names, such as ``modeling_x.XForCausalLM``; or of
    another repository.
    """
    found: set[str] = set()
    for name in _FILES:
        try:
            named = parse_json(read_foreign(folder / name, ConfigError)).get(_NAMED)
        except (ConfigError, ValueError, AttributeError):
            continue
        values = named.values() if isinstance(named, dict) else [named]
        for value in values:
            found |= {str(item) for item in (value if isinstance(value, list) else [value]) if item}
    return sorted(found)


def describe_own_code(folder: Path) -> str:
    """A warning that the code of a folder is about to run; empty for a model without any."""
    classes = find_own_code(folder)
    return (
        f"note: Python code that {folder} names runs now ({KEY}=true): {', '.join(classes)}"
        if classes
        else ""
    )


@contextmanager
def explain_own_code(
    folder: Path, asked_by: str | None, of_adapter: bool = False
) -> Iterator[None]:
    """In the block, a library's refusal to run a model's code becomes an error with the next step.

    Args:
        asked_by: Whose stored configuration asked for it in vain.
        of_adapter: Whether the folder is an adapter's, whose code never runs.

    Raises:
        ConfigError: The folder needs code of its own.
    """
    try:
        yield
    except ValueError as error:
        if KEY.partition(".")[2] not in str(error):
            raise
        asked = (
            f" {asked_by} asks for that itself, which does not count: it may be anybody's."
            if asked_by
            else ""
        )
        advice = f"Read it; if you trust it, add {KEY}=true to this command"
        if of_adapter:
            advice = (
                f"It need not: the code of an adapter never runs, but {KEY}=true has the base's"
                " class read its tokens"
            )
        classes = ", ".join(find_own_code(folder)) or "of another repository"
        raise ConfigError(
            f"{folder} needs Python code of its own ({classes}), which would run as you.{asked}"
            f" {advice}"
        ) from error
