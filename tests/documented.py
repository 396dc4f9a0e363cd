"""The commands and settings that pages show: found in their blocks and in code within the text."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass

from markdown_it import MarkdownIt

from llmtune.cli.main import HELP
from llmtune.cli.verbs import VERBS
from tests.support import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]

#: The program and what is behind it, up to a comment in another column or a sign of the shell.
_PROGRAM = re.compile(
    r"(?:python -m llmtune|scripts/train\.py|scripts/slurm\.sh|--module llmtune"
    rf"|(?<![\w./-])llmtune(?= (?:{'|'.join(VERBS)})\b))((?: +(?!  )[^\s`]+)*)"
)
#: Behind the command of an example.
_ENDS = ("|", "&&", "2>", ">", "#")
_RANKS = re.compile(r"--(?:num_accelerators|num_gpus|nproc_per_node|nproc-per-node)[ =](\d+)")
_NODES = re.compile(r"--(?:nnodes|num_nodes)[ =](\d+)")
_SETTING = re.compile(r"[+]{0,2}[a-z_][\w.]*=.*", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Shown:
    """A command or settings, as a page shows them."""

    page: str
    words: tuple[str, ...]
    ranks: int = 0
    """Ranks that a launcher on the same line starts; 0 where none does."""

    @property
    def text(self) -> str:
        return " ".join(self.words)


def find_commands() -> list[Shown]:
    """Every command of pages, configuration files and the help, each once per page."""
    found = [shown for page in PAGES for shown in commands_of_page(page.name, page.read_text())]
    texts = {
        str(file.relative_to(ROOT)): file.read_text()
        for file in sorted((ROOT / "conf").rglob("*.yaml"))
    }
    for name, text in {**texts, "--help": HELP}.items():
        found += [shown for line in text.splitlines() for shown in _read_line(name, line)]
    return list(dict.fromkeys(found))


def commands_of_page(name: str, text: str) -> Iterator[Shown]:
    """The commands in a page's blocks, and in code within its text."""
    for code, is_block in _code_of(text):
        joined = re.sub(r"\s*\\\n\s*", " ", code) if is_block else code
        for line in joined.splitlines():
            yield from _read_line(name, line)


def find_settings() -> list[Shown]:
    """Every ``key=value`` and ``verb key=value`` of pages that is code within the text."""
    return list(
        dict.fromkeys(
            shown
            for page in PAGES
            if page.name != "reference.md"
            for shown in settings_of_page(page.name, page.read_text())
        )
    )


def settings_of_page(name: str, text: str) -> Iterator[Shown]:
    """The code within a page's text that consists of settings, with or without a verb."""
    for code, is_block in _code_of(text):
        if is_block or "=" not in code:
            continue
        words = _split(code)
        if words[:1] and words[0] in VERBS:
            words = words[1:]
        if words and all(_SETTING.fullmatch(word) for word in words):
            yield Shown(name, tuple(words))


def _code_of(text: str) -> Iterator[tuple[str, bool]]:
    """The code of a page, and whether it is a block."""
    # The number of an array's task, which scripts/slurm.sh fills in.
    text = text.replace("%a", "1")
    for token in MarkdownIt("commonmark").enable("table").parse(text):
        if token.type in ("code_block", "fence"):
            yield token.content, True
        yield from (
            (child.content, False) for child in token.children or [] if child.type == "code_inline"
        )


def _read_line(name: str, line: str) -> Iterator[Shown]:
    match = _PROGRAM.search(line)
    words = _split(line[match.start(1) :]) if match is not None else []
    # What stands for arguments in the help's first lines, and options that take none.
    if match is None or not words or {"[VERB]", "--schema", "--help"} & set(words):
        return
    launcher = line[: match.start()]
    ranks, nodes = _RANKS.search(launcher), _NODES.search(launcher)
    count = int(ranks[1]) * (int(nodes[1]) if nodes else 1) if ranks else 0
    yield Shown(name, tuple(words), count)


def _split(text: str) -> list[str]:
    """The arguments of an example: a gap of two blanks, a back quote or a sign of the shell ends
    it.
    """
    try:
        words = shlex.split(re.split(r"\s{2,}(?=\S)|`|;| \(| {1}# ", text)[0])
    except ValueError:
        return []
    end = next((number for number, word in enumerate(words) if word.startswith(_ENDS)), len(words))
    return [bare for word in words[:end] if (bare := word.rstrip(",.:"))]
