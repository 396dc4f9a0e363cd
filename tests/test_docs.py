"""The pages have one sentence per line, so that a change of a sentence is a change of one line."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

from tests.support import ROOT

MAX_COLUMNS = 250
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]

#: A table that a script writes is as wide as it comes out.
_WRITTEN_BY_A_SCRIPT = re.compile(r"<!-- table: .*?<!-- end of table -->", re.DOTALL)
_CODE_OR_LINK = re.compile(r"(`+).+?\1|\[[^\]]*\]\([^)]*\)", re.DOTALL)
_SENTENCE_END = re.compile(r"[.!?][)\"'*]*(?=\s+[\"'(*\[]*\w)")
_NO_END = re.compile(r"(?:\.\.\.|\b(?:e\.g|i\.e|vs|cf|etc)\.)[)\"'*]*$")


def find_problems(text: str) -> Iterator[str]:
    """Lines that are too wide, that hold two sentences, or that end within one."""
    for line in _WRITTEN_BY_A_SCRIPT.sub("", text).splitlines():
        if len(line) > MAX_COLUMNS:
            yield f"{len(line)} columns: {line}"

    tokens = MarkdownIt("commonmark").enable("table").parse(text)
    for opening, content in pairwise(tokens):
        if opening.type == "paragraph_open" and content.type == "inline":
            yield from find_in_paragraph(content.content)


def find_in_paragraph(text: str) -> Iterator[str]:
    """Text in code and links ends no sentence, nor does any within parentheses."""
    bare = _CODE_OR_LINK.sub(lambda match: "x" * len(match[0]), text)
    ends = []
    for match in _SENTENCE_END.finditer(bare):
        before = bare[: match.end()]
        if not _NO_END.search(before) and before.count("(") <= before.count(")"):
            ends.append(match.end())
    breaks = [match.start() for match in re.finditer(r"\n", bare)]
    yield from (f"two sentences: {text[:end]}" for end in ends if end not in breaks)
    yield from (f"ends within a sentence: {text[:at]}" for at in breaks if at not in ends)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_has_one_sentence_per_line(page: Path) -> None:
    assert list(find_problems(page.read_text())) == []


def test_the_pages_are_found() -> None:
    assert {"README.md", "CONTRIBUTING.md", "design.md"} <= {page.name for page in PAGES}


@pytest.mark.parametrize(
    "text",
    [
        "One.\nTwo (with `a. B` inside; e.g. this ...) is one.\nThree?\n",
        "* An item.\n  Its second sentence.\n* Another\n\n  With a paragraph. \n",
        "No dot ends this, 3.5 GB and [a. Link](b.md) included.",
        "Code is left alone:\n\n    a. B\n    c\n\n```\nD. E\n```\n",
        "| a table | b |\n| --- | --- |\n| One. Two. | Three. Four. |\n",
        f"<!-- table: script -->\n\n| {'a ' * MAX_COLUMNS} |\n\n<!-- end of table -->\n",
        "(It is said in brackets.)\n**Bold.**\n*Italics.*\nThe end.\n",
    ],
)
def test_a_page_that_is_right_passes(text: str) -> None:
    assert list(find_problems(text)) == []


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("One. Two.", "two sentences: One."),
        ("* An item.\n  Its second one. And a third.", "two sentences: An item.\nIts second one."),
        ("One is `a`. llmtune is two.", "two sentences: One is `a`."),
        ("**Bold.** More.", "two sentences: **Bold.**"),
        ("A sentence that is\nwrapped.", "ends within a sentence: A sentence that is"),
        ("1. An item (see\n   there).", "ends within a sentence: An item (see"),
        (f"A {'long ' * 50} line", "257 columns"),
    ],
)
def test_a_page_that_is_wrong_is_found(text: str, problem: str) -> None:
    (found,) = find_problems(text)
    assert found.startswith(problem)
