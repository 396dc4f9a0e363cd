"""Overrides that are written in Python arrive as what they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmtune.api.overrides import compose_verb, to_texts
from llmtune.config.compose import config_groups
from llmtune.config.overrides import Choice, Setting, read_override
from llmtune.errors import ConfigError

GROUPS = config_groups()
#: Hydra's grammar has no control characters, and a command line has no zero byte.
TEXTS = st.text(st.characters(exclude_categories=["Cc", "Cs"]))


def read(key: str, value: Any) -> Any:
    """What the command line reads of a value."""
    (text,) = to_texts(({key: value},))
    found = read_override(text, GROUPS)
    return found.value if isinstance(found, Setting) else found.option


@given(TEXTS)
def test_a_text_is_that_text(text: str) -> None:
    assert read("chat.prompt", text) == text


@given(st.lists(TEXTS.filter(bool), min_size=1))
def test_a_list_of_files_is_that_list(files: list[str]) -> None:
    assert read("data.train", files) == files


@given(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False))
def test_a_number_is_that_number(value: Any) -> None:
    assert read("train.max_steps", value) == value


@pytest.mark.parametrize("number", [np.float64(1e-4), np.int64(7), np.bool_(True)])
def test_a_number_of_numpy_is_that_number(number: Any) -> None:
    assert read("train.max_steps", number) == number.item()


@pytest.mark.parametrize("word", ["null", "8", "true", "[a]", "a,b", "'a'", "${oc.env:HOME}", ""])
def test_a_word_with_a_meaning_is_a_text(word: str) -> None:
    assert read("data.train", word) == word
    assert read("run_name", word) == word


def test_groups_paths_and_mappings() -> None:
    assert read("tuner", "full") == "full"
    assert read("zero", 3) == "3"
    assert read("output_dir", Path("/a b/c")) == "/a b/c"
    assert read("model.config", {"hidden_size": 64}) == {"hidden_size": 64}
    (text,) = to_texts(({"tuner": "lora"},))
    assert isinstance(read_override(text, GROUPS), Choice)


def test_texts_and_mappings_are_one_command_line() -> None:
    composed = compose_verb(
        "train", ("model=tiny", {"tuner.lora_r": 4}, "tuner.lora_r=8", {"seed": 7}), None
    )
    assert (composed.config.tuner.lora_r, composed.config.seed) == (8, 7)


@pytest.mark.parametrize(
    ("override", "message"),
    [(3, "3 is no override"), ({"seed": float("nan")}, "seed=nan"), ({"seed": object()}, "seed=")],
)
def test_what_is_no_override_is_refused(override: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        to_texts((override,))
