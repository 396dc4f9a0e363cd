"""List the forms in which a secret can appear: as it is, escaped, in base64 or in hex.

Each character but letters and digits has many spellings: escaped for JSON, Python, a shell or YAML,
percent-encoded, as HTML has it, and each of these within another. A text holds the secret where it
has a spelling of each of its characters in turn.
"""

import base64
import binascii
import re
from collections.abc import Iterable, Sequence
from functools import cache, lru_cache
from typing import NamedTuple

#: Words for what opens something, in names of variables, of parts of a connection string, and of
#: fields in JSON.
SECRET_WORDS = re.compile(
    r"TOKEN(?!IZER)|SECRET|PASSWORD|PASSWD|PASSPHRASE|PASSCODE|(?<!ASK)(?<!BY)(?<!COM)(?<!SUR)PASS$|_PASS_|(?<=_)(PWD|PSWD|PW)$"
    r"|API_?KEY|ACCESS_?KEY|ACCOUNT_?KEY|PRIVATE_?KEY|SHARED_?KEY|SIGNATURE|CREDENTIAL|_KEY$|_PAT$|(?<![A-Z0-9])SAS(?![A-Z0-9])"
    r"|CONN(ECTION)?_?STR(ING)?|WEBHOOK|(?<![A-Z0-9])DSN$|(?<![A-Z0-9])AUTH$|AUTH_?CONFIG|AUTHORIZATION|(?<![A-Z0-9])JWT"
    r"|COOKIE(?!CUTTER)|(?<![A-Z0-9])BEARER",
    re.IGNORECASE,
)

#: Below this, what is left of a value in base64 would be found by chance.
_MIN_ENCODED = 8

#: No spelling of a character is longer, but for more than three writers within each other.
_MAX_SPELLING = 48

#: Beginnings of the spellings of a character that are not the character itself.
_STARTERS = ("\\", "%", "&", "'", '"')


class Spelled(NamedTuple):
    """A sign (neither letter nor digit), or a run of backslashes, in all spellings."""

    sign: str
    pattern: re.Pattern[str]


class Form(NamedTuple):
    """One form of a value: literal texts, and signs with many spellings, in turn."""

    parts: tuple[str | Spelled, ...]

    @property
    def pattern(self) -> str:
        """Return the regular expression of this form."""
        return "".join(
            re.escape(part) if isinstance(part, str) else part.pattern.pattern
            for part in self.parts
        )

    @property
    def least(self) -> int:
        """Count the characters of the shortest text of this form."""
        return sum(len(part) if isinstance(part, str) else 1 for part in self.parts)

    @property
    def most(self) -> int:
        """Count the characters of the longest one."""
        return sum(len(part) if isinstance(part, str) else _MAX_SPELLING for part in self.parts)

    def matches(self, text: str) -> bool:
        """Tell whether all of a text has this form."""
        if not all(part in text for part in self.parts if isinstance(part, str)):
            return False
        return _compiled(self.pattern).fullmatch(text) is not None

    def could_begin(self, text: str, start: int) -> bool:
        """Tell whether a text may end within this form, from ``start`` on; in doubt, True."""
        places = {start}
        for part in self.parts:
            following = set()
            for place in places:
                if isinstance(part, str):
                    if text.startswith(part, place):
                        following.add(place + len(part))
                    elif part.startswith(text[place:]):
                        return True
                elif len(text) - place < _MAX_SPELLING and text.startswith(_STARTERS, place):
                    # Half of an escape, which may look like a whole one that is shorter.
                    return True
                else:
                    match = part.pattern.match(text, place)
                    following |= {match.end()} if match else set()
                    following |= (
                        {place + len(part.sign)} if text.startswith(part.sign, place) else set()
                    )
            if len(text) in following:
                return True
            if not following:
                return False
            places = following
        return False


def forms_of(value: str) -> list[Form]:
    """Return the forms of a value: the spelled one first, then those of base64 and hex."""
    raw = value.encode(errors="surrogateescape")
    encoded = {
        binascii.hexlify(raw).decode(),
        binascii.hexlify(raw).decode().upper(),
        *_in_base64(raw),
    }
    runs = re.findall(r"[A-Za-z0-9]+|\\+|.", value, re.DOTALL)
    spelled = Form(
        tuple(
            run if re.match("[A-Za-z0-9]", run) else Spelled(run, _spellings(run)) for run in runs
        )
    )
    return [spelled, *(Form((text,)) for text in sorted(encoded) if len(text) >= _MIN_ENCODED)]


