"""What must not leave a process: values of secret environment variables, passwords in URLs; every folder may import this.

Secrets come from the environment or ``.env`` alone, so their values are known and are found by comparison. Only the
standard library's cheap modules are imported here: each rank has a small process that filters its log with this file.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from functools import lru_cache
from typing import Any, NamedTuple
from urllib.parse import quote, quote_plus

#: Lists, with commas, the *names* of variables that came from ``.env``, so that ranks know them too.
SECRET_NAMES = "LLMTUNE_SECRET_NAMES"

_SECRET_NAME = re.compile(
    r"TOKEN(?!IZER)|SECRET|PASSWORD|PASSWD|PASSPHRASE|API_?KEY|ACCESS_?KEY|PRIVATE_?KEY|CREDENTIAL|_KEY$|_PAT$",
    re.IGNORECASE,
)
#: Settings of libraries are no secrets even where they came from ``.env``, unless they are named like one.
_SETTING_NAME = re.compile(
    r"(CUDA|DEEPSPEED|DS|HF|NCCL|OMP|PYTORCH|TOKENIZERS|TORCH|TRANSFORMERS|WANDB)_", re.IGNORECASE
)
#: Below this length a value occurs by chance, and replacing it would garble text.
_MIN_LENGTH = 8
_PLAIN_WORDS = {"anonymous", "disabled", "undefined", "required", "optional", "changeme", "password"}
#: ``user:password@`` behind ``://``; in http the part before ``@`` is a token even without a password.
_URL_PASSWORD = re.compile(r"""://[^\s/?#"'<>\\:@]*:[^\s/?#"'<>\\]+@|(?<=http)(s?)://[^\s/?#"'<>\\:@]+@""")
_UNFINISHED_URL = re.compile(r"://\S{0,4096}\Z")


class _Known(NamedTuple):
    """The secrets of an environment, ready to be looked for."""

    replacements: dict[str, str]
    pattern: re.Pattern[str] | None
    longest: int


def redact(text: str) -> str:
    """The text with ``***NAME***`` for the value of each secret variable, and without passwords in URLs.

    A value is also found percent-encoded, JSON-escaped and as ``repr`` shows it; one of several lines line by line too.
    Redacting twice changes nothing.
    """
    known = _known()
    if known.pattern is not None:
        text = known.pattern.sub(lambda match: known.replacements[match[0]], text)
    if "://" in text:
        text = _URL_PASSWORD.sub(lambda match: f"{match[1] or ''}://***@", text)
    return text


def redact_values(value: Any) -> Any:
    """A nest of dictionaries, lists and tuples with every text in it redacted."""
    if isinstance(value, str):
        # Enums whose members are texts stay what they are.
        return redact(value) if type(value) is str else value
    if isinstance(value, dict):
        return {redact_values(key): redact_values(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(redact_values, value))
    return value


def describe_secret_overrides(overrides: Iterable[str]) -> str:
    """What to do about secrets on the command line, which every user of the machine reads in ``ps``; empty without any."""
    keys = [text.partition("=")[0].lstrip("+") for text in overrides if redact(text) != text]
    if not keys:
        return ""
    return (
        f"note: there is a secret in {', '.join(keys)}, and every user of a machine can read the command lines on it (ps). "
        "Keep it in the environment, and name it in a file of --config-dir: ${oc.env:NAME}"
    )


def has_secrets() -> bool:
    """Whether this environment holds any."""
    return _known().pattern is not None


def split_unfinished(text: str) -> tuple[str, str]:
    """Text without its line's end: what can be shown now, and an end that may be the beginning of a secret."""
    known = _known()
    url = _UNFINISHED_URL.search(text)
    limit = url.start() if url else len(text)
    first = max(0, len(text) - known.longest)
    starts = (at for at in range(first, limit) if any(form.startswith(text[at:]) for form in known.replacements))
    cut = next(starts, limit)
    return text[:cut], text[cut:]


def remember_names(names: Iterable[str]) -> None:
    """Count the values of these variables as secrets, here and in the processes that are started from here."""
    if listed := {*names, *_listed_names()}:
        os.environ[SECRET_NAMES] = ",".join(sorted(listed))


def restrict_umask() -> None:
    """Nothing that this process and its children create from now on can be written by others."""
    os.umask(os.umask(0o022) | 0o022)


def _listed_names() -> set[str]:
    return {name for name in os.environ.get(SECRET_NAMES, "").split(",") if name}


def _known() -> _Known:
    listed = {name for name in _listed_names() if not _SETTING_NAME.match(name)}
    found = {name for name in os.environ if name != SECRET_NAMES and (name in listed or _SECRET_NAME.search(name))}
    return _compile(tuple((name, os.environ[name]) for name in sorted(found)))


@lru_cache(maxsize=4)
def _compile(variables: tuple[tuple[str, str], ...]) -> _Known:
    replacements: dict[str, str] = {}
    for name, value in variables:
        if _is_worth_hiding(value.strip()):
            for form in _forms(value.strip()):
                replacements.setdefault(form, f"***{name}***")
    longest_first = sorted(replacements, key=len, reverse=True)
    pattern = re.compile("|".join(map(re.escape, longest_first))) if replacements else None
    return _Known(replacements, pattern, len(longest_first[0]) if replacements else 0)


def _is_worth_hiding(value: str) -> bool:
    # HF_TOKEN_PATH and GOOGLE_APPLICATION_CREDENTIALS name files.
    is_path = value.startswith(("/", "~", "./")) and os.path.exists(os.path.expanduser(value))
    return len(value) >= _MIN_LENGTH and value.lower() not in _PLAIN_WORDS and not is_path


def _forms(value: str) -> set[str]:
    """How a value may look in text."""
    lines = (line.strip() for line in value.splitlines())
    forms = set()
    for text in (value, *(line for line in lines if len(line) >= _MIN_LENGTH)):
        # What os.environ could not decode has no percent-encoded form.
        encoded = text.encode(errors="surrogateescape")
        forms |= {text, quote(encoded, safe=""), quote_plus(encoded), repr(text)[1:-1]}
        forms |= {json.dumps(text, ensure_ascii=ascii_only)[1:-1] for ascii_only in (True, False)}
    return forms
