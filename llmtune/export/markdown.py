"""Render the Markdown of a model card from the templates in ``card/templates/``.

A printed value is escaped, so that a reader sees it as it is: names come from strangers. Two
filters write a value into code instead: ``json`` (a text of Python or JSON) and ``shell`` (one
argument of a command).
"""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from llmtune.security.redaction import redact


def render(template: str, /, **values: Any) -> Markup:
    """Render a template of ``card/templates/``, named without its ending."""
    return Markup(_ENVIRONMENT.get_template(f"{template}.md.jinja").render(values))


def escape(value: Any) -> Markup:
    """Write a value so that Markdown shows it as it is, on one line; Markdown itself is unchanged.

    Secrets are removed before their letters are escaped.
    """
    if isinstance(value, Markup):
        return value
    text = " ".join(redact(str(value)).split())
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = re.sub(r"([\\`*\[\]|#])", r"\\\1", text)
    return Markup(re.sub(r"(?<!\w)_|_(?!\w)", r"\\_", text))


def _quote_json(value: Any) -> Markup:
    return Markup(json.dumps(value))


def _quote_shell(value: Any) -> Markup:
    return Markup(shlex.quote(str(value)))


_ENVIRONMENT = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).with_name("card") / "templates"),
    # Jinja's own escaping is HTML's: `finalize` comes first, and what it returns is left alone.
    autoescape=True,
    finalize=escape,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
_ENVIRONMENT.filters |= {"json": _quote_json, "shell": _quote_shell}
