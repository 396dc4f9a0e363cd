"""Rows from the docstrings of the installed Python's standard library.

They are questions and answers, or texts with the module that they are from.

The sources are parsed, never imported: importing some standard modules opens browsers, prints or
starts loops.
"""

from __future__ import annotations

import ast
import functools
import inspect
import re
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from llmtune.data.rows.conversation import Conversation, Message, Role

#: Modules whose docstrings describe tests, tools or the past rather than a library.
SKIPPED = {
    "antigravity",
    "idlelib",
    "lib2to3",
    "pydoc_data",
    "test",
    "this",
    "turtledemo",
    "ensurepip",
    "distutils",
    # Not part of every Python: Debian ships them apart.
    *("tkinter", "turtle"),
}

#: Characters of an answer; shorter ones say nothing, longer ones are whole manuals.
ANSWER_LENGTH = range(48, 400)


#: Modules that are told apart by their docstrings; each has over a hundred.
LABELED = ("asyncio", "email", "http", "logging", "mailbox", "tarfile", "unittest", "xml")

#: Characters of a docstring that is labeled.
LABELED_LENGTH = range(20, 400)

_FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)
_Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


@functools.cache
def read_stdlib_docs() -> tuple[Conversation, ...]:
    """Read about 1,300 pairs, in the order of the module names; the same for the same Python."""
    root = Path(sysconfig.get_paths()["stdlib"])
    conversations: dict[str, Conversation] = {}
    for module in sorted(
        name for name in sys.stdlib_module_names if not name.startswith("_") and name not in SKIPPED
    ):
        path = root / f"{module}.py"
        path = path if path.is_file() else root / module / "__init__.py"
        if path.is_file():
            for conversation in _from_module(module, ast.parse(path.read_text(encoding="utf-8"))):
                conversations.setdefault(conversation.messages[0].content, conversation)
    return tuple(conversations.values())


@functools.cache
def read_stdlib_modules() -> tuple[dict[str, str], ...]:
    """About 1,400 docstrings with the name of their module; the same for the same Python."""
    root = Path(sysconfig.get_paths()["stdlib"])
    modules: dict[str, str] = {}
    for module in LABELED:
        path = root / f"{module}.py"
        for file in [path] if path.is_file() else sorted((root / module).rglob("*.py")):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, (*_FUNCTION, ast.ClassDef)):
                    text = _summary(ast.get_docstring(node) or "")
                    if len(text) in LABELED_LENGTH:
                        modules.setdefault(text, module)
    return tuple({"text": text, "label": module} for text, module in modules.items())


def _from_module(module: str, tree: ast.Module) -> Iterator[Conversation]:
    for node in tree.body:
        if isinstance(node, _FUNCTION):
            yield from _from_definition(
                node, f"the function {module}.{node.name}{_signature(node)}"
            )
        elif isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from _from_definition(node, f"the class {module}.{node.name}")
            for member in node.body:
                if isinstance(member, _FUNCTION):
                    what = f"the method {module}.{node.name}.{member.name}{_signature(member)}"
                    yield from _from_definition(member, what)


def _from_definition(node: _Definition, what: str) -> Iterator[Conversation]:
    answer = _summary(ast.get_docstring(node) or "")
    if node.name.startswith("_") or len(answer) not in ANSWER_LENGTH:
        return
    verb = "represent" if isinstance(node, ast.ClassDef) else "do"
    question = f"What does {what} {verb} in Python's standard library?"
    messages = (
        Message(role=Role.user, content=question),
        Message(role=Role.assistant, content=answer),
    )
    yield Conversation(messages=messages)


def _signature(node: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    return f"({ast.unparse(node.args)})"


def _summary(docstring: str) -> str:
    """Return the first paragraph that is prose, on one line."""
    for paragraph in re.split(r"\n\s*\n", inspect.cleandoc(docstring)):
        text = re.sub(r"\s+", " ", paragraph.split(">>>")[0]).strip()
        if text.endswith(".") and "->" not in text:
            return text
    return ""
