"""Every value that a docstring or a document names is one that composes, and numbers are
numbers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
from omegaconf import OmegaConf

from llmtune.config.compose import compose_config, config_groups
from llmtune.config.groups.data import OnBadRow, Overlong
from llmtune.config.keys import is_free, known_keys
from llmtune.config.overrides import Setting, read_override
from llmtune.config.reference.entries import docstrings
from llmtune.config.schema import Config
from llmtune.config.stored import dump_yaml, parse_yaml
from llmtune.config.value_rules import PATHS
from llmtune.errors import ConfigError
from llmtune.export.formats.format import FORMATS
from llmtune.optimizer.optimizer import OPTIMIZERS
from llmtune.registry import Registry
from llmtune.track.service import SERVICES
from llmtune.train.schedule import SCHEDULES
from llmtune.tuner.tuner import TUNERS
from tests.support import ROOT

GROUPS = config_groups()
#: Keys that hold the name of a registered variant.
REGISTRIES: list[Registry[Any]] = [FORMATS, OPTIMIZERS, SCHEDULES, SERVICES, TUNERS]
#: Literals of docstrings that are no values of their key but names of other things.
_NO_VALUE = re.compile(
    r"[./*<{@]|^[A-Z]|^(path|format fields|llmtune|max_seq_length|max_steps|val_set_size|overlong)"
)


def hints(cls: type, prefix: str = "") -> Iterator[tuple[str, Any, str]]:
    """Dotted key, type and docstring of every key."""
    texts = docstrings(cls)
    for name, hint in get_type_hints(cls).items():
        if hasattr(hint, "__dataclass_fields__"):
            yield from hints(hint, f"{prefix}{name}.")
        else:
            yield prefix + name, hint, texts.get(name, "")


def documented() -> list[tuple[str, str]]:
    """Keys with the values that their docstring, or a document, names."""
    found: list[tuple[str, str]] = []
    keys = list(hints(Config))
    for key, hint, text in keys:
        literals = [
            word for literal in re.findall(r"``([^`]+)``", text) for word in literal.split()
        ]
        if isinstance(hint, type) and issubclass(hint, Enum):
            found += [(key, str(value)) for member in hint for value in (member.value, member.name)]
            found += [
                (key, word) for word in literals if word in {str(member.value) for member in hint}
            ]
        elif str in get_args(hint) and not _NO_VALUE.search(" ".join(literals)):
            found += [(key, word) for word in literals if word == "auto"]
    known = {key for key, _, _ in keys}
    found += [(registry.key, name) for registry in REGISTRIES for name in registry.list()]
    for file in [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]:
        for key, value in re.findall(
            r"(?<![\w.])([a-z_]+\.[a-z0-9_]+)=([A-Za-z0-9_.+-]+|\[[^\]]*\])", file.read_text()
        ):
            if key in known:
                found.append((key, value.rstrip(".")))
    return list(dict.fromkeys(found))


DOCUMENTED = documented()


def test_the_values_are_found() -> None:
    assert len(DOCUMENTED) > 100
    assert {
        ("data.overlong", "raise"),
        ("data.overlong", "error"),
        ("data.on_bad_row", "raise"),
        ("train.on_nan", "rollback"),
        ("checkpoint.on_disk_low", "prune"),
        ("train.global_batch_size", "auto"),
        ("export.gguf_type", "q4_0"),
    } <= set(DOCUMENTED)


@pytest.mark.parametrize(("key", "value"), DOCUMENTED)
def test_every_documented_value_is_taken(key: str, value: str) -> None:
    if is_free(key) or value.isupper() or "..." in value:
        return
    override = read_override(f"{key}={value}", GROUPS)
    assert isinstance(override, Setting)
    OmegaConf.update(typed_keys(), key, override.value)


@cache
def typed_keys() -> Any:
    """Keys that are typed as a composition types them."""
    return OmegaConf.structured(Config)


@pytest.mark.parametrize("word", ["raise", "error"])
def test_raise_and_error_are_the_same_on_the_command_line_and_in_files(
    word: str, tmp_path: Path
) -> None:
    config = compose_config([f"data.overlong={word}", f"data.on_bad_row={word}"]).config
    assert (config.data.overlong, config.data.on_bad_row) == (Overlong.error, OnBadRow.error)
    folder = tmp_path / "experiment"
    folder.mkdir()
    (folder / "mine.yaml").write_text(
        f"# @package _global_\ndata:\n  overlong: {word}\n  on_bad_row: {word}\n"
    )
    config = compose_config(["experiment=mine"], str(tmp_path)).config
    assert (config.data.overlong, config.data.on_bad_row) == (Overlong.error, OnBadRow.error)
    assert parse_yaml(dump_yaml(config)) == config


#: Keys that take a number.
NUMBERS = [
    key
    for key, hint, _ in hints(Config)
    if float in (hint, *get_args(hint)) or (key.startswith("hardware.") and hint is Any)
]


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_no_key_takes_what_is_no_finite_number(value: str) -> None:
    assert len(NUMBERS) > 20
    with pytest.raises(ConfigError) as caught:
        compose_config([f"{key}={value}" for key in NUMBERS] + [f"optim.betas=[0.9,{value}]"])
    for key in [*NUMBERS, "optim.betas"]:
        assert f"{key}={value}: must be a finite number" in str(caught.value)


def test_whole_numbers_take_none_of_them_either() -> None:
    whole = [
        key
        for key, hint, _ in hints(Config)
        if int in (hint, *get_args(hint)) and key not in NUMBERS
    ]
    assert len(whole) > 20
    with pytest.raises(ConfigError) as caught:
        compose_config([f"{key}=nan" for key in whole])
    assert not [key for key in whole if f"{key}=nan" not in str(caught.value)]


def test_numbers_that_are_finite_stay(tmp_path: Path) -> None:
    config = compose_config(
        ["optim.eps=1e-300", "launch.hang_timeout=1e18", "data.val_set_size=0"]
    ).config
    assert (config.optim.eps, config.launch.hang_timeout, config.data.val_set_size) == (
        1e-300,
        1e18,
        0,
    )


@pytest.mark.parametrize("name", ["../up", "a/b", "/abs", "..", ".", "a\\b", "x/../../y", " "])
def test_a_run_name_does_not_leave_its_folder(name: str) -> None:
    with pytest.raises(
        ConfigError, match="a name, without slashes; another folder is named by output_dir="
    ):
        compose_config([f"run_name={name}"])


@pytest.mark.parametrize("name", ["a", "a.b", "a,b", "..a", "2026-11-26 first", "ünïcode", "a@b"])
def test_other_run_names_are_taken(name: str) -> None:
    assert compose_config([f"run_name={name}"]).config.run_name == name


def test_every_key_is_known() -> None:
    assert {key for key, _, _ in hints(Config)} <= known_keys()


@pytest.mark.parametrize("key", PATHS)
@pytest.mark.parametrize("text", ["", " "])
def test_a_variable_that_a_script_has_not_set_is_no_place(key: str, text: str) -> None:
    with pytest.raises(
        ConfigError, match=f"{re.escape(key)}= is empty: name a place, or leave the key out"
    ):
        compose_config(["model=tiny", f"{key}={text}"])
