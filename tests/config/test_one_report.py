"""All problems stand in one report: also when a value is missing, and when an overlay does not say
where its keys belong.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from llmtune.config.compose import compose_config
from llmtune.errors import ConfigError
from llmtune.run.settings import find_problems

WRONG = {
    "optim.learning_rate=-1": "optim.learning_rate=-1",
    "zero.stage=7": "zero.stage=7",
    "train.logging_steps=0": "train.logging_steps=0: must be above 0",
    "offload=optimizer_cpu zero=0": "offload.optimizer needs zero=1",
    "checkpoint.metric_for_best_model=bleu": "checkpoint.metric_for_best_model=bleu",
    "tuner=full export=adapter": "export=adapter: full fine-tuning has no adapter",
    "nonsense.key=1": "unknown key 'nonsense.key'",
}
MISSING = {
    "model=custom": "model.name_or_path has no value",
    "data=files": "data.train has no value",
    "model=custom data=files": "data.train has no value",
}


def report(*overrides: str, config_dir: Path | None = None) -> str:
    with pytest.raises(ConfigError) as refusal:
        compose_config(
            list(overrides), str(config_dir) if config_dir else None, more_rules=find_problems
        )
    return str(refusal.value)


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("missing", MISSING)
def test_a_missing_value_hides_no_other_problem(missing: str, wrong: str) -> None:
    said = report(*missing.split(), *wrong.split())
    assert MISSING[missing] in said
    assert WRONG[wrong] in said


def test_what_is_missing_is_all_that_is_wrong_where_the_rest_is_right() -> None:
    assert report("model=custom") == "model.name_or_path has no value: add model.name_or_path=VALUE"


def test_a_value_that_a_users_own_option_leaves_open_is_missing_too(tmp_path: Path) -> None:
    overlay(tmp_path, "name_or_path: ???\nconfig: null\n", "model")
    said = report("model=mine", "train.logging_steps=0", config_dir=tmp_path)
    assert said.startswith("2 problems")
    assert "model.name_or_path has no value" in said
    assert "train.logging_steps=0" in said


@pytest.mark.parametrize(
    "header", ["", "# my own\n", "# @package experiment\n", "# mine\n# @package _global_\n"]
)
@pytest.mark.parametrize("group", ["experiment", "debug"])
def test_an_overlay_without_its_header_is_told_so_beside_the_rest(
    group: str, header: str, tmp_path: Path
) -> None:
    overlay(tmp_path, f"{header}optim:\n  learning_rate: 1.0e-4\n", group)
    said = report(f"{group}=mine", "train.logging_steps=0", "model=custom", config_dir=tmp_path)
    assert f"{group}/mine.yaml needs '# @package _global_' as its first line" in said
    assert "train.logging_steps=0" in said
    assert "model.name_or_path has no value" in said


@pytest.mark.parametrize(
    "header",
    ["# @package _global_\n", "\n#  @package  _global_ \n# mine\n", "#@package _global_\n"],
)
def test_an_overlay_with_its_header_is_taken(header: str, tmp_path: Path) -> None:
    overlay(tmp_path, f"{header}optim:\n  learning_rate: 1.0e-4\n")
    assert compose_config(["experiment=mine"], str(tmp_path)).config.optim.learning_rate == 1e-4


def test_an_option_of_a_group_of_keys_needs_no_header(tmp_path: Path) -> None:
    overlay(tmp_path, "stage: 2\n", "zero")
    assert compose_config(["zero=mine"], str(tmp_path)).config.zero.stage == 2


def overlay(folder: Path, text: str, group: str = "experiment") -> None:
    (folder / group).mkdir()
    (folder / group / "mine.yaml").write_text(text)
