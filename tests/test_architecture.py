"""The house rules of the README's architecture section, held to by reading the source."""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "llmtune"
FILES = sorted(path for path in PACKAGE.rglob("*.py"))

# : Folders from the lowest to the highest, and which of those below each may import; the modules
# beside them are open to all.
LAYERS: dict[str, set[str]] = {
    "security": set(),
    "storage": {"security"},
    "config": {"security", "storage"},
    "tuner": {"security", "storage", "config"},
    "plan": {"security", "storage", "config", "tuner"},
    "track": {"security", "storage", "config", "tuner", "plan"},
    "data": {"security", "storage", "config", "tuner", "plan"},
    "model": {"security", "storage", "config", "tuner", "plan"},
    "engine": {"security", "storage", "config", "tuner", "plan"},
    "checkpoint": {"security", "storage", "config", "tuner", "plan", "engine"},
    "train": {
        "security",
        "storage",
        "config",
        "tuner",
        "plan",
        "track",
        "data",
        "model",
        "engine",
        "checkpoint",
    },
    "export": {"security", "storage", "config", "tuner", "plan", "model", "checkpoint"},
    "launch": {"security", "storage", "config", "tuner", "plan"},
    "doctor": {"security", "storage", "config", "tuner", "plan", "launch"},
    "run": {
        *(
            "security",
            "storage",
            "config",
            "tuner",
            "plan",
            "track",
            "data",
            "model",
            "engine",
            "checkpoint",
            "train",
            "export",
        ),
        *("launch", "doctor"),
    },
    "cli": {
        *(
            "security",
            "storage",
            "config",
            "tuner",
            "plan",
            "track",
            "data",
            "model",
            "engine",
            "checkpoint",
            "train",
            "export",
        ),
        *("launch", "doctor", "run"),
    },
}
# : Folders within a folder, from the lowest to the highest; what stands beside them is above all of
# them.
ROOMS: dict[str, list[str]] = {
    "plan": ["devices", "memory"],
    "data": ["rows", "formats", "read", "tokenize", "store", "load", "report"],
    "tuner": ["kinds"],
    "model": ["weights"],
    "export": ["sources", "publish", "merge", "writers", "formats", "verify", "card"],
    "launch": ["launchers", "preflight", "supervise"],
}

#: Who may see the whole ``Config``.
SEES_CONFIG = {"config", "plan", "run", "cli"}
SEES_CONFIG_FILES = {
    f"train/{name}.py"
    for name in ("build", "request", "run_folder", "resume", "begun", "mirror_owner")
}

DEEPSPEED_FOLDERS = {"engine", "checkpoint", "launch"}

MAX_FILE_LINES = 480
MAX_FUNCTION_LINES = 85
MAX_ARGUMENTS = 7
MAX_MODULES = 15


