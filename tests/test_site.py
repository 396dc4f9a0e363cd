"""Links of the pages lead to files and headings that there are, and the site has every page."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from markdown_it import MarkdownIt

from scripts.site_links import find_repository, link_outside, on_page_markdown
from tests.support import ROOT

PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]


class _Loader(yaml.SafeLoader):
    """YAML with the tags by which mkdocs names functions of Python."""


_Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda loader, tag, node: tag)
SITE: dict[str, Any] = yaml.load((ROOT / "mkdocs.yml").read_text(), _Loader)


def pages_of(nav: Any) -> Iterator[str]:
    """The files of a navigation, in order."""
    if isinstance(nav, str):
        yield nav
    elif isinstance(nav, list):
        for entry in nav:
            yield from pages_of(entry)
    else:
        yield from pages_of(list(nav.values()))


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    tokens = MarkdownIt("commonmark").enable("table").parse(text)
    found: set[str] = set()
    for opening, content in pairwise(tokens):
        if opening.type == "heading_open":
            plain = "".join(
                child.content for child in content.children or [] if child.type != "link_open"
            )
            anchor = re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")
            number = next(n for n in range(99) if f"{anchor}{-n or ''}" not in found)
            found.add(f"{anchor}{-number or ''}")
    return found


def broken_links(page: Path, text: str) -> Iterator[str]:
    """Links to files and headings that are not there."""
    for token in MarkdownIt("commonmark").enable("table").parse(text):
        for child in token.children or []:
            link = str(child.attrs.get("href", child.attrs.get("src", "")))
            if not link or re.match(r"[a-z]+:", link):
                continue
            path, _, anchor = link.partition("#")
            target = (page.parent / path).resolve() if path else page
            if not target.exists():
                yield f"{page.name}: {link}: no such file"
            elif anchor and target.suffix == ".md":
                goal = text if target == page else target.read_text()
                if anchor not in anchors(goal):
                    yield f"{page.name}: {link}: no such heading"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page: Path) -> None:
    assert list(broken_links(page, page.read_text())) == []


def test_a_broken_link_is_found() -> None:
    page = ROOT / "docs/index.md"
    text = "# A b, `c`\n\n[a](no.md) [b](#no) [c](#a-b-c) [d](data.md#no) [](../conf/) ![](f.png)\n"
    assert list(broken_links(page, text)) == [
        "index.md: no.md: no such file",
        "index.md: #no: no such heading",
        "index.md: data.md#no: no such heading",
        "index.md: f.png: no such file",
    ]


def test_the_site_has_every_page_once() -> None:
    folder = ROOT / "docs"
    names = sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*.md"))
    assert sorted(pages_of(SITE["nav"])) == names, "nav of mkdocs.yml"


def test_every_doubt_is_a_warning_and_every_warning_an_error() -> None:
    assert SITE["strict"] is True
    kinds = {kind: set(levels.values()) for kind, levels in SITE["validation"].items()}
    assert kinds == {"nav": {"warn"}, "links": {"warn"}}


def test_links_out_of_docs_lead_to_the_repository() -> None:
    page = "[a](../conf/) [`b`](../README.md#start) [c](data.md) [d](https://e.com)"
    assert link_outside(page, "https://h/o/n", "main") == (
        "[a](https://h/o/n/tree/main/conf) [`b`](https://h/o/n/blob/main/README.md#start)"
        " [c](data.md) [d](https://e.com)"
    )
    assert link_outside("[a](../conf/)", None) == "a"
    with pytest.raises(FileNotFoundError, match="nowhere.py"):
        link_outside("[a](../nowhere.py)", None)


def test_the_repository_is_the_one_that_builds_the_site(monkeypatch: pytest.MonkeyPatch) -> None:
    actions = {"GITHUB_SERVER_URL": "https://github.com", "GITHUB_REPOSITORY": "o/n"}
    assert find_repository({}, actions) == "https://github.com/o/n"
    assert find_repository({"repository": "https://a/b/"}, actions) == "https://a/b"
    assert find_repository({}, {}) is None
    for name, value in actions.items():
        monkeypatch.setenv(name, value)
    made = on_page_markdown("[a](../conf/)", config={"extra": {"branch": "v1"}})
    assert made == "[a](https://github.com/o/n/tree/v1/conf)"
