"""Find credentials in URLs: the part before ``@``, values of the query, and headers beside it."""

import re
from collections.abc import Iterator

_HIDDEN = "***"

#: Behind ``://`` as it is and as JSON may escape it, up to the next one.
_URL = re.compile(r":\\?/\\?/((?:(?!://)[^\s\"'<>\\])+)")
_ENCODED_USER = re.compile(
    r"%3A%2F%2F(?:(?!%2F|%40)\S){0,200}?%3A((?:(?!%40)\S){1,200})%40", re.IGNORECASE
)
_QUERY = re.compile(
    r"(?:[?&;]|%3F|%26)"
    r"(?:(?:[\w.-]{0,40}[-_.])?(?:sig|key|auth|pwd|pass|passwd|code_verifier|jwt|sas|api-?key|authorization)"
    r"|[\w.-]{0,40}(?:token|secret|signature|password|credentials?|apikey|accesskey|accesskeyid))"
    r"(?:=|%3D)(?!\*\*\*)((?:(?!%26)[^\s&;#\"'<>\\)])+)",
    re.IGNORECASE,
)
_HEADER = re.compile(
    r"authorization[\"']?\s*[:=,]\s*[\"']?(?:bearer|basic|token|apikey)\s+(?!\*\*\*)([^\s\"',;<>]+)",
    re.IGNORECASE,
)

#: Schemes in which a name before ``@`` is a token; in others it is a user or a container, unless it
#: looks like one.
_TOKEN_SCHEMES = {"http", "https", "ws", "wss", "git"}
_CONTAINER_SCHEMES = {"abfs", "abfss", "adl", "az", "wasb", "wasbs"}
_SCHEME = re.compile(r"[a-z][a-z0-9+.-]{0,30}\Z", re.IGNORECASE)
_PORT = re.compile(r"\d{1,5}(?:[/?#]|\Z)")
_HOST = re.compile(r"[^/?#@]*")


def url_spans(text: str) -> Iterator[tuple[int, int, str]]:
    """Yield start, end and replacement of the credentials in the URLs of a text."""
    yield from ((start, end, _HIDDEN) for start, end in _users(text))
    if "%40" in text:
        yield from ((*match.span(1), _HIDDEN) for match in _ENCODED_USER.finditer(text))
    if "=" in text or "%3" in text:
        yield from ((*match.span(1), _HIDDEN) for match in _QUERY.finditer(text))
    if "uthorization" in text or "UTHORIZATION" in text:
        yield from ((*match.span(1), _HIDDEN) for match in _HEADER.finditer(text))


def users_of(text: str) -> Iterator[str]:
    """Yield ``user:password``, or the token, of each URL in a text that has one."""
    yield from (text[start:end] for start, end in _users(text))


def _users(text: str) -> Iterator[tuple[int, int]]:
    if "/" in text and "@" in text:
        for match in _URL.finditer(text):
            scheme = _SCHEME.search(text, max(0, match.start() - 31), match.start())
            end = _end_of_user(scheme[0].lower() if scheme else "", match[1])
            if end:
                yield match.start(1), match.start(1) + end


def _end_of_user(scheme: str, rest: str) -> int:
    """Return the length of the credentials after ``://``; 0 for none."""
    ends = [place for place, sign in enumerate(rest) if sign == "@"]
    if not ends:
        return 0
    authority = re.split(r"[/?#]", rest, maxsplit=1)[0]
    if "@" in authority:
        end = authority.rindex("@")
        if ":" not in authority[:end]:
            return end if _is_token(scheme.rpartition("+")[2], rest[:end]) else 0
        host = _HOST.match(rest, end + 1)
        # In a password with @ and /, a part looks like a host but is none.
        is_host = (
            host is None or "." in host[0] or ":" in host[0] or host[0] in ("localhost", "***")
        )
        return end if is_host or ends[-1] == end else ends[-1]
    user, colon, password = rest[: ends[-1]].partition(":")
    # A password with / in it, or a port and a path with @ in it.
    is_password = colon and not re.search(r"[/?#\[]", user) and not _PORT.match(password)
    return ends[-1] if is_password else 0


def _is_token(scheme: str, name: str) -> bool:
    if scheme in _TOKEN_SCHEMES:
        return True
    mixed = any(sign.isdigit() for sign in name) and any(sign.isalpha() for sign in name)
    return scheme not in _CONTAINER_SCHEMES and len(name) >= 16 and mixed
