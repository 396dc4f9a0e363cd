"""What is written as YAML reads back as it was, whatever the letters."""

from __future__ import annotations

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from llmtune.storage.yaml_text import to_yaml

#: Letters with a meaning in YAML, ends of lines, controls, and what is written in two units of
#: UTF-16.
LETTERS = st.one_of(
    st.sampled_from(
        "\x85\u2028\u2029\ufeff\x7f\x9b\n\r"
        " \t'\"\\:#-?[]{}&*!|>%@`\x00\x1b\x0b\x0c\x1cé\U0001f600a1"
    ),
    st.characters(exclude_categories=["Cs"]),
)


@given(
    text=st.text(LETTERS, max_size=8),
    times=st.sampled_from([1, 40]),
    width=st.sampled_from([80, float("inf")]),
)
@example(text="\x85", times=1, width=80)
@example(text=" \u2028 ", times=40, width=80)
def test_every_text_reads_back(text: str, times: int, width: float) -> None:
    values = {"list": [text * times, {"deeper": text * times}], text * times: 1}
    assert yaml.safe_load(to_yaml(values, width)) == values


@pytest.mark.parametrize("text", ["plain", "中文", "a: b", "x" * 200])
def test_texts_that_read_back_anyway_are_written_as_ever(text: str) -> None:
    assert to_yaml({"key": text}) == yaml.safe_dump({"key": text}, allow_unicode=True)
