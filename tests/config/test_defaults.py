"""Every default is in the schema; a YAML of ``conf/`` holds what differs from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import MISSING

from llmtune.config.compose import compose_config, config_groups
from llmtune.config.schema import Config
from llmtune.config.stored import to_plain
from tests.support import ROOT

CONF = ROOT / "conf"
DEFAULTS: dict[str, Any] = to_plain(Config())
#: The files of groups that hold keys; those of ``experiment`` and ``debug`` go over other options.
FILES = sorted(file for file in CONF.glob("*/*.yaml") if file.parent.name in DEFAULTS)


def find_repeated(text: str, defaults: Any) -> list[str]:
    """The keys of a YAML whose value is that of the schema."""
    values: dict[str, Any] = yaml.safe_load(text) or {}
    return sorted(key for key, value in values.items() if value == defaults.get(key, "no key"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_an_option_repeats_no_default(file: Path) -> None:
    assert find_repeated(file.read_text(), DEFAULTS[file.parent.name]) == []


def test_neither_does_the_page_to_read_first() -> None:
    assert find_repeated((CONF / "train.yaml").read_text(), DEFAULTS) == []


def test_what_repeats_a_default_is_found() -> None:
    defaults = DEFAULTS["tracker"]
    assert find_repeated("kind: none\nmode: offline\nproject: llmtune\n", defaults) == [
        "kind",
        "project",
    ]
    assert find_repeated("mode: online", defaults) == ["mode"]
    assert find_repeated("train: ???", DEFAULTS["data"]) == ["train"]
    assert find_repeated("mode: offline\nentity: somebody", defaults) == []
    assert find_repeated("{}", defaults) == []


def test_every_group_is_looked_at() -> None:
    looked_at = {file.parent.name for file in FILES}
    assert looked_at == config_groups().keys() & DEFAULTS.keys()
    assert {"data", "export", "offload", "optim", "paths", "tracker", "zero"} <= looked_at


@pytest.mark.parametrize(
    ("option", "key", "value"),
    [
        ("tracker=none", "tracker.kind", "none"),
        ("tracker=wandb", "tracker.project", "llmtune"),
        ("export=safetensors", "export.format", "safetensors"),
        ("zero=auto", "zero.stage", "auto"),
        ("offload=auto", "offload.param", "auto"),
        ("schedule=cosine", "schedule.lr_scheduler_type", "cosine"),
        ("optim=adamw", "optim.kind", "adamw"),
        ("data=alpaca", "data.val_set_size", 0.05),
        ("data=files", "data.format", "auto"),
        ("model=tiny", "precision", "bf16"),
        ("model=tiny", "seed", 42),
    ],
)
def test_an_option_that_is_the_default_still_says_so_in_what_is_composed(
    option: str, key: str, value: Any
) -> None:
    composed: Any = yaml.safe_load(compose_config([option, "data.train=a.jsonl"]).yaml)
    for part in key.split("."):
        composed = composed[part]
    assert composed == value


def test_a_key_without_a_default_has_its_value_in_every_option() -> None:
    missing = {
        f"{group}.{key}"
        for group, values in DEFAULTS.items()
        if isinstance(values, dict)
        for key, value in values.items()
        if value == MISSING
    }
    assert missing == {"model.name_or_path", "data.train", "tuner.kind", "paths.cache_dir"}
    for file in FILES:
        values = yaml.safe_load(file.read_text()) or {}
        if file.parent.name in ("tuner", "paths"):
            assert missing & {f"{file.parent.name}.{key}" for key in values}, file
