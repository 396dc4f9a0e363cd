"""Variants are found by name, whoever registers them."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from llmtune.errors import ConfigError
from llmtune.registry import PLUGINS, Registry, hash_plugins


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
        with pytest.raises(ValueError, match="there is one of this name already"):
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
