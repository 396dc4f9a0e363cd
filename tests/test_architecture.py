"""The house rules of the README's architecture section, held to by reading the source."""

from __future__ import annotations

import ast
import inspect
import re
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest

from llmtune.storage import layout

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "llmtune"
FILES = sorted(path for path in PACKAGE.rglob("*.py"))

#: Folders from the lowest to the highest, and which of those below each may import; the modules
#: beside them are open to all.
LAYERS: dict[str, set[str]] = {
    "security": set(),
    "storage": {"security"},
    "config": {"security", "storage"},
    "metrics": {"security", "storage", "config"},
    "task": {"security", "storage", "config", "metrics"},
    "tuner": {"security", "storage", "config"},
    "optimizer": {"security", "storage", "config"},
    "plan": {"security", "storage", "config", "metrics", "task", "tuner", "optimizer"},
    "track": {"security", "storage", "config", "metrics", "task", "tuner", "optimizer", "plan"},
    "report": {
        *("security", "storage", "config", "metrics", "task", "tuner", "optimizer", "plan"),
        "track",
    },
    "data": {"security", "storage", "config", "metrics", "task", "tuner", "optimizer", "plan"},
    "model": {"security", "storage", "config", "metrics", "task", "tuner", "optimizer", "plan"},
    "engine": {"security", "storage", "config", "metrics", "task", "tuner", "optimizer", "plan"},
    "checkpoint": {
        "security",
        "storage",
        "config",
        "metrics",
        "task",
        "tuner",
        "optimizer",
        "plan",
        "engine",
    },
    "train": {
        "security",
        "storage",
        "config",
        "metrics",
        "task",
        "tuner",
        "optimizer",
        "plan",
        "track",
        "report",
        "data",
        "model",
        "engine",
        "checkpoint",
    },
    "export": {
        "security",
        "storage",
        "config",
        "metrics",
        "task",
        "tuner",
        "optimizer",
        "plan",
        "model",
        "checkpoint",
    },
    "launch": {"security", "storage", "config", "metrics", "task", "tuner", "optimizer", "plan"},
    "doctor": {
        "security",
        "storage",
        "config",
        "metrics",
        "task",
        "tuner",
        "optimizer",
        "plan",
        "launch",
    },
    "run": {
        "security",
        "storage",
        "config",
        "metrics",
        "task",
        "tuner",
        "optimizer",
        "plan",
        "track",
        "report",
        "data",
        "model",
        "engine",
        "checkpoint",
        "train",
        "export",
        *("launch", "doctor"),
    },
    "predict": {
        "security",
        "storage",
        "config",
        "metrics",
        "task",
        "tuner",
        "optimizer",
        "plan",
        "track",
        "report",
        "data",
        "model",
        "engine",
        "checkpoint",
        "train",
        "export",
        *("launch", "doctor", "run"),
    },
    "sweep": {
        *("security", "storage", "config", "metrics", "task", "tuner", "optimizer", "plan"),
        *("track", "report", "data", "model", "engine", "checkpoint", "train", "export"),
        *("launch", "doctor", "run"),
    },
    "serve": {
        *("security", "storage", "config", "metrics", "task", "tuner", "optimizer", "plan"),
    },
    "cli": {
        "security",
        "storage",
        "config",
        "metrics",
        "task",
        "tuner",
        "optimizer",
        "plan",
        "track",
        "report",
        "data",
        "model",
        "engine",
        "checkpoint",
        "train",
        "export",
        *("launch", "doctor", "run", "predict", "sweep", "serve"),
    },
    "api": {
        *("security", "storage", "config", "metrics", "task", "tuner", "optimizer", "plan"),
        *("track", "report", "data", "model", "engine", "checkpoint", "train", "export"),
        *("launch", "doctor", "run", "predict", "sweep", "serve", "cli"),
    },
}
#: Folders within a folder, from the lowest to the highest; what stands beside them is above all of
#: them.
ROOMS: dict[str, list[str]] = {
    "storage": ["tensors"],
    "plan": ["devices", "architecture", "memory", "length"],
    "data": ["rows", "formats", "read", "tokenize", "store", "load", "report"],
    "task": ["language_head", "kinds"],
    "tuner": ["stacks", "token_rows", "kinds"],
    "optimizer": ["kinds"],
    "serve": ["engines"],
    "model": ["weights", "nf4", "folders", "kernels"],
    "export": ["sources", "publish", "merge", "writers", "formats", "verify", "card"],
    "launch": ["launchers", "preflight", "processes", "supervise"],
}

