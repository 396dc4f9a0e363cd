"""``plan`` refuses what ``train`` refuses, as far as the configuration tells; and both name
everything at once.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from llmtune.cli import main
from llmtune.config.compose import compose_config
from llmtune.run.settings import find_problems
from tests.support import TINY

REFUSED = {
    "a size that is none": (["launch.memory_limit=lots"], "launch.memory_limit=lots: bytes"),
    "ranks beside a hostfile": (
        ["launch.hostfile=/hosts", "launch.nproc=2"],
        "launch.nproc=2: with launch.hostfile",
    ),
    "a weight for one of two sources": (
        ["data.train=[{path: a.jsonl, weight: 2}, b.jsonl]"],
        "has no weight",
    ),
    "a key that no source has": (
        ["data.train={path: a.jsonl, wight: 2}"],
        "data.train.wight: unknown",
    ),
    "a limit below zero": (["data.train={path: a.jsonl, limit: -1}"], "data.train.limit=-1"),
    "a weight in evaluation": (["data.eval={path: a.jsonl, weight: 2}"], "data.eval: weight=2"),
    "a stream that repeats": (
        [
            "data.streaming=true",
            "train.max_steps=2",
            "data.val_set_size=0",
            "data.train={path: a.jsonl, repeat: 2}",
        ],
        "a stream has no repeat",
    ),
    "no such template": (
        ["data.chat_template=lama3"],
        "data.chat_template=lama3: no such template",
    ),
    "no repository": (["export.upload=hf://name"], "export.upload=hf://name"),
    "an upload to nowhere": (["export.upload=nowhere://a/b"], "nowhere:// is not known"),
    "a mirror nowhere": (
        ["checkpoint.mirror=nowhere://a/b"],
        "checkpoint.mirror=nowhere://a/b: nowhere:// is not known",
    ),
    "full fine-tuning and an adapter": (
        ["tuner=full", "export=adapter"],
        "full fine-tuning has no adapter",
    ),
}

RIGHT = [
    ["launch.memory_limit=2GB"],
    ["data.train=[{path: a.jsonl, weight: 2}, {path: b.jsonl, weight: 1}]", "data.eval=c.jsonl"],
    ["data.chat_template=llama3"],
    ["export.upload=hf://user/name"],
    ["export.upload=gs://bucket/run", "checkpoint.mirror=s3://bucket/run"],
    ["export.upload=/a/folder", "checkpoint.mirror=/another"],
    ["export=none", "export.upload=hf://name"],
]


@pytest.mark.parametrize("verb", ["plan", "train"])
@pytest.mark.parametrize(("overrides", "said"), REFUSED.values(), ids=REFUSED)
def test_both_refuse(
    overrides: list[str], said: str, verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = (
        []
        if any(text.startswith("data.train") for text in overrides)
        else ["data.train=rows.jsonl"]
    )
    code = main.main(
        [verb, *TINY, *data, *overrides, "train.logging_steps=0", f"output_dir={tmp_path}/run"]
    )
    error = capsys.readouterr().err
    assert code == 2
    assert said in error
    assert "train.logging_steps=0" in error, "in the same report"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("overrides", RIGHT, ids=str)
def test_what_is_right_is_not_refused(overrides: list[str]) -> None:
    data = (
        []
        if any(text.startswith("data.train") for text in overrides)
        else ["data.train=rows.jsonl"]
    )
    assert find_problems(compose_config([*TINY, *data, *overrides]).config) == []
