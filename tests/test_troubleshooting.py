"""The page of symptoms has every error class and exit code, and quotes messages that there are."""

from __future__ import annotations

import ast
import re

from llmtune import errors
from tests.support import ROOT

PAGE = (ROOT / "docs/troubleshooting.md").read_text()
FILES = sorted((ROOT / "llmtune").rglob("*.py"))
TREES = {file: ast.parse(file.read_text()) for file in FILES}


def error_classes() -> set[str]:
    """``LlmtuneError`` and every class that derives from it, wherever it is."""
    bases = {
        node.name: {ast.unparse(base) for base in node.bases}
        for tree in TREES.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
    }
    found = {"LlmtuneError"}
    while more := {name for name, above in bases.items() if above & found} - found:
        found |= more
    return found


def exit_codes() -> set[int]:
    codes = {0, errors.EXIT_UNEXPECTED, *errors.ERRORS_BY_CODE}
    return codes | {errors.EXIT_BY_SIGNAL + number for number in (1, 2, 15)}


def texts() -> str:
    """Every text of the source, those with values with a gap in each value's place."""
    found = []
    for tree in TREES.values():
        for node in ast.walk(tree):
            if isinstance(node, ast.JoinedStr):
                parts = (
                    part.value if isinstance(part, ast.Constant) else "\0" for part in node.values
                )
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(found)


SOURCE = texts()


def missing_codes(page: str) -> set[int]:
    table = page.split("## By exit code")[1].split("## ")[0]
    named = {
        int(code)
        for line in table.splitlines()
        for code in re.findall(r"\d+", line.split("|")[1] if line.startswith("| ") else "")
    }
    return exit_codes() - named


def quoted(page: str) -> list[str]:
    """The messages that an entry begins with."""
    return re.findall(r"\*\*`([^`]+)`\*\*", page)


def test_every_class_and_every_code_has_its_entry() -> None:
    assert {"ConfigError", "RanksFailedError", "ForeignRunError"} <= error_classes()
    assert [name for name in error_classes() if f"`{name}`" not in PAGE] == []
    assert missing_codes(PAGE) == set()


def test_a_class_that_is_linked_has_its_section() -> None:
    headings = {
        re.sub(r"[^\w -]", "", line.removeprefix("## ")).strip().lower().replace(" ", "-")
        for line in PAGE.splitlines()
        if line.startswith("## ")
    }
    links = set(re.findall(r"\]\(#([^)]+)\)", PAGE))
    assert len(links) > 7
    assert links - headings == set()


def test_every_message_is_one_that_there_is() -> None:
    assert len(quoted(PAGE)) > 20
    assert [text for text in quoted(PAGE) if text not in SOURCE] == []


def test_what_is_missing_is_found() -> None:
    assert missing_codes(PAGE.replace("| 75 |", "| 76 |")) == {75}
    assert quoted("* **`no such thing at all`**: see") == ["no such thing at all"]
    assert "no such thing at all" not in SOURCE