#: Who may see the whole ``Config``.
SEES_CONFIG = {"config", "plan", "run", "predict", "sweep", "cli", "api"}
SEES_CONFIG_FILES = {
    f"train/{name}.py"
    for name in ("build", "request", "run_folder", "resume", "begun", "mirror_owner")
}

DEEPSPEED_FOLDERS = {"engine", "checkpoint", "launch"}

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
MAX_ARGUMENTS = 7
MAX_MODULES = 15
#: Modules of the longest chain of imports that are made when its first one is imported.
MAX_IMPORT_DEPTH = 9
#: The packages whose own file imports something: ``import llmtune`` finds the Python API when it is
#: used, and two rooms have the names of its verbs.
CALLABLE = {"__init__.py", "plan/__init__.py", "train/__init__.py"}


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


@cache
def imports_at_the_top(path: Path) -> frozenset[str]:
    """The modules of :func:`imports` that are imported with the file, and not only for types."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
                continue
            if isinstance(child, ast.Import):
                found.update(alias.name for alias in child.names)
            elif isinstance(child, ast.ImportFrom) and child.module:
                found.add(child.module)
                found.update(f"{child.module}.{alias.name}" for alias in child.names)
            visit(child)

    visit(ast.parse(path.read_text()))
    return frozenset(found)


def longest_import_chain(files: list[Path]) -> list[str]:
    """The longest chain of modules of which each imports the next one; a package's own file, which
    is empty, is none of them.
    """
    modules = {module_name(path): path for path in files if path.name != "__init__.py"}
    chains: dict[str, list[str]] = {}

    def chain_from(name: str) -> list[str]:
        if name not in chains:
            used = sorted((imports_at_the_top(modules[name]) & set(modules)) - {name})
            chains[name] = [name, *max(map(chain_from, used), key=len, default=[])]
        return chains[name]

    return max(map(chain_from, sorted(modules)), key=len, default=[])


def test_no_chain_of_imports_is_too_long() -> None:
    chain = longest_import_chain(FILES)
    assert len(chain) <= MAX_IMPORT_DEPTH, f"{len(chain)} modules: {' > '.join(chain)}"
    own = {relative(path) for path in FILES if path.name == "__init__.py" and imports(path)}
    assert own == CALLABLE


def test_a_long_chain_of_imports_is_found_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path)
    texts = {
        "__init__": "",
        "a": "from llmtune import b\nimport json",
        "b": "try:\n    import llmtune.c\nexcept ImportError:\n    pass",
        "c": "from llmtune.d import Row",
        "d": "def read():\n    import llmtune.e",
        "e": "if TYPE_CHECKING:\n    from llmtune.f import Row\nfrom llmtune.g import Row",
        "f": "from llmtune.g import Row",
        "g": "from __future__ import annotations",
    }
    for name, text in texts.items():
        (tmp_path / f"{name}.py").write_text(text)
    files = sorted(tmp_path.glob("*.py"))
    assert longest_import_chain(files) == [f"llmtune.{name}" for name in "abcd"]
    assert longest_import_chain([tmp_path / "d.py", tmp_path / "e.py"]) == ["llmtune.d"]
    of_types = [tmp_path / f"{name}.py" for name in "efg"]
    assert longest_import_chain(of_types) == ["llmtune.e", "llmtune.g"]
    assert longest_import_chain([tmp_path / "__init__.py"]) == []


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
        "export/writers/graph/graph_comparison.py",
        "export/verify/module_outputs.py",
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


#: Files outside ``storage/`` that make one of its moves by themselves, and why.
MOVES_OF_THEIR_OWN = {
    "draws.py": {"hashlib"},  # seeds: no file is hashed
    "data/tokenize/workers.py": {"xxhash"},  # the ids of a row, for every row
    "launch/preflight/nvme.py": {"os.fsync"},  # times a drive
    "launch/processes/log_filter.py": {"fcntl"},  # a shared lock, which the filter inherits
}
_MOVES = {f"os.{name}" for name in ("replace", "rename", "link", "fsync", "symlink")}
_MOVES |= {"shutil.move", "shutil.copytree"}


def moves_files_by_itself(path: Path) -> Iterator[str]:
    """Renames, links, flushes, locks and hashes of files are written once, in ``storage/``."""
    if relative(path).split("/")[0] != "storage":
        found = imports(path) & {"hashlib", "xxhash", "fcntl"}
        found |= set(_moves(ast.parse(path.read_text())))
        own = MOVES_OF_THEIR_OWN.get(relative(path), set())
        yield from (f"uses {name}" for name in sorted(found - own))


def _moves(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node) in _MOVES:
            yield ast.unparse(node)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            name = node.func.attr
            # The replace of a text takes two arguments, that of a dataclass its fields by name.
            is_path_replace = name == "replace" and len(node.args) == 1 and not node.keywords
            is_move = name in ("rename", "hardlink_to", "symlink_to") or is_path_replace
            if is_move and ast.unparse(node.func) not in _MOVES:
                yield f".{name}"


#: Files whose own folders hold a file of the same name as a run's.
SAME_NAMES = {
    "data/store/token_store.py": {"bad_rows.jsonl"},  # in the cache of tokens
    "data/prepared_data.py": {"samples.json"},  # in the cache of prepared rows
    "export/card/card.py": {"loss.png"},  # beside the card
    "model/source.py": {".lock"},  # the end of a name
}


def spells_a_name_of_the_run_folder(path: Path) -> Iterator[str]:
    """The names of a run folder's files are constants of ``storage/layout.py``."""
    if relative(path) == "storage/layout.py":
        return
    names = {value for value in vars(layout).values() if isinstance(value, str)}
    # A word like model has other uses, and __name__ and __doc__ are the module's own.
    names = {name for name in names if re.fullmatch(r"[\w/.]*[./]\w+|[A-Z]{4,}", name)}
    names -= {layout.__name__}
    names -= SAME_NAMES.get(relative(path), set())
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Constant) and node.value in names:
            yield f"line {node.lineno}: spells {node.value}"