def relative(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def module_name(path: Path) -> str:
    parts = ("llmtune", *path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def imports(path: Path) -> frozenset[str]:
    """Every module that a file imports, anywhere in it; ``from a import b`` counts as ``a.b`` where
    that is a module.
    """
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


def imports_higher_layers(path: Path) -> Iterator[str]:
    """A file imports only what lies lower."""
    folder = relative(path).split("/")[0]
    if folder in LAYERS:
        used = {
            name.split(".")[1]
            for name in imports(path)
            if name.startswith("llmtune.") and name.count(".")
        }
        above = (used & set(LAYERS)) - LAYERS[folder] - {folder}
        if above:
            yield f"imports {above}"


def imports_higher_rooms(path: Path) -> Iterator[str]:
    """A room of a folder imports none above it; what stands beside the rooms may be imported by all
    and import all.
    """
    folder, *rooms = relative(path).split("/")
    order = ROOMS.get(folder, [])
    if len(rooms) > 1 and rooms[0] in order:
        own = order.index(rooms[0])
        inside = {
            name.split(".")[2] for name in imports(path) if name.startswith(f"llmtune.{folder}.")
        }
        yield from (f"imports {folder}/{room}" for room in order[own + 1 :] if room in inside)


def is_in_a_crowd(path: Path) -> Iterator[str]:
    """A folder whose modules can be taken in at a glance."""
    beside = [other for other in path.parent.glob("*.py") if other.name != "__init__.py"]
    if path.name == "__init__.py" and len(beside) > MAX_MODULES:
        yield f"has {len(beside)} modules beside it"


def test_no_import_cycle() -> None:
    modules = {module_name(path): path for path in FILES}
    graph = {
        name: {other for other in imports(path) if other in modules and other != name}
        for name, path in modules.items()
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


def tells_several_stories(path: Path) -> Iterator[str]:
    """A file says what it is for, and is short, and so are its functions."""
    text = path.read_text()
    if len(text.splitlines()) > MAX_FILE_LINES:
        yield f"has {len(text.splitlines())} lines"
    tree = ast.parse(text)
    if not ast.get_docstring(tree):
        yield "has no docstring"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or 0) - node.lineno + 1
            if lines > MAX_FUNCTION_LINES:
                yield f"line {node.lineno}: {node.name} has {lines} lines"
            names = [
                a.arg for a in node.args.args + node.args.kwonlyargs if a.arg not in ("self", "cls")
            ]
            if len(names) > MAX_ARGUMENTS:
                yield f"line {node.lineno}: {node.name} takes {names}"


def lets_deepspeed_out(path: Path) -> Iterator[str]:
    """DeepSpeed stays behind its doors."""
    if relative(path).split("/")[0] not in DEEPSPEED_FOLDERS:
        yield from sorted(
            f"imports {name}" for name in imports(path) if name.split(".")[0] == "deepspeed"
        )


def draws_by_itself(path: Path) -> Iterator[str]:
    """What is random is drawn in one place, so that every draw has a name.

    Numbers that are the same in every run are not.
    """
    if relative(path) not in (
        "draws.py",
        "model/random_model.py",
        "export/writers/graph/model.py",
        "export/verify/answers.py",
    ):
        text = path.read_text()
        if "random" in imports(path):
            yield "imports random"
        yield from (f"has {word}" for word in ("default_rng", "Generator().") if word in text)
        if text.count("manual_seed(") != text.count("manual_seed(torch_seed("):
            yield "seeds torch with something else than torch_seed"


def sees_the_whole_config(path: Path) -> Iterator[str]:
    """Only the builders do."""
    sees = "llmtune.config.schema.Config" in imports(path)
    if (
        sees
        and relative(path).split("/")[0] not in SEES_CONFIG
        and relative(path) not in SEES_CONFIG_FILES
    ):
        yield "imports Config"


def is_a_drawer(path: Path) -> Iterator[str]:
    """There are none."""
    if path.stem in {"utils", "common", "helpers", "misc", "manager"}:
        yield "is a drawer"


RULES = (
    *(
        imports_higher_layers,
        tells_several_stories,
        lets_deepspeed_out,
        draws_by_itself,
        sees_the_whole_config,
    ),
    *(is_a_drawer, imports_higher_rooms, is_in_a_crowd),
)


@pytest.mark.parametrize("broken", RULES, ids=lambda rule: rule.__name__)
def test_no_file_breaks_the_rule(broken: Callable[[Path], Iterator[str]]) -> None:
    assert [f"{relative(path)}: {problem}" for path in FILES for problem in broken(path)] == []


@pytest.mark.parametrize(
    ("broken", "name", "text", "problem"),
    [
        (
            imports_higher_layers,
            "data/a.py",
            "from llmtune.train.loop import run",
            "imports {'train'}",
        ),
        (
            tells_several_stories,
            "data/a.py",
            '"""A."""\n' * (MAX_FILE_LINES + 1),
            f"has {MAX_FILE_LINES + 1} lines",
        ),
        (tells_several_stories, "data/a.py", "a = 1", "has no docstring"),
        (
            tells_several_stories,
            "data/a.py",
            '"""A."""\ndef f():\n' + "    a\n" * MAX_FUNCTION_LINES,
            f"line 2: f has {MAX_FUNCTION_LINES + 1} lines",
        ),
        (
            tells_several_stories,
            "a.py",
            '"""A."""\ndef f(a, b, c, d, e, f, g, h): ...',
            "line 2: f takes ",
        ),
        (lets_deepspeed_out, "train/a.py", "import deepspeed.comm", "imports deepspeed.comm"),
        (draws_by_itself, "data/a.py", "import random", "imports random"),
        (draws_by_itself, "data/a.py", "rng = np.random.default_rng(1)", "has default_rng"),
        (draws_by_itself, "data/a.py", "torch.manual_seed(1)", "seeds torch"),
        (
            sees_the_whole_config,
            "data/a.py",
            "from llmtune.config.schema import Config",
            "imports Config",
        ),
        (is_a_drawer, "data/utils.py", "", "is a drawer"),
        (
            imports_higher_rooms,
            "data/rows/a.py",
            "from llmtune.data.load.loader import load",
            "imports data/load",
        ),
    ],
)
def test_a_rule_finds_what_breaks_it(
    broken: Callable[[Path], Iterator[str]],
    name: str,
    text: str,
    problem: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path)
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    (found,) = broken(path)
    assert found.startswith(problem)


def test_a_folder_of_sixteen_modules_is_found(tmp_path: Path) -> None:
    for name in ("__init__", *"abcdefghijklmno"):
        (tmp_path / f"{name}.py").touch()
    assert list(is_in_a_crowd(tmp_path / "__init__.py")) == []
    (tmp_path / "p.py").touch()
    assert list(is_in_a_crowd(tmp_path / "__init__.py")) == ["has 16 modules beside it"]


def test_every_room_stands_on_a_floor() -> None:
    for folder, order in ROOMS.items():
        assert sorted(order) == sorted(
            p.name for p in (PACKAGE / folder).iterdir() if p.is_dir() and list(p.glob("*.py"))
        )


def test_tests_join_ranks_with_their_ops_loaded_under_the_lock() -> None:
    own = {"joined.py", "test_distributed.py", Path(__file__).name}
    bare = [
        path.name for path in (ROOT / "tests").rglob("*.py") if "init_ranks(" in path.read_text()
    ]
    assert "joined.py" in bare
    assert set(bare) <= own


def test_every_public_function_says_what_it_is_for() -> None:
    silent = []
    for path in FILES:
        tree = ast.parse(path.read_text())
        for node in [
            *tree.body,
            *(m for c in tree.body if isinstance(c, ast.ClassDef) for m in c.body),
        ]:
            named = isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith(
                "_"
            )
            if named and not ast.get_docstring(node) and not _is_protocol_stub(node):
                silent.append(f"{relative(path)}:{node.lineno} {node.name}")
    assert not silent


def _is_protocol_stub(node: ast.AST) -> bool:
    """A property of a protocol, whose body is ``...``."""
    body = getattr(node, "body", [])
    return (
        len(body) == 1
        and isinstance(body[0], ast.Expr)
        and getattr(body[0].value, "value", None) is Ellipsis
    )
