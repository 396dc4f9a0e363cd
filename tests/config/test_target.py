"""What a verb works on has its own group, and every earlier name still means it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from llmtune.config.compose import compose_config
from llmtune.config.composed import with_overrides
from llmtune.config.groups.verbs.target import TargetConfig
from llmtune.config.keys import ALIASES, YAML_ALIASES
from llmtune.config.stored import dump_yaml, load_config, read_key
from llmtune.errors import ConfigError
from tests.support import first


@pytest.mark.parametrize("sign", ["", "+"])
@pytest.mark.parametrize("name", [*ALIASES, *sorted(set(ALIASES.values()))])
def test_every_spelling_sets_its_key_and_counts_as_set(name: str, sign: str) -> None:
    composed = compose_config([f"{sign}{name}=/some/folder"])
    key = ALIASES.get(name, name)
    assert read_key(composed.config, key) == "/some/folder"
    assert composed.explicit(key)
    assert [value for value in vars_of(composed.config.target) if value] == ["/some/folder"]
    stored = compose_config(["model=tiny"]).config
    assert read_key(with_overrides(stored, composed), key) == "/some/folder"


def vars_of(target: TargetConfig) -> list[str | None]:
    return [target.run, target.checkpoint, target.base, target.adapter]


def test_the_later_of_two_spellings_wins() -> None:
    assert compose_config(["base=/a", "target.base=/b"]).config.target.base == "/b"
    assert compose_config(["target.base=/b", "base=/a"]).config.target.base == "/a"


def test_the_group_of_checkpoints_keeps_its_name() -> None:
    config = compose_config(["checkpoint=/a", "checkpoint.keep_every=5"]).config
    assert (config.target.checkpoint, config.checkpoint.keep_every) == ("/a", 5)


@pytest.mark.parametrize("alias", first(2, list(YAML_ALIASES)))
def test_files_of_a_user_may_use_either_spelling(alias: str, tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    for name in (alias, YAML_ALIASES[alias]):
        group, _, key = name.rpartition(".")
        body = {group: {key: "/some/folder"}} if group else {key: "/some/folder"}
        text = f"# @package _global_\n{yaml.safe_dump(body)}"
        (tmp_path / "experiment" / "mine.yaml").write_text(text)
        config = compose_config(["experiment=mine"], str(tmp_path)).config
        assert read_key(config, YAML_ALIASES[alias]) == "/some/folder"


def test_interpolations_in_a_users_file_work_with_either_spelling(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    for key in ("run", "target.run"):
        group, _, name = key.rpartition(".")
        run = {name: "runs/${run_name}"}
        body: dict[str, Any] = {group: run} if group else {**run}
        body |= {"output_dir": f"${{{key}}}-out", "chat": {"system": "say ${run} and \\${base}"}}
        text = f"# @package _global_\n{yaml.safe_dump(body)}"
        (tmp_path / "experiment" / "mine.yaml").write_text(text)
        config = compose_config(["experiment=mine", "run_name=late"], str(tmp_path)).config
        assert config.target.run == "runs/late", "looked up before the command line was read"
        assert config.output_dir == "runs/late-out"
        assert config.chat.system == "say ${run} and ${base}", "a prompt is a text"


def test_a_configuration_that_an_earlier_version_stored_is_read(tmp_path: Path) -> None:
    config = compose_config(["model=tiny", "checkpoint.keep_every=3"]).config
    values = yaml.safe_load(dump_yaml(config))
    del values["target"]
    values |= {"run": None, "base": "/b", "adapter": None}
    values["checkpoint"]["path"] = "/c"
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    stored = load_config(tmp_path / "config.yaml")
    assert stored.target == TargetConfig(base="/b", checkpoint="/c")
    assert stored.checkpoint == config.checkpoint
    for alias in ("run", "base", "adapter"):
        del values[alias]
    del values["checkpoint"]["path"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    assert load_config(tmp_path / "config.yaml") == config


@pytest.mark.parametrize(
    ("typo", "meant"),
    [
        ("adaptr", "'adapter'"),
        ("chekpoint", "'checkpoint'"),
        ("target.chekpoint", "'target.checkpoint'"),
        ("eval.adapter", "'target.adapter'"),
        ("targets.run", "'target.run'"),
    ],
)
def test_a_typing_error_is_told_either_spelling(typo: str, meant: str) -> None:
    with pytest.raises(ConfigError, match=f"did you mean {meant}"):
        compose_config([f"{typo}=/x"])