def checks_and_returns(path: Path) -> Iterator[str]:
    """A function named ``check_*`` raises or returns nothing."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            named = node.name.lstrip("_").split("_")[0] == "check"
            if named and not (
                isinstance(node.returns, ast.Constant) and node.returns.value is None
            ):
                yield f"line {node.lineno}: {node.name} returns something: find_*, resolve_*"


MAX_POSITIONAL = 4
MAX_POSITIONAL_FIELDS = 3


def nests_conditional_expressions(path: Path) -> Iterator[str]:
    """A conditional expression holds no other one."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.IfExp):
            inner = [other for other in ast.walk(node) if isinstance(other, ast.IfExp)]
            if len(inner) > 1:
                yield f"line {node.lineno}: a conditional expression within another"


def takes_many_fields_by_position(path: Path) -> Iterator[str]:
    """A dataclass of more than three fields is built by names."""
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.ClassDef):
            continue
        fields = [
            field
            for field in node.body
            if isinstance(field, ast.AnnAssign) and "ClassVar" not in ast.unparse(field.annotation)
        ]
        for decorator in map(ast.unparse, node.decorator_list):
            is_dataclass = decorator.split("(")[0].split(".")[-1] == "dataclass"
            many = len(fields) > MAX_POSITIONAL_FIELDS
            if is_dataclass and many and "kw_only=True" not in decorator:
                yield f"line {node.lineno}: {node.name} has {len(fields)} fields and is not kw_only"


@cache
def classes_of(package: Path) -> frozenset[str]:
    """Names of the classes that the package defines."""
    return frozenset(
        node.name
        for path in package.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef)
    )


def calls_a_class_by_position(path: Path) -> Iterator[str]:
    """A call of one of the package's classes names its arguments where there are five or more."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and len(node.args) > MAX_POSITIONAL:
            name = ast.unparse(node.func).split(".")[-1]
            if name in classes_of(PACKAGE):
                yield f"line {node.lineno}: {name} gets {len(node.args)} positional arguments"


#: Words that begin a fragment: a summary is an imperative sentence, or names a thing.
_FRAGMENT = re.compile(
    r"(What|Whether|How|Where|Which|When|Who|Whose|Why"
    r"|Of|By|For|From|To|At|On|With|Without|Between|Before|As)\b"
)
_SECTION = re.compile(r"(Args|Returns|Yields|Raises):\n")


def docstrings(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and text of every docstring, also of those after a field."""
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        for statement in body if isinstance(body, list) else ():
            if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
                text = statement.value.value
                if isinstance(text, str):
                    yield statement.lineno, inspect.cleandoc(text)


def has_no_clear_summary(path: Path) -> Iterator[str]:
    """A docstring begins with one line that says what a thing is, or what a function does."""
    for line, text in docstrings(ast.parse(path.read_text())):
        summary = text.split("\n\n")[0]
        if _FRAGMENT.match(summary):
            yield f"line {line}: a fragment: {summary}"
        if "\n" in summary and not _SECTION.match(summary):
            yield f"line {line}: a summary of more than one line: {summary}"


