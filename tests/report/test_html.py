"""Whatever texts a run holds, its page shows them as text: no element, no script, no request."""

from __future__ import annotations

import itertools
import json
import tempfile
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llmtune.report.compare_page import build_compare_page
from llmtune.report.html import render_page, to_script_json
from llmtune.report.run_facts import read_run
from llmtune.report.run_page import build_run_page
from tests.report.run_folder import make_run

#: A library that draws, of which only the place matters here.
SCRIPT = "window.vegaEmbed = 1; // </script is written otherwise"
HOSTILE = [
    "</script><script>alert(1)</script>",
    "<!--<script>",
    "]]></style><img src=x onerror=alert(1)>",
    "\"' onmouseover='alert(1)",
    "{{ 7 * 7 }}{% raw %}${alert(1)}",
    "a\u2028b\u2029c\x00\x1b[31m",
    "datum['x'] && alert(1)",
    "\ud800 half a pair",
]


class Elements(HTMLParser):
    """Collects what a browser would find in a page."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.attributes: set[str] = set()
        self.scripts: list[str] = []
        self.texts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attrs}
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data: str) -> None:
        if self.lasttag == "script" and self.tags and self.scripts:
            self.scripts[-1] += data
        else:
            self.texts.append(data)


def parse(page: str) -> Elements:
    elements = Elements()
    elements.feed(page)
    elements.close()
    return elements


def render(text: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        run = make_run(Path(folder) / "run", text)
        return render_page(build_run_page(read_run(run)), SCRIPT)


PLAIN = parse(render("plain"))

texts = st.one_of(
    st.text(st.characters(exclude_categories=[]), max_size=20),
    st.lists(
        st.sampled_from(["<", ">", "&", '"', "'", "/", "script", "!--", "{{", "}}", "\\", " "])
    )
    .map("".join)
    .filter(bool),
)


@settings(deadline=None, max_examples=15)
@given(text=texts)
@example(text=HOSTILE[0])
@example(text=HOSTILE[1])
@example(text=HOSTILE[2])
@example(text=HOSTILE[3])
@example(text=HOSTILE[4])
@example(text=HOSTILE[5])
@example(text=HOSTILE[6])
@example(text=HOSTILE[7])
def test_no_text_of_a_run_becomes_a_part_of_the_page(text: str) -> None:
    found = parse(render(text))
    assert set(found.tags) <= set(PLAIN.tags)
    assert found.tags.count("script") == PLAIN.tags.count("script") == 3
    assert found.attributes <= PLAIN.attributes
    specs = json.loads(found.scripts[0])
    assert len(specs) > 5
    assert found.scripts[2].strip() == PLAIN.scripts[2].strip()


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_texts_are_shown_as_they_are(text: str) -> None:
    shown = " ".join(" ".join(parse(render(text)).texts).split())
    # A browser shows no character NUL, and half a pair is none in UTF-8.
    assert " ".join(text.split()) in shown


@settings(deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(st.characters(exclude_categories=[])),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    )
)
def test_json_in_a_script_cannot_end_it_and_stays_the_same(value: object) -> None:
    text = str(to_script_json(value))
    assert not set("<>&\u2028\u2029") & set(text)
    assert json.loads(text) == value


def test_a_number_that_javascript_does_not_have_is_refused() -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        to_script_json({"loss": float("nan")})


def test_the_page_of_several_runs_is_escaped_too(tmp_path: Path) -> None:
    runs = [read_run(make_run(tmp_path / name, HOSTILE[0])) for name in ("a", "b")]
    found = parse(render_page(build_compare_page(runs), SCRIPT))
    assert found.tags.count("script") == 3
    assert "img" not in found.tags


def test_secrets_do_not_reach_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = "hf_aSecretThatNobodyMaySee42"
    monkeypatch.setenv("HF_TOKEN", secret)
    run = make_run(tmp_path / "run", f"before {secret} behind")
    page = render_page(build_run_page(read_run(run)), SCRIPT)
    assert secret not in page
    assert "***HF_TOKEN***" in page


def test_the_browser_is_forbidden_every_request() -> None:
    page = render("plain")
    assert "default-src 'none'" in page
    assert "connect-src" not in page
    elements = parse(page)
    assert not {"img", "iframe", "object", "embed"} & set(elements.tags)
    assert "http" not in " ".join(elements.scripts[2:])


def test_every_chart_has_a_text_and_headings_go_down_by_one() -> None:
    page = render("plain")
    levels = [int(tag[1]) for tag in parse(page).tags if tag in {"h1", "h2", "h3", "h4"}]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
    assert page.count('class="drawn"') == page.count('class="alternative"') > 5
