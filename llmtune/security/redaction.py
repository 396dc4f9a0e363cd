"""Redact values of secret environment variables, and passwords in URLs, from texts.

Secrets come from the environment or ``.env`` alone, so their values are known and are found by
comparison. Only the standard library's cheap modules are imported here: each rank has a small
process that filters its log with this file.
"""

import base64
import contextlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple
from urllib.parse import unquote

from llmtune.security.secret_forms import SECRET_WORDS, Form, forms_of, join_patterns
from llmtune.security.secret_urls import url_spans, users_of

#: Environment variable that gives ranks the *names* of the variables from ``.env``.
SECRET_NAMES = "LLMTUNE_SECRET_NAMES"

#: Settings of libraries are no secrets even where they came from ``.env``, unless their names are
#: like those of secrets.
_SETTING_NAME = re.compile(
    r"(CUDA|DEEPSPEED|DS|HF|NCCL|OMP|PYTORCH|TOKENIZERS|TORCH|TRANSFORMERS|WANDB)_", re.IGNORECASE
)
#: From this length on, a value is searched for anywhere.
_MIN_LENGTH = 8
#: From this length on, a value that is neither a word nor a number is searched for between signs.
_MIN_ALONE = 4
_PLAIN_WORDS = {
    "anonymous",
    "disabled",
    "enabled",
    "undefined",
    "required",
    "optional",
    "changeme",
    "password",
    *("true", "false", "none", "null", "yes", "no", "on", "off", "0", "1"),
}
#: After no letter and no digit, except at the end of an escape.
_ALONE = r"(?:(?<![A-Za-z0-9])|(?<=%[0-9A-Fa-f]{2})|(?<=\\[ntr])|(?<=\\u[0-9A-Fa-f]{4}))"
#: ``SECRET_WORDS`` for names that are no variables: ``pwd`` and ``auth`` alone are none of the
#: shell's folders there.
_PART_WORDS = re.compile(rf"{SECRET_WORDS.pattern}|^(pwd|pw|pass|auth|key|sig|sas)$", re.IGNORECASE)
_URL_VALUE = re.compile(r"[?&;]([\w.%-]+)=([^\s&;#\"'<>]+)")
_URL_PATH = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]*://[^/\s]+(/\S+)")
_PAIR = re.compile(r"(?:^|[;\s,])([A-Za-z][\w .-]*?)\s*=\s*([^;\s]+)")
_UNFINISHED_URL = re.compile(r"(?:://|[?&][\w.%-]*=)\S{0,4096}\Z")


class _Known(NamedTuple):
    """The secrets of an environment, compiled for the search."""

    pattern: re.Pattern[str] | None
    beside: list[tuple[re.Pattern[str], str]]
    """Short values, which are told from ordinary words only after the names of their variables."""
    unfinished: re.Pattern[str] | None
    """The end of a text that may continue as one of those."""
    forms: list[tuple[Form, str]]
    """The forms that ``pattern`` finds, each with the label that replaces it."""
    longest: int


def redact(text: str) -> str:
    """Replace the value of each secret variable by ``***NAME***``, and passwords in URLs.

    Values are also found in the escaped forms of :mod:`llmtune.security.secret_forms`, and those of
    several lines also line by line. Redacting twice changes nothing.
    """
    (shown,) = redact_pieces([text])
    return shown


def redact_pieces(pieces: Sequence[str]) -> list[str]:
    """Redact the pieces of one text as a whole.

    A secret may begin in one piece and end in another; its label is put into the first.
    """
    text = "".join(pieces)
    spans = _spans(text)
    if not spans:
        return list(pieces)
    shown, start = [], 0
    for piece in pieces:
        shown.append(_without(text, start, start + len(piece), spans))
        start += len(piece)
    return shown