RULES = (
    imports_higher_layers,
    tells_several_stories,
    lets_deepspeed_out,
    draws_by_itself,
    sees_the_whole_config,
    *(is_a_drawer, imports_higher_rooms, is_in_a_crowd, checks_and_returns),
    *(moves_files_by_itself, spells_a_name_of_the_run_folder),
    nests_conditional_expressions,
    takes_many_fields_by_position,
    calls_a_class_by_position,
    has_no_clear_summary,
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
            checks_and_returns,
            "data/a.py",
            "def _check_rows(rows) -> list[str]: ...",
            "line 1: _check_rows returns something",
        ),
        (
            nests_conditional_expressions,
            "plan/a.py",
            "a = 1 if b else (2 if c else 3)",
            "line 1: a conditional expression within another",
        ),
        (
            nests_conditional_expressions,
            "plan/a.py",
            "a = f(1 if c else 2) if b else 3",
            "line 1: a conditional expression within another",
        ),
        (
            takes_many_fields_by_position,
            "data/a.py",
            "@dataclass(frozen=True)\nclass A:\n    a: int\n    b: int\n    c: int\n    d: int = 1",
            "line 2: A has 4 fields",
        ),
        (
            takes_many_fields_by_position,
            "data/a.py",
            "@dataclasses.dataclass\nclass A:\n    a: int\n    b: int\n    c: int\n    d: int",
            "line 2: A has 4 fields",
        ),
        (
            calls_a_class_by_position,
            "plan/a.py",
            "class A: ...\nA(1, 2, 3, 4, 5)",
            "line 2: A gets 5 positional arguments",
        ),
        (
            has_no_clear_summary,
            "a.py",
            'class A:\n    b: int\n    """What comes."""',
            "line 3: a fragment: What comes.",
        ),
        (has_no_clear_summary, "a.py", '"""How it is done."""', "line 1: a fragment: How it"),
        (
            has_no_clear_summary,
            "a.py",
            'def f():\n    """Return what\n    is asked for.\n\n    More."""',
            "line 2: a summary of more than one line: Return what\nis asked for.",
        ),
        (
            imports_higher_rooms,
            "data/rows/a.py",
            "from llmtune.data.load.loader import load",
            "imports data/load",
        ),
        (moves_files_by_itself, "data/a.py", "import hashlib", "uses hashlib"),
        (moves_files_by_itself, "data/a.py", "from hashlib import sha256", "uses hashlib"),
        (moves_files_by_itself, "launch/preflight/nvme.py", "import fcntl", "uses fcntl"),
        (moves_files_by_itself, "data/a.py", "os.replace(a, b)", "uses os.replace"),
        (moves_files_by_itself, "data/a.py", "move = os.rename", "uses os.rename"),
        (moves_files_by_itself, "data/a.py", "folder.rename(other)", "uses .rename"),
        (moves_files_by_itself, "data/a.py", "(a / b).replace(c)", "uses .replace"),
        (moves_files_by_itself, "data/a.py", "os.fsync(file.fileno())", "uses os.fsync"),
        (
            spells_a_name_of_the_run_folder,
            "data/a.py",
            'file = run / "plan.json"',
            "line 1: spells plan.json",
        ),
        (
            spells_a_name_of_the_run_folder,
            "export/card/card.py",
            'a = "metrics.jsonl", "loss.png"',
            "line 1: spells metrics.jsonl",
        ),
        (spells_a_name_of_the_run_folder, "a.py", '(a / "COMPLETE").touch()', "line 1: spells COM"),
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


