"""The JSON Schema accepts what llmtune composes and nothing of a wrong type, and the page of all
keys is made from the same source.
"""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from omegaconf.errors import OmegaConfBaseException

from llmtune.cli.reference.schema import list_variants
from llmtune.config.compose import compose_config, config_groups
from llmtune.config.reference.entries import KeyEntry, clean, read_entries
from llmtune.config.reference.json_schema import describe_value, make_json_schema
from llmtune.config.reference.units import UNITS, WITHOUT_UNIT
from llmtune.config.schema import Config
from llmtune.config.stored import dump_yaml, from_plain, to_plain
from llmtune.config.value_rules import find_value_problems
from llmtune.errors import ConfigError
from scripts import reference_page
from tests.support import ROOT

SCHEMA = make_json_schema(list_variants())
ENTRIES = {entry.key: entry for entry in read_entries().all_keys()}
GROUPS = config_groups()
#: Commands whose stored configurations are looked at; the files of all options are looked at too.
COMMANDS = [
    [],
    *([f"experiment={name}"] for name in sorted(GROUPS["experiment"])),
    ["data=alpaca", "data.train=[a.jsonl,{path: b.csv, weight: 2}]", "data.eval=c.jsonl@5"],
    ["export=gguf", "optim=lion", "schedule=wsd", "tracker=wandb", "debug=profile"],
    ["offload=nvme", "offload.nvme_path=/nvme", "zero=3", "hardware=8xh100"],
    ["hparams_search=lora", "tuner=freeze", "tuner.freeze.last_layers=2"],
]


@cache
def validator() -> Draft202012Validator:
    return Draft202012Validator(SCHEMA)


def errors(values: Any) -> list[str]:
    return [
        f"{'.'.join(map(str, error.absolute_path))}: {error.message}"
        for error in validator().iter_errors(values)
    ]


def nested(key: str, value: Any) -> dict[str, Any]:
    """The mapping that holds one key."""
    for part in reversed(key.split(".")):
        value = {part: value}
    return dict(value)


def test_it_is_a_json_schema() -> None:
    Draft202012Validator.check_schema(SCHEMA)
    assert len(ENTRIES) > 150


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_what_is_stored_validates(command: list[str]) -> None:
    config = compose_config(command, planning=True).config
    assert errors(yaml.safe_load(dump_yaml(config))) == []


@pytest.mark.parametrize(
    "group", [group for group in sorted(GROUPS) if group in SCHEMA["properties"]]
)
def test_the_files_of_a_group_validate(group: str) -> None:
    for file in sorted((ROOT / "conf" / group).glob("*.yaml")):
        assert errors({group: yaml.safe_load(file.read_text()) or {}}) == [], file


@pytest.mark.parametrize("group", ["experiment", "debug", "."])
def test_the_files_of_whole_jobs_validate(group: str) -> None:
    files = sorted((ROOT / "conf" / group).glob("*.yaml"))
    assert files
    for file in files:
        assert errors(yaml.safe_load(file.read_text())) == [], file


@pytest.mark.parametrize(
    "values",
    [
        {"tuner": {"lora_rank": 8}},
        {"zero": {"stage": 4}},
        {"train": {"max_steps": "many"}},
        {"train": {"max_steps": 0}},
        {"optim": {"kind": "sgd"}},
        {"optim": {"betas": [0.9]}},
        {"data": {"train": {"path": "a.jsonl", "weigth": 2}}},
        {"data": {"packing": "yes"}},
        {"schedule": {"warmup_ratio": 1}},
        {"launch": {"memory_limit": "6 gigs"}},
        {"tracker": {"kinds": ["wandb", "tensorbord"]}},
        {"train": 3},
        {"sede": 1},
    ],
)
def test_what_is_wrong_does_not(values: dict[str, Any]) -> None:
    assert len(errors(values)) == 1


def test_words_that_python_spells_otherwise_are_taken() -> None:
    for word in ("raise", "error"):
        assert errors({"data": {"overlong": word, "on_bad_row": word}}) == []
    assert errors(yaml.safe_load("train: {eval_strategy: no, save_strategy: epoch}")) == []
    assert errors({"run": "runs/a", "seed": "${oc.env:SEED}", "defaults": ["_self_"]}) == []


#: Values of every type that YAML has.
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 3)
    | st.floats(-2, 2)
    | st.sampled_from(["", "word"]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.just("path"), inner, max_size=1),
    max_leaves=3,
)


@cache
def composed_tiny() -> dict[str, Any]:
    return dict(to_plain(compose_config(["model=tiny", "data.train=a.jsonl"]).config))


def is_taken(key: str, value: Any) -> bool:
    """llmtune takes the value by itself: its type, and the rules that name the key."""
    values = copy.deepcopy(composed_tiny())
    *owners, name = key.split(".")
    inner = values
    for owner in owners:
        inner = inner[owner]
    inner[name] = value
    try:
        return not [text for text in find_value_problems(from_plain(values)) if key in text]
    except (OmegaConfBaseException, ConfigError):
        return False


def test_every_key_refuses_a_wrong_type() -> None:
    wrong: list[Any] = [[], [[]], {"a": 1}, [None], -1, "no such word", True, None]
    takes_all = [key for key in ENTRIES if not any(errors(nested(key, value)) for value in wrong)]
    assert takes_all == []


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(sorted(ENTRIES)), VALUES)
def test_what_it_takes_llmtune_takes(key: str, value: Any) -> None:
    if not errors(nested(key, value)):
        assert is_taken(key, value), f"{key}={value!r}"


def test_every_key_is_documented_and_every_number_has_its_unit() -> None:
    assert [key for key, entry in ENTRIES.items() if not entry.text] == []
    numbers = {key for key, entry in ENTRIES.items() if takes_number(entry)}
    assert numbers - UNITS.keys() - WITHOUT_UNIT == set()
    assert (UNITS.keys() | WITHOUT_UNIT) - numbers == set()


def takes_number(entry: KeyEntry) -> bool:
    text = str(describe_value(entry, list_variants()))
    return any(word in text for word in ("'integer'", "'number'", "size", "[0, 1, 2, 3"))


def test_defaults_are_those_of_the_schema() -> None:
    plain = to_plain(Config())
    for key, entry in ENTRIES.items():
        described: Any = SCHEMA
        value: Any = plain
        for part in key.split("."):
            described, value = described["properties"][part], value[part]
        assert described["description"] == entry.text
        if entry.has_default:
            assert not errors(nested(key, described["default"])), key
        else:
            assert "default" not in described


def test_text_is_cleaned() -> None:
    assert clean("A\n    b\n\n    :data:`a.b` c") == "A b\n\n``a.b`` c"


def test_the_page_is_what_the_schema_says() -> None:
    assert reference_page.PAGE.read_text() == reference_page.make_page(), (
        "run python -m scripts.reference_page"
    )


def test_a_page_that_is_behind_is_found(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    page = tmp_path / "reference.md"
    page.write_text(reference_page.make_page().replace("`seed`", "`sede`"))
    monkeypatch.setattr(reference_page, "PAGE", page)
    before = page.read_text()
    assert reference_page.main(["--check"]) == 1
    assert "run python -m scripts.reference_page" in capsys.readouterr().err
    assert page.read_text() == before
    assert reference_page.main([]) == 0
    assert reference_page.main(["--check"]) == 0