def _without(text: str, start: int, end: int, spans: Sequence[tuple[int, int, str]]) -> str:
    """Return ``text[start:end]`` with the label of each span in the place of its text."""
    parts, place = [], start
    for first, last, label in spans:
        if last <= start or first >= end:
            continue
        parts += [text[place:first], label] if first >= start else []
        place = min(last, end)
    return "".join((*parts, text[place:end]))


def _spans(text: str) -> list[tuple[int, int, str]]:
    """Return start, end and label of each secret in a text, sorted and without overlap."""
    known = _known()
    found: list[tuple[int, int, str]] = []
    if known.pattern is not None:
        found += [
            (*match.span(), _label(known, match[0])) for match in known.pattern.finditer(text)
        ]
    for pattern, label in known.beside:
        found += [(*match.span(1), label) for match in pattern.finditer(text)]
    found += url_spans(text)
    merged: list[tuple[int, int, str]] = []
    for first, last, label in sorted(found, key=lambda span: (span[0], -span[1])):
        if merged and first < merged[-1][1]:
            begin, end, named = merged[-1]
            merged[-1] = (begin, max(end, last), named)
        else:
            merged.append((first, last, label))
    return merged


def _label(known: _Known, text: str) -> str:
    return next(label for form, label in known.forms if form.matches(text))