@pytest.mark.parametrize(
    ("rule", "name", "text"),
    [
        (moves_files_by_itself, "storage/a.py", "os.replace(a, b); import hashlib"),
        (moves_files_by_itself, "draws.py", "import hashlib"),
        (moves_files_by_itself, "data/a.py", 'text.replace("a", "b"); rename(row, fields)'),
        (moves_files_by_itself, "data/a.py", "dataclasses.replace(spec, dtype=dtype)"),
        (spells_a_name_of_the_run_folder, "data/a.py", '"""Read plan.json."""\nkind = "model"'),
        (spells_a_name_of_the_run_folder, "export/card/card.py", 'CURVES = "loss.png"'),
        (checks_and_returns, "a.py", "def check_rows(rows) -> None: ..."),
        (checks_and_returns, "a.py", "class A:\n    def check(self) -> None: ..."),
        (checks_and_returns, "a.py", "def checksum(text) -> str: ..."),
        (checks_and_returns, "a.py", "def find_problems(rows) -> list[str]: ..."),
        (nests_conditional_expressions, "a.py", "a = [1 if b else 2, 3 if c else 4]"),
        (nests_conditional_expressions, "a.py", "if a:\n    b = 1 if c else 2"),
        (
            takes_many_fields_by_position,
            "a.py",
            "@dataclass\nclass A:\n    a: int\n    b: int\n    c: int",
        ),
        (
            takes_many_fields_by_position,
            "a.py",
            "@dataclass(kw_only=True)\nclass A:\n    a: int\n    b: int\n    c: int\n    d: int",
        ),
        (
            takes_many_fields_by_position,
            "a.py",
            "@dataclass\nclass A:\n    a: int\n    b: int\n    c: int\n    d: ClassVar[int] = 1",
        ),
        (
            takes_many_fields_by_position,
            "a.py",
            "class A(NamedTuple):\n    a: int\n    b: int\n    c: int\n    d: int",
        ),
        (
            has_no_clear_summary,
            "a.py",
            '"""Tell whether it is.\n\nWhat else\nthere is."""\na = """What\nelse"""',
        ),
        (has_no_clear_summary, "a.py", 'def f():\n    """Args:\n        a: What it is.\n    """'),
        (calls_a_class_by_position, "a.py", "class A: ...\nA(1, 2, 3, 4, e=5)"),
        (calls_a_class_by_position, "a.py", "class A: ...\nB(1, 2, 3, 4, 5)\na(1, 2, 3, 4, 5)"),
    ],
)
def test_a_rule_lets_pass_what_is_right(
    rule: Callable[[Path], Iterator[str]],
    name: str,
    text: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path)
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    assert list(rule(path)) == []


def test_every_exception_of_a_rule_is_still_needed() -> None:
    for name, words in MOVES_OF_THEIR_OWN.items():
        text = (PACKAGE / name).read_text()
        assert all(word in text for word in words), name
    for name, words in SAME_NAMES.items():
        text = (PACKAGE / name).read_text()
        assert all(f'"{word}"' in text for word in words), name


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


#: Folders of tests that cover the whole program and mirror no room.
WHOLE_PROGRAM = {"architectures", "cuda", "docker", "extend", "faults", "suite"}
#: Tests beside those that mirror a module or a folder of their room: each covers a subject.
SUBJECTS = {
    "api": {"notebook"},
    "checkpoint": {"old_runs", "resume_matrix"},
    "cli": {"bad_input", "main_job", "pipeline", "secrets", "silence", "start"},
    "config": {"default_job", "defaults", "documented", "one_report", "typed_texts", "values"},
    "data": {"growing_batch", "huge_rows", "malformed", "spellings"},
    "engine": {
        *("bad_gradients", "growing_batch", "parity", "placements", "reductions"),
        *("qlora", "qlora_family", "qlora_models", "sequence_parallel", "states"),
    },
    "export": {"merge_faults", "restart", "zero_command"},
    "model": {"recompute"},
    "launch": {"hangs", "memory_errors", "slurm_script"},
    "plan": {
        "by_hand",
        "documented",
        "encoders",
        "experiments",
        "intervals",
        "memory_table",
        "models",
    },
    "predict": {"adapters", "labels", "output", "resume", "runs", "text"},
    "report": {"any_values", "browser"},
    "run": {"adapter_path", "best_model", "loftq_run", "reports", "restarts"},
    "security": {
        *("arrow", "fuzz", "host_lists", "hostile_inputs", "links", "listeners", "mirror_owner"),
        *("own_code", "owners", "planted_run", "secrets", "signing", "stored_configs", "supply"),
        "templates",
    },
    "serve": {"answers"},
    "sweep": {"kills", "wandb_files"},
    "task": {"classifier_runs", "plain_loop"},
    "train": {
        "begin_from_path",
        "best_model",
        "best_runs",
        "growing_run",
        "left_behind",
        "plain_loop",
    },
    "track": {"lost"},
    "tuner": {"family"},
}


def mirrored_names(room: str) -> set[str]:
    """Names of the modules and folders of a room."""
    return {path.stem for path in (PACKAGE / room).rglob("*.py")} | {
        path.name for path in (PACKAGE / room).rglob("*") if path.is_dir()
    }


def test_a_test_file_mirrors_a_module_or_covers_a_subject_that_is_listed() -> None:
    folders = {path.name for path in (ROOT / "tests").iterdir() if list(path.glob("test_*.py"))}
    assert folders - WHOLE_PROGRAM <= set(LAYERS)
    for room in sorted(folders - WHOLE_PROGRAM):
        names = {path.stem[5:] for path in (ROOT / "tests" / room).rglob("test_*.py")}
        subjects = SUBJECTS.get(room, set())
        assert names - mirrored_names(room) == subjects, f"tests/{room}"
