"""What a chat template may raise: it is a program that somebody else wrote."""

from __future__ import annotations

import jinja2

#: Its own complaints (``raise_exception``), names that are not there, and what Python raises for
#: what it computes.
TEMPLATE_ERRORS = (
    jinja2.TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)


def describe_template_error(error: Exception) -> str:
    """The first line of what it says, and where in the template it is no Jinja."""
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    return f"line {error.lineno}: {text}" if isinstance(error, jinja2.TemplateSyntaxError) else text
