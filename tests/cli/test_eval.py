"""``eval run=`` says so where the rows that it holds out are not those that the run did."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llmtune.cli.eval import find_other_split
from llmtune.config.compose import compose_config
from llmtune.run.target import Target
from llmtune.storage import layout

ROWS = "data.train=/rows.jsonl"


def told(
    run: Path | None, *overrides: str, now: str = "b", stored: list[str] | None = None
) -> str | None:
    composed = compose_config(["model=tiny", *overrides])
    config = compose_config(["model=tiny", ROWS, *(stored or [])]).config
    return find_other_split(
        composed,
        Target(config=config, model_folder=Path("/model"), adapter=None, run=run, base_name="tiny"),
        now,
    )


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / layout.PLAN).write_text(json.dumps({"data": {"fingerprint": "a"}}))
    return tmp_path


def test_rows_of_another_draw_may_have_been_trained_on(run: Path) -> None:
    text = told(run)
    assert text is not None
    assert "it may have been trained on some of them" in text
    assert "data.eval=FILE" in text


@pytest.mark.parametrize("own", ["data.train=/others.jsonl", "data=alpaca"])
def test_rows_of_ones_own_are_ones_own_affair(own: str, run: Path) -> None:
    given = [own] if "train" in own else [own, ROWS]
    assert told(run, *given) is None
    assert told(run, stored=["data.eval=/held.jsonl"]) is None


def test_the_same_rows_and_a_folder_that_does_not_say_are_nothing_to_tell(
    run: Path, tmp_path: Path
) -> None:
    assert told(run, now="a") is None
    assert told(None) is None
    (tmp_path / "elsewhere").mkdir()
    assert told(tmp_path / "elsewhere") is None
    (run / layout.PLAN).write_text('{"steps": {}}')
    assert told(run) is None
