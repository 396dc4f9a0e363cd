"""Write a page as one HTML file that loads nothing: texts escaped, charts as data, one script.

Everything of a run is foreign: it goes through Jinja's escaping as text, or through
:func:`to_script_json` as data, and never into the script. A policy in the page's head forbids the
browser every request.
"""

from __future__ import annotations

import itertools
import json
import uuid
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from llmtune.report.page import Block, Chart, Page
from llmtune.security.redaction import redact

_FOLDER = Path(__file__).parent
#: Letters that could end a script element or a line of JavaScript, as JSON may also write them.
_ESCAPES = {ord(letter): f"\\u{ord(letter):04x}" for letter in ("<", ">", "&", "\u2028", "\u2029")}


def to_script_json(value: Any) -> Markup:
    """Write a value as JSON that is safe within a script element, whatever texts it holds.

    Raises:
        ValueError: A number in it is not finite.
    """
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return Markup(text.translate(_ESCAPES))


def render_page(page: Page, script: str) -> str:
    """Render a page.

    Args:
        script: The libraries that draw, from :func:`llmtune.report.script.read_script`.
    """
    template = _environment().get_template("page.html.jinja")
    specs = {chart.name: chart.spec for chart in page.charts}
    # The script joins when secrets have been looked for, which it does not hold. No text of a run
    # can hold the name that stands for it meanwhile.
    mark = f"/*{uuid.uuid4().hex}*/"
    text = redact(template.render(page=page, specs=specs, script=Markup(mark)))
    before, _, after = text.partition(mark)
    # A page without a chart needs no script.
    library = script.replace("</script", "<\\/script") if specs else ""
    return f"{before}{library}{after}"


def _group(blocks: Sequence[Block]) -> list[tuple[bool, list[Block]]]:
    """Join charts that follow each other, which share lines of a wide page."""
    return [
        (is_chart, list(group))
        for is_chart, group in itertools.groupby(blocks, lambda block: isinstance(block, Chart))
    ]


@cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_FOLDER),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["script_json"] = to_script_json
    environment.filters["groupby_run"] = _group
    return environment
