"""A model card prints values as they are, whatever letters a stranger gave them."""

from __future__ import annotations

import json
import shlex

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markupsafe import Markup

from llmtune.export.markdown import _ENVIRONMENT, escape


def render(template: str, **values: object) -> str:
    return _ENVIRONMENT.from_string(template).render(values)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain", "plain"),
        ("up_proj and _x_", r"up_proj and \_x\_"),
        ("a | b", r"a \| b"),
        ("<b>&amp;", "&lt;b&gt;&amp;amp;"),
        ("# title\n---\n## next", r"\# title --- \#\# next"),
        ("[a](b) `c` *d*", r"\[a\](b) \`c\` \*d\*"),
        ("\\", "\\\\"),
        ("{{ 7 * 7 }}", r"{{ 7 \* 7 }}"),
        (None, "None"),
        (3, "3"),
    ],
)
def test_a_value_is_shown_as_it_is(text: object, shown: str) -> None:
    assert render("{{ text }}", text=text) == shown
    # Also out of a macro, which must not be escaped again.
    macro = "{% macro show(value) %}*{{ value }}*{% endmacro %}{{ show(text) }}"
    assert render(macro, text=text) == f"*{shown}*"


def test_markdown_is_printed_unchanged() -> None:
    assert render("{{ text }}", text=Markup("*a* | <b>")) == "*a* | <b>"
    assert escape(escape("a_b * c_")) == escape("a_b * c_")


def test_a_secret_is_gone_before_its_letters_are_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_API_TOKEN", "s3cr3t|*_value")
    assert render("{{ text }}", text="a s3cr3t|*_value b") == r"a \*\*\*MY_API_TOKEN\*\*\* b"


@given(st.text())
def test_texts_go_into_code_as_one_word_of_it(text: str) -> None:
    python = render("{{ text | json }}", text=text)
    assert json.loads(python) == text
    assert "\n" not in python
    assert shlex.split(render("{{ text | shell }}", text=text)) == [text]
    assert json.loads(shlex.split(render("{{ text | json | shell }}", text=text))[0]) == text


def test_a_template_that_asks_for_what_it_is_not_given_fails() -> None:
    with pytest.raises(Exception, match="'nobody' is undefined"):
        render("{{ nobody }}")
