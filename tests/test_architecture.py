"""The house rules of the README's architecture section, held to by reading the source."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "llmtune"
FILES = sorted(path for path in PACKAGE.rglob("*.py"))

#: Folder -> folders it may import, transitively closed; ``errors`` is open to all.
LAYERS: dict[str, set[str]] = {
    "config": set(),
    "plan": {"config"},
    "launch": {"config", "plan"},
    "data": {"config", "plan"},
    "model": {"config", "plan"},
    "engine": {"config", "plan"},
    "checkpoint": {"config", "plan", "engine"},
    "track": {"config", "plan"},
    "train": {"config", "plan", "data", "model", "engine", "checkpoint", "track"},
    "export": {"config", "plan", "engine", "checkpoint", "model"},
    "cli": {
        *("config", "plan", "launch", "data", "model", "engine", "checkpoint", "track", "train", "export"),
    },
}

#: Who may see the whole ``Config``.
SEES_CONFIG = {"config", "plan", "cli"}
SEES_CONFIG_FILES = {f"train/{name}.py" for name in ("job", "request", "run_folder", "resume", "begun", "mirror_place")}

DEEPSPEED_FOLDERS = {"engine", "checkpoint", "launch"}

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
MAX_ARGUMENTS = 7


def relative(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def module_name(path: Path) -> str:
    parts = ("llmtune", *path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def imports(path: Path) -> frozenset[str]:
    """Every module that a file imports, anywhere in it; ``from a import b`` counts as ``a.b`` where that is a module."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return frozenset(found)


def test_the_package_is_what_the_layers_name() -> None:
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir() and list(path.glob("*.py"))}
    assert folders == set(LAYERS)
    assert len(FILES) > 40


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_a_file_imports_only_lower_layers(path: Path) -> None:
    folder = relative(path).split("/")[0]
    if folder not in LAYERS:
        return
    used = {name.split(".")[1] for name in imports(path) if name.startswith("llmtune.") and name.count(".")}
    above = (used & set(LAYERS)) - LAYERS[folder] - {folder}
    assert not above, f"{relative(path)} imports {above}"


def test_no_import_cycle() -> None:
    modules = {module_name(path): path for path in FILES}
    graph = {
        name: {other for other in imports(path) if other in modules and other != name} for name, path in modules.items()
    }
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, f"cycle: {' -> '.join((*trail, name))}"
        if name not in done:
            for other in graph[name]:
                visit(other, (*trail, name))
            done.add(name)

    for name in graph:
        visit(name, ())


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_a_file_tells_one_story(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= MAX_FILE_LINES
    tree = ast.parse(text)
    assert ast.get_docstring(tree), f"{relative(path)} has no docstring"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or 0) - node.lineno + 1
            assert lines <= MAX_FUNCTION_LINES, f"{relative(path)}:{node.lineno} {node.name} has {lines} lines"
            names = [a.arg for a in node.args.args + node.args.kwonlyargs if a.arg not in ("self", "cls")]
            assert len(names) <= MAX_ARGUMENTS, f"{relative(path)}:{node.lineno} {node.name} takes {names}"


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_deepspeed_stays_behind_its_doors(path: Path) -> None:
    if relative(path).split("/")[0] not in DEEPSPEED_FOLDERS:
        assert not any(name.split(".")[0] == "deepspeed" for name in imports(path))


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_what_is_random_is_drawn_in_one_place(path: Path) -> None:
    """So that every draw has a name of its own. Numbers that are the same in every run are another matter."""
    if relative(path) not in ("draws.py", "model/random_model.py", "export/graph_model.py", "export/answers.py"):
        text = path.read_text()
        assert "random" not in imports(path)
        assert "default_rng" not in text
        assert "Generator()." not in text
        assert text.count("manual_seed(") == text.count("manual_seed(torch_seed(")


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_only_the_builders_see_the_whole_config(path: Path) -> None:
    if "llmtune.config.schema.Config" in imports(path):
        assert relative(path).split("/")[0] in SEES_CONFIG or relative(path) in SEES_CONFIG_FILES


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_no_drawers(path: Path) -> None:
    assert path.stem not in {"utils", "common", "helpers", "misc", "manager"}


def test_every_public_function_says_what_it_is_for() -> None:
    silent = []
    for path in FILES:
        tree = ast.parse(path.read_text())
        for node in [*tree.body, *(m for c in tree.body if isinstance(c, ast.ClassDef) for m in c.body)]:
            named = isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
            if named and not ast.get_docstring(node) and not _is_protocol_stub(node):
                silent.append(f"{relative(path)}:{node.lineno} {node.name}")
    assert not silent


def _is_protocol_stub(node: ast.AST) -> bool:
    """A property of a protocol, whose body is ``...``."""
    body = getattr(node, "body", [])
    return len(body) == 1 and isinstance(body[0], ast.Expr) and getattr(body[0].value, "value", None) is Ellipsis
