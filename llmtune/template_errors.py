"""The errors that a chat template, a program of its author, can raise."""

from __future__ import annotations

import jinja2

#: From ``raise_exception``, unknown names, and the operations of the template.
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
    """Return the first line of a template's error, with the line of a syntax error."""
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    return f"line {error.lineno}: {text}" if isinstance(error, jinja2.TemplateSyntaxError) else text
