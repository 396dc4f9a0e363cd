"""Only a template that provably writes contents unchanged counts as one."""

from __future__ import annotations

import pytest
from jinja2 import Environment

from llmtune.data.tokenize.static_template import Verbatim, find_verbatim


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}{% endfor %}", Verbatim.yes),
        (
            "{% for m in messages[1:] %}{{ m.content }}{% endfor %}{{ messages[0].content }}",
            Verbatim.yes,
        ),
        (
            "{% set rest = messages[1:] %}{% for m in rest %}{{ m.content | trim }}{% endfor %}",
            Verbatim.trimmed,
        ),
        (
            "{% for m in messages %}{% set text = 'x' + m.content %}{{ text }}{% endfor %}",
            Verbatim.yes,
        ),
        (
            "{% for m in messages %}{{ m.content if m.role == 'user' else 'x' }}{% endfor %}",
            Verbatim.yes,
        ),
        ("{{ messages | length }}", Verbatim.yes),
        (
            (
                "{% for m in messages %}{% set text = m.content %}{% if text %}{{ text }}{% endif"
                " %}{% endfor %}"
            ),
            Verbatim.no,
        ),
        (
            (
                "{% for m in messages %}{% if 'x' in m.content %}{{ m.content }}{% endif %}{%"
                " endfor %}"
            ),
            Verbatim.no,
        ),
        ("{% for m in messages %}{{ m.content | upper }}{% endfor %}", Verbatim.no),
        ("{% for m in messages %}{{ m.content.split('x')[0] }}{% endfor %}", Verbatim.no),
        ("{% for m in messages %}{{ m.content[:5] }}{% endfor %}", Verbatim.no),
        ("{% for m in messages %}{{ m['con' + 'tent'] | upper }}{% endfor %}", Verbatim.no),
        ("{% for m in messages %}{{ m }}{% endfor %}", Verbatim.no),
        ("{% for m in messages %}{{ m.get('content') }}{% endfor %}", Verbatim.no),
        ("{{ messages | tojson }}", Verbatim.no),
        ("{% for m in messages if m.content %}x{% endfor %}", Verbatim.no),
        ("{% for m in messages | reverse %}{{ m.content }}{% endfor %}", Verbatim.no),
        (
            (
                "{% macro f(m) %}{{ m.content | upper }}{% endmacro %}{% for m in messages %}{{"
                " f(m) }}{% endfor %}"
            ),
            Verbatim.no,
        ),
        (
            (
                "{% set all = namespace(t='') %}{% for m in messages %}{% set all.t = all.t +"
                " m.content %}{% endfor %}"
            ),
            Verbatim.no,
        ),
        ("{% for m in messages %}{% set x = m %}{{ x.content | upper }}{% endfor %}", Verbatim.no),
        ("{% for a, b in messages | items %}{{ a.content }}{% endfor %}", Verbatim.no),
        ("{% for m in messages %}{{ loop.previtem.content | upper }}{% endfor %}", Verbatim.no),
        ("{% for m in messages %}{% for k in m %}{{ m[k] }}{% endfor %}{% endfor %}", Verbatim.no),
        ("{% for m in messages %}{{ ('%s' | format(m.content)) }}{% endfor %}", Verbatim.no),
        (
            "{% set a %}{{ messages[0].content }}{% endset %}{% if 'x' in a %}y{% endif %}",
            Verbatim.no,
        ),
        ("{% filter trim %}{{ messages[0].content }}{% endfilter %}", Verbatim.no),
        ("{% macro b() %}{{ messages[0].content }}{% endmacro %}{{ b() | upper }}", Verbatim.no),
    ],
)
def test_only_what_provably_writes_words_as_they_are_counts(
    template: str, expected: Verbatim
) -> None:
    assert find_verbatim(Environment().parse(template)) is expected