def _in_base64(raw: bytes) -> Iterable[str]:
    """Yield the base64 of the bytes at the three offsets within a group of three bytes.

    Characters that also depend on neighboring bytes are left out.
    """
    for before in range(3):
        text = base64.b64encode(b"\0" * before + raw).decode().rstrip("=")
        first, bits = -(-before * 8 // 6), (before + len(raw)) * 8
        inner = text[first : bits // 6]
        yield inner
        yield inner.translate({ord("+"): "-", ord("/"): "_"})


#: A backslash, a percent sign and what is around an entity of HTML, themselves as they are or
#: percent-encoded.
_BACKSLASH = r"(?:\\|%(?:25){0,3}5[cC])"
_PERCENT = r"%(?:25){0,3}"
_ENTITY = r"(?:&|%26)(?:amp(?:;|%3[bB])){{0,3}}(?:{})(?:;|%3[bB])"
_ENTITIES = {'"': "quot", "'": "apos", "<": "lt", ">": "gt", "&": "amp", " ": "nbsp"}
_LETTERS = {
    "\n": "n",
    "\r": "r",
    "\t": "t",
    "\b": "b",
    "\f": "f",
    "\v": "v",
    "\0": "0",
    "\a": "a",
    "\x1b": "e",
}

#: Ways to double a sign within quotes (YAML, CSV, SQL, compose files), and a shell's way to leave
#: its quotes.
_DOUBLED = {
    "'": ("'\\''", "'\"'\"'", "''"),
    '"': ('""',),
    "%": ("%%",),
    "$": ("$$",),
    "\n": ("\r\n", "\\r\\n"),
    # What wraps lines breaks them at blanks.
    " ": ("+", "\n"),
}


@lru_cache(maxsize=4096)
def _spellings(run: str) -> re.Pattern[str]:
    """Match all spellings of a sign, or of a run of backslashes, the longest first."""
    sign, code = run[0], ord(run[0])
    raw = sign.encode(errors="surrogateescape")
    utf16 = sign.encode("utf-16-be", errors="surrogatepass")
    units = [utf16[at : at + 2].hex() for at in range(0, len(utf16), 2)]
    escape = rf"{_BACKSLASH}{{1,16}}"
    names = [
        f"#0*{code}",
        f"#[xX]0*(?i:{code:x})",
        *([_ENTITIES[sign]] if sign in _ENTITIES else []),
    ]
    choices = [
        rf"{_BACKSLASH}{{0,16}}{_ENTITY.format('|'.join(names))}",
        "".join(rf"{escape}u(?i:{unit})" for unit in units),
        rf"{escape}U(?i:{code:08x})",
        "".join(rf"{escape}x(?i:{byte:02x})" for byte in raw),
        *([rf"{escape}x(?i:{code:02x})"] if code < 0x100 else []),
        "".join(rf"{escape}{byte:03o}" for byte in raw),
        *([rf"{escape}{_LETTERS[sign]}"] if sign in _LETTERS else []),
        *(rf"{_BACKSLASH}{{0,16}}{re.escape(text)}" for text in _DOUBLED.get(sign, ())),
        rf"{_BACKSLASH}{{0,16}}" + "".join(rf"{_PERCENT}(?i:{byte:02x})" for byte in raw),
    ]
    if sign == "\\":
        # However many levels of text doubled them; none is left for what follows, which is free to
        # have none.
        return re.compile(
            rf"(?:{_BACKSLASH}{{{len(run)},{16 * len(run)}}}+"
            rf"|(?:{'|'.join(choices)}){{{len(run)}}})"
        )
    return re.compile(rf"(?:{'|'.join(choices)}|{_BACKSLASH}{{0,16}}{re.escape(sign)})")


@cache
def _compiled(pattern: str) -> re.Pattern[str]:
    # The cache of ``re`` is smaller than some environments.
    return re.compile(pattern)


def join_patterns(patterns: Sequence[str]) -> re.Pattern[str] | None:
    """Join patterns into one expression; None for no patterns."""
    return re.compile("|".join(patterns)) if patterns else None