def redact_values(value: Any) -> Any:
    """Redact every text in a nest of dictionaries, lists and tuples."""
    if isinstance(value, str):
        # Enums whose members are texts stay what they are.
        return redact(value) if type(value) is str else value
    if isinstance(value, dict):
        return {redact_values(key): redact_values(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(redact_values, value))
    return value


def describe_secret_overrides(overrides: Iterable[str]) -> str:
    """Return a note about secrets on the command line, which others see in ``ps``; or ``""``."""
    keys = [text.partition("=")[0].lstrip("+") for text in overrides if redact(text) != text]
    if not keys:
        return ""
    return (
        f"note: there is a secret in {', '.join(keys)}, and every user of a machine can read the"
        " command lines on it (ps). Keep it in the environment, and name it in a file of"
        " --config-dir: ${oc.env:NAME}"
    )


def has_secrets() -> bool:
    """Tell whether this environment holds any secret."""
    known = _known()
    return known.pattern is not None or bool(known.beside)


def split_unfinished(text: str) -> tuple[str, str]:
    """Split an unfinished line into what can be shown, and an end that may begin a secret."""
    known = _known()
    limit = len(text)
    for pattern in (_UNFINISHED_URL, known.unfinished):
        if pattern is not None and (match := pattern.search(text)):
            limit = min(limit, match.start())
    first = max(0, len(text) - known.longest)
    starts = (
        at
        for at in range(first, limit)
        if any(form.could_begin(text, at) for form, _ in known.forms)
    )
    cut = next(starts, limit)
    # A secret that is complete is not cut.
    cut = next((begin for begin, end, _ in _spans(text) if begin < cut < end), cut)
    return text[:cut], text[cut:]


def remember_names(names: Iterable[str]) -> None:
    """Treat the values of these variables as secrets, in this process and its children."""
    if listed := {*names, *_listed_names()}:
        os.environ[SECRET_NAMES] = ",".join(sorted(listed))


def restrict_umask() -> None:
    """Make files that this process and its children create unwritable for other users."""
    os.umask(os.umask(0o022) | 0o022)


def _listed_names() -> set[str]:
    return {name for name in os.environ.get(SECRET_NAMES, "").split(",") if name}


def _known() -> _Known:
    return _known_in(tuple(os.environ.items()))


# An environment rarely changes, and a page or a log redacts each of its texts.
@lru_cache(maxsize=4)
def _known_in(environment: tuple[tuple[str, str], ...]) -> _Known:
    listed = {name for name in _listed_names() if not _SETTING_NAME.match(name)}
    secret = {
        name
        for name, _ in environment
        if name != SECRET_NAMES and (name in listed or SECRET_WORDS.search(name))
    }
    # Of all others only passwords in URLs are secret.
    found = sorted((name, value) for name, value in environment if name in secret or "://" in value)
    return _compile(tuple((name, value, name in secret) for name, value in found))


@lru_cache(maxsize=4)
def _compile(variables: tuple[tuple[str, str, bool], ...]) -> _Known:
    anywhere: dict[str, tuple[Form, str]] = {}
    beside, names = [], []
    for name, given, is_secret in variables:
        value = given.strip()
        for part in _secret_parts(value, is_secret):
            for form, pattern in _to_find(part):
                anywhere.setdefault(pattern, (form, f"***{name}***"))
        if is_secret and 0 < len(value) < _MIN_LENGTH and _is_worth_hiding(value):
            shown = forms_of(value)[0].pattern
            behind = rf"{re.escape(name)}[\"']?\s*[:=]\s*[\"']?({shown})(?!\w)"
            beside.append((re.compile(behind), f"***{name}***"))
            names.append(rf"{re.escape(name)}[^\n]{{0,80}}\Z")
    ordered = sorted(anywhere.items(), key=lambda item: -item[1][0].least)
    return _Known(
        pattern=join_patterns([pattern for pattern, _ in ordered]),
        beside=beside,
        unfinished=join_patterns(names),
        forms=[found for _, found in ordered],
        longest=max((form.most for form, _ in anywhere.values()), default=0),
    )


def _to_find(part: str) -> Iterator[tuple[Form, str]]:
    """Yield the forms in which a part of a secret is searched for, with their patterns."""
    if not _is_worth_hiding(part) or len(part) < _MIN_ALONE:
        return
    if len(part) >= _MIN_LENGTH:
        yield from ((form, form.pattern) for form in forms_of(part))
    elif not (part.isalpha() or part.isdigit()):
        spelled, *encoded = forms_of(part)
        yield spelled, rf"{_ALONE}{spelled.pattern}(?![A-Za-z0-9])"
        yield from ((form, form.pattern) for form in encoded)


def _is_worth_hiding(value: str) -> bool:
    # HF_TOKEN_PATH and GOOGLE_APPLICATION_CREDENTIALS name files.
    # Path would raise for a name that is too long, or a user that is not known.
    is_path = value.startswith(("/", "~", "./")) and os.path.exists(os.path.expanduser(value))  # noqa: PTH110, PTH111
    return value.lower() not in _PLAIN_WORDS and not is_path


def _secret_parts(value: str, is_secret: bool) -> Iterator[str]:
    """Yield the parts of a variable's value that are secret by themselves.

    Args:
        is_secret: The variable's name says that all of it is secret; a password in a URL always is.
    """
    for user in users_of(value):
        name, _, password = user.partition(":")
        # A token alone has letters and digits; a name is a word that may occur anywhere.
        secret = password or (name if not (name.isalpha() or name.isdigit()) else "")
        yield from (secret, unquote(secret)) if secret else ()
    for name, part in _URL_VALUE.findall(value) if "://" in value else ():
        if _PART_WORDS.search(name):
            yield part
            yield unquote(part)
    if not is_secret:
        return
    yield value
    yield from (line.strip() for line in value.splitlines())
    yield from _URL_PATH.findall(value)
    yield from (part for name, part in _PAIR.findall(value) if _PART_WORDS.search(name))
    with contextlib.suppress(ValueError, RecursionError):
        yield from _leaves(json.loads(value), "")


def _leaves(value: Any, name: str) -> Iterator[str]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _leaves(item, str(key))
    elif isinstance(value, list):
        for item in value:
            yield from _leaves(item, name)
    elif isinstance(value, str) and _PART_WORDS.search(name):
        yield value
        with contextlib.suppress(ValueError):
            # What ``docker login`` stores: user and password.
            decoded = base64.b64decode(value, validate=True).decode()
            yield decoded
            yield decoded.partition(":")[2]
