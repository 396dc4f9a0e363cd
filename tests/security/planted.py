"""Two hundred secrets of all kinds of names and values, and forty ways in which each may come to be
written.
"""

from __future__ import annotations

import base64
import csv
import html
import io
import json
import random
import re
import shlex
from collections.abc import Callable
from urllib.parse import quote, quote_plus
from xml.sax.saxutils import escape, quoteattr

import yaml

#: Endings of names that say what a variable holds.
NAMES = [
    "TOKEN",
    "API_KEY",
    "SECRET",
    "SECRET_ACCESS_KEY",
    "PASSWORD",
    "PASSWD",
    "PASSPHRASE",
    "PASS",
    "PWD",
    "PAT",
    "KEY",
    "CREDENTIAL",
    "CONNECTION_STRING",
    "STORAGE_SAS",
    "WEBHOOK_URL",
    "DSN",
    "AUTH",
    "AUTH_CONFIG",
    "JWT",
    "COOKIE",
    *("AUTHORIZATION", "PRIVATE_KEY", "APIKEY", "CREDENTIALS", "SESSION_TOKEN"),
]
_LETTERS = "abcdefghijkmnpqrstuvwxyzABCDEFGHJKLMNPQRSTUVWXYZ23456789"
_SIGNS = [
    "",
    "+/=",
    "-_.",
    "!@#$%^&*()",
    "\"'\\`",
    " ",
    "<>&",
    "äöß€",
    "日本🔑",
    "\n",
    "\t;,|",
    "?&=:/@",
]


def plant(count: int, seed: int = 0) -> dict[str, str]:
    """Variables with secrets of 4 to 60 characters, each with signs of two kinds."""
    draw = random.Random(seed)
    planted = {}
    for number in range(count):
        length = draw.choice((7, 8, 12, 20, 32, 40, 60))
        kinds = [_SIGNS[number % len(_SIGNS)], draw.choice(_SIGNS)]
        alphabet = _LETTERS + "".join(kinds) * 4
        # A number in it tells which one was found, and nothing of it is an ordinary word.
        inner = "".join(draw.choice(alphabet) for _ in range(max(0, length - 6)))
        planted[f"P{number}_{NAMES[number % len(NAMES)]}"] = f"q{number:03d}{inner}Zz"
    return planted


def _csv(value: str) -> str:
    out = io.StringIO()
    csv.writer(out, quoting=csv.QUOTE_ALL).writerow([value])
    return out.getvalue()


def _plain_base64(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


#: What is written of a value, by what writes it.
FORMS: dict[str, Callable[[str], str]] = {
    "itself": str,
    "a line of env": lambda value: f"NAME={value}",
    "a dictionary": lambda value: str({"NAME": value}),
    "repr": repr,
    "repr of repr": lambda value: repr(repr(value)),
    "ascii": ascii,
    "bytes": lambda value: repr(value.encode()),
    "JSON": json.dumps,
    "JSON with its letters": lambda value: json.dumps(value, ensure_ascii=False),
    "JSON in JSON": lambda value: json.dumps(json.dumps({"a": value})),
    "JSON with escaped slashes": lambda value: json.dumps(value).replace("/", "\\/"),
    "JSON in repr": lambda value: repr(json.dumps(value)),
    "percent": quote,
    "percent of everything": lambda value: quote(value, safe=""),
    "percent in small letters": lambda value: re.sub(
        "%..", lambda m: m[0].lower(), quote(value, safe="")
    ),
    "percent twice": lambda value: quote(quote(value, safe=""), safe=""),
    "a form": quote_plus,
    "JSON in a URL": lambda value: quote(json.dumps(value), safe=""),
    "HTML": html.escape,
    "HTML with its quotes": lambda value: html.escape(value, quote=False),
    "HTML twice": lambda value: html.escape(html.escape(value)),
    "HTML by numbers": lambda value: "".join(
        s if s.isalnum() and s.isascii() else f"&#{ord(s)};" for s in value
    ),
    "JSON in HTML": lambda value: html.escape(json.dumps(value)),
    "XML": escape,
    "an attribute of XML": quoteattr,
    "base64": _plain_base64,
    "base64 for URLs": lambda value: base64.urlsafe_b64encode(value.encode()).decode(),
    "Basic": lambda value: f"Basic {_plain_base64(f'user:{value}')}",
    "base64 of more": lambda value: _plain_base64(f"ab{value}cd"),
    "hex": lambda value: value.encode().hex(),
    "HEX": lambda value: value.encode().hex().upper(),
    "a shell": shlex.quote,
    "a shell's escapes": lambda value: re.sub(r"([^\w\n])", r"\\\1", value),
    "YAML": lambda value: yaml.safe_dump({"a": value}, width=float("inf")),
    "YAML with its letters": lambda value: yaml.safe_dump(
        {"a": value}, allow_unicode=True, width=float("inf")
    ),
    "YAML in double quotes": lambda value: yaml.safe_dump(
        {"a": value}, default_style='"', width=float("inf")
    ),
    "CSV": _csv,
    "SQL": lambda value: "'" + value.replace("'", "''") + "'",
    "Unicode escapes": lambda value: value.encode("unicode_escape").decode(),
    "a URL's password": lambda value: f"https://me:{quote(value, safe='')}@host/x",
    "a URL's token": lambda value: f"https://host/x?a=1&token={quote(value, safe='')}&b=2",
    "a header": lambda value: f"{{'Authorization': 'Bearer {value}'}}",
    "a cookie": lambda value: f"Set-Cookie: session={value}; HttpOnly",
    "two lines": lambda value: f"first\n  {value}\r\nlast",
}


def traces(value: str) -> set[str]:
    """Texts of which none may be left where any form of the value was written."""
    inner = value[:4]
    return {
        # The beginning tells the secret, and no form changes it but two.
        inner,
        inner.encode().hex(),
        inner.encode().hex().upper(),
        *(text for lead in ("", "user:", "ab") if (text := _core(lead, value))),
    }


def _core(lead: str, value: str) -> str:
    """What base64 makes of the beginning of the value behind ``lead``, without its first and last
    sign.
    """
    raw = lead.encode()
    text = base64.b64encode(raw + value.encode()[:6]).decode()
    return text[-(-len(raw) * 8 // 6) : (len(raw) + 6) * 8 // 6 - 1]
