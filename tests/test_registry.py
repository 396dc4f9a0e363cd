"""Variants are found by name, whoever registers them."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from llmtune.data.formats.format import RowFormat
from llmtune.errors import ConfigError
from llmtune.registry import PLUGINS, Registry, describe_plugin_error, hash_plugins
from llmtune.track.service import Service
from llmtune.train.schedule import Schedule
from llmtune.tuner.tuner import Tuner


@dataclass(frozen=True)
class Animal:
    name: str


@pytest.fixture
def animals() -> Registry[Animal]:
    registry: Registry[Animal] = Registry("pet.kind", "llmtune.export.formats", also=("none",))
    registry.register(Animal("horse"))
    registry.register(Animal("cat"))
    return registry


def test_names_are_sorted_and_the_nearest_is_told(animals: Registry[Animal]) -> None:
    assert list(animals.list()) == ["cat", "horse"]
    assert animals.find("cat") == Animal("cat")
    with pytest.raises(
        ConfigError, match=r"pet\.kind=house: there is no such one; did you mean horse\?"
    ):
        animals.find("house")
    with pytest.raises(
        ConfigError, match=r"pet\.kind=zzz: there is no such one; there are cat, horse, none"
    ):
        animals.find("zzz")


def test_a_name_is_taken_once(animals: Registry[Animal]) -> None:
    cat = animals.find("cat")
    assert animals.register(cat) is cat, "a module that is imported again"
    for name in ("cat", "none"):
        with pytest.raises(ConfigError, match="there is one of this name already"):
            animals.register(Animal(name))


def test_a_module_of_the_users_is_imported_where_variants_are_looked_up(
    animals: Registry[Animal], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a_plugin_of_mine.py").write_text("imported = True")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv(PLUGINS, " a_plugin_of_mine, ")
    animals.list()
    assert sys.modules["a_plugin_of_mine"].imported
    monkeypatch.setenv(PLUGINS, "a_plugin_of_nobody")
    with pytest.raises(
        ConfigError, match="LLMTUNE_PLUGINS names a_plugin_of_nobody, which cannot be imported"
    ):
        animals.find("dog")


def test_what_is_cached_of_a_plugin_is_told_by_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(PLUGINS, raising=False)
    assert hash_plugins() == ""
    (tmp_path / "another_plugin_of_mine.py").write_text("a = 1")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv(PLUGINS, "another_plugin_of_mine")
    before = hash_plugins()
    (tmp_path / "another_plugin_of_mine.py").write_text("a = 2")
    assert "" != hash_plugins() != before


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def broken(:", r":1 \(SyntaxError: .*: correct it"),
        ("first = 1\nunknown", r":2 \(NameError: name 'unknown' is not defined\): correct it"),
        ("import no_such_library", r":1 \(ModuleNotFoundError: .*: install what it imports"),
        ("from json import nothing", r":1 \(ImportError: cannot import name"),
        ("raise SystemExit(3)", r":1 \(SystemExit: 3\)"),
        (
            "from llmtune.tuner.tuner import TUNERS, Tuner\nTUNERS.register(Tuner)",
            r":2 \(TypeError: register an instance of Tuner, not the class Tuner\)",
        ),
        (
            "from llmtune.train.schedule import Schedule\n"
            "Schedule(name='mine', share=lambda _: -1.0)",
            r":2 \(ValueError: the share of the schedule mine must be a number from 0 on, and is",
        ),
    ],
)
def test_an_import_that_fails_is_described_with_its_line(
    text: str,
    message: str,
    animals: Registry[Animal],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "a_broken_plugin.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    # Blanks, because what was imported is remembered by the text of the variable.
    monkeypatch.setenv(PLUGINS, "a_broken_plugin" + " " * len(text))
    file = tmp_path / "a_broken_plugin.py"
    with pytest.raises(ConfigError, match="names a_broken_plugin, whose import fails") as raised:
        animals.list()
    assert f"fails at {file}:" in str(raised.value)
    assert re.search(message, str(raised.value))


def test_a_path_is_no_module(animals: Registry[Animal], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PLUGINS, "plugins/mine.py")
    with pytest.raises(ConfigError, match=r"which is a path: write the module's name"):
        animals.list()


def test_an_incomplete_variant_is_refused() -> None:
    class Nameless(Tuner):
        title = "a tuner"

    class OnlyLogs:
        def log(self, record: object) -> None:
            pass

    tuners: Registry[Tuner] = Registry("tuner.kind", "llmtune.tuner.kinds", interface=Tuner)
    with pytest.raises(TypeError, match="Nameless has no name"):
        tuners.register(Nameless())
    with pytest.raises(TypeError, match="the tracker OnlyLogs has no method finish"):
        Service(name="a", title="a", open=OnlyLogs)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="must be a frozenset of names"):
        RowFormat(name="a", read=len, fields=["a"])  # type: ignore[arg-type]
    schedules: Registry[Schedule] = Registry("a.b", "llmtune.train.schedules", interface=Schedule)
    changed = Schedule(name="a", share=lambda point: 1 - point.done)
    object.__setattr__(changed, "share", "linear")
    with pytest.raises(TypeError, match="share must be a function, not 'linear'"):
        schedules.register(changed)


def test_an_error_in_a_plugin_is_told_with_its_line(
    animals: Registry[Animal], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a_failing_plugin.py").write_text("def fail():\n    return {}['key']\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv(PLUGINS, "a_failing_plugin")
    animals.list()
    with pytest.raises(KeyError) as raised:
        sys.modules["a_failing_plugin"].fail()
    text = describe_plugin_error(raised.value)
    assert text is not None
    assert f"a_failing_plugin fails at {tmp_path}/a_failing_plugin.py:2 (KeyError: 'key')" in text
    assert describe_plugin_error(ValueError("of llmtune")) is None


def test_only_files_that_register_a_variant_are_hashed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Correcting a tracker must not make the rows of a run look changed."""
    schedules: Registry[Schedule] = Registry("a.b", "llmtune.train.schedules")
    (tmp_path / "registers_nothing.py").write_text("a = 1")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv(PLUGINS, "registers_nothing")
    assert schedules.hash_plugins() == ""
    schedules.register(Schedule(name="of_this_test", share=lambda point: 1 - point.done))
    assert schedules.hash_plugins() != ""
