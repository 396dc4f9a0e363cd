"""Every command and every ``key=value`` that README, docs, conf and the help show composes."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import pytest
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from llmtune.cli.arguments import parse
from llmtune.cli.verbs import VERBS
from llmtune.config.compose import compose_config, config_groups
from llmtune.config.foreign import ABSENT_OPTIONS
from llmtune.config.keys import ALIASES, known_keys
from llmtune.config.overrides import Setting, read_override
from llmtune.config.schema import Config
from llmtune.config.stored import to_config
from llmtune.config.value_rules import find_value_problems
from llmtune.errors import ConfigError
from tests.documented import (
    Shown,
    commands_of_page,
    find_commands,
    find_settings,
    settings_of_page,
)

COMMANDS = find_commands()
SETTINGS = find_settings()
GROUPS = config_groups()
SIZE = 8

#: Settings that pages show because llmtune refuses them, or that are no setting of llmtune.
EXCEPTIONS: dict[str, str] = {
    "tuner.lora_r=8,16": "the README says that it is refused",
    "lora_rank=8": "the table of other tools' keys says that it is refused",
    **dict.fromkeys((f"optim={option}" for option in ABSENT_OPTIONS["optim"]), "the same table"),
    "add_prefix_space=True": "a setting of tokenizers",
    "zero_force_ds_cpu_optimizer=false": "a key of DeepSpeed",
    "zero_division=0": "an argument of scikit-learn",
    "multi_class=ovr": "an argument of scikit-learn",
    "mode=None": "an argument of seqeval",
    "quantization_config=Mxfp4Config(dequantize=True)": "an argument of transformers",
    "relative_step=False": "an argument of transformers' Adafactor",
    "scale_parameter=False": "an argument of transformers' Adafactor",
}
#: Commands that need files of the reader's, which other tests write.
WITH_OWN_FILES = {
    *("train tuner=my_tuner --config-dir=mine/conf", "--config-dir mine experiment=first"),
}


def test_the_examples_are_found() -> None:
    assert len(COMMANDS) > 60
    assert len(SETTINGS) > 100
    assert {shown.words[0] for shown in COMMANDS} >= {"plan", "data", "chat", "export"}
    assert Shown("README.md", ("tuner.lora_r=8,16",)) in SETTINGS


@pytest.mark.parametrize("start", range(0, len(COMMANDS), SIZE))
def test_each_composes(start: int) -> None:
    problems = [
        problem for shown in COMMANDS[start : start + SIZE] for problem in problem_of(shown)
    ]
    assert problems == []


def problem_of(shown: Shown) -> list[str]:
    if shown.text in WITH_OWN_FILES:
        return []
    try:
        parsed = parse([word for word in shown.words if not names_any_option(word)], VERBS)
        compose_config(parsed.overrides, planning=parsed.verb == "plan")
    except ConfigError as error:
        return [f"{shown.page}: {shown.text}: {error}"]
    return []


def names_any_option(word: str) -> bool:
    """It is such as ``tuner=NAME``."""
    group, _, option = word.partition("=")
    return group in GROUPS and option.isupper()


def test_each_setting_is_read() -> None:
    assert setting_problems(SETTINGS) == []


def test_every_exception_is_still_shown_and_still_refused() -> None:
    shown = {word for entry in SETTINGS for word in entry.words}
    assert EXCEPTIONS.keys() - shown == set()
    for word in EXCEPTIONS:
        assert setting_problems([Shown("", (word,))], exceptions=set()), word


def setting_problems(
    shown: list[Shown], exceptions: Collection[str] = EXCEPTIONS.keys()
) -> list[str]:
    """Keys and groups that are unknown, and values of a wrong type or out of range."""
    problems = []
    #: Configurations of which each has a key once, so that few of them hold all.
    nodes: list[tuple[Any, set[str]]] = []
    for page, word in ((entry.page, word) for entry in shown for word in entry.words):
        if word in exceptions:
            continue
        try:
            setting = read(word)
            if setting is not None:
                _set(nodes, setting)
        except (ConfigError, OmegaConfBaseException) as error:
            problems.append(f"{page}: {word}: {error}")
    for node, keys in nodes:
        for key in sorted(OmegaConf.missing_keys(node)):
            OmegaConf.update(node, key, "given")
        found = find_value_problems(to_config(node))
        problems += [text for text in found if any(key in text for key in keys)]
    return problems


def read(word: str) -> Setting | None:
    """Read a setting; of a value in upper case, or left out, the key alone is looked at."""
    name, _, value = word.partition("=")
    stands_for_any = not value or value.isupper() or "..." in value
    if not stands_for_any:
        override = read_override(word, GROUPS)
        return override if isinstance(override, Setting) else None
    key = ALIASES.get(name.lstrip("+"), name.lstrip("+"))
    if key not in known_keys() | GROUPS.keys():
        raise ConfigError(f"unknown key {key!r}")
    return None


def _set(nodes: list[tuple[Any, set[str]]], setting: Setting) -> None:
    free = next((entry for entry in nodes if setting.key not in entry[1]), None)
    if free is None:
        free = (OmegaConf.structured(Config), set())
        nodes.append(free)
    OmegaConf.update(free[0], setting.key, setting.value, force_add=True)
    free[1].add(setting.key)


#: Page -> what the guard says of it.
PLANTED = {
    "    python -m llmtune model=llama3_8b tuner.lora_rank=8\n": "unknown key 'tuner.lora_rank'",
    "```\nllmtune plan model=llama4\n```\n": "model=llama4: no such option",
    "    python -m llmtune model=llama3_8b \\\n        zero=5\n": "zero=5: no such option",
    "    deepspeed scripts/train.py --fast\n": "unknown option '--fast'",
    "See `python -m llmtune chat run=a chat.promt=b`.\n": "unknown key 'chat.promt'",
    "    python -m llmtune offload=nvme zero=3\n": "needs a folder on a fast local disk",
}
PLANTED_SETTINGS = {
    "Take `train.global_batchsize=8`.\n": "unknown key 'train.global_batchsize'",
    "Take `tuner=lorra`.\n": "tuner=lorra: no such option",
    "Take `eval run=RUN data.evl=FILE`.\n": "unknown key 'data.evl'",
    "| a |\n| --- |\n| `train.max_steps=0` |\n": "must be above 0",
    "Take `seed=one`.\n": "seed",
    "Take `optim.betas=[0.9]`.\n": "two numbers",
}


@pytest.mark.parametrize("page", PLANTED)
def test_a_planted_command_is_found(page: str) -> None:
    (shown,) = commands_of_page("a.md", page)
    (problem,) = problem_of(shown)
    assert problem.startswith("a.md: ")
    assert PLANTED[page] in problem


@pytest.mark.parametrize("page", PLANTED_SETTINGS)
def test_a_planted_setting_is_found(page: str) -> None:
    (shown,) = settings_of_page("a.md", page)
    (problem,) = setting_problems([shown])
    assert PLANTED_SETTINGS[page] in problem


def test_what_is_right_or_no_setting_passes() -> None:
    page = "`run=`, `tuner=lora`, `verify key=A.pem`, `f(a=1)`, `A=1`, `--x=1`, `data.train=...`\n"
    shown = list(settings_of_page("a.md", page))
    assert [entry.text for entry in shown] == ["run=", "tuner=lora", "key=A.pem", "data.train="]
    assert setting_problems(shown) == []
