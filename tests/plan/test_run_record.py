"""``plan.json`` as a dataclass: its keys are a contract, and other versions' files can be read."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llmtune.config.compose import compose_config
from llmtune.plan.prepared_data import PreparedData, SplitSummary
from llmtune.plan.resolve import resolve_plan
from llmtune.plan.run_record import BeganFrom, MemoryFailure, RunRecord
from llmtune.plan.steps import StepsPlan
from llmtune.storage.plain_fields import from_plain

#: Of a file of this version, in their order; programs outside llmtune read them.
KEYS = [
    "world_size",
    "hardware",
    "shape",
    "placement",
    "batch",
    "memory",
    "tokens_per_second",
    "gradient_checkpointing",
    "recomputed",
    "attn_implementation",
    "learning_rate",
    "deepspeed",
    "notes",
    "steps",
    "data",
    "labels",
    "model_folder",
    "run_name",
    "run_id",
    "began_from",
    "history",
]


@pytest.fixture(scope="module")
def record() -> RunRecord:
    split = SplitSummary(
        rows=9, documents=9, tokens=90, supervised_tokens=45, dropped=0, truncated=0, skipped=0
    )
    data = PreparedData(
        folder="/cache",
        fingerprint="f",
        train=split,
        eval=None,
        train_stores=["/cache/a"],
        eval_stores=[],
        special_tokens=[1],
        classes=["yes", 2, 0.5],
        fatal=0,
        left_out=0,
    )
    failure = MemoryFailure(
        candidate={"zero_stage": 0, "optimizer": "none"},
        conditions={"world_size": 1, "memory_limit": None},
        time=1.5,
        rank=0,
        phase="step",
        step=3,
        peak_bytes=10,
        pool="host",
        message="std::bad_alloc",
    )
    return RunRecord.of_plan(
        resolve_plan(compose_config(["model=tiny"]).config),
        steps=StepsPlan(total_steps=4, warmup_steps=1, total_rows=None, origin="train.max_steps"),
        data=data,
        model_folder=Path("/models/tiny"),
        run_name="r",
        run_id="a",
        began_from=BeganFrom("/other/checkpoint-5", 5),
        history=(failure,),
    )


def test_a_record_is_read_back_as_it_was_written_under_the_keys_of_the_contract(
    record: RunRecord,
) -> None:
    text = record.to_json()
    values = json.loads(text)
    assert list(values) == KEYS
    assert "tensors" not in values["shape"]
    assert values["model_folder"] == "/models/tiny"
    assert values["began_from"] == {"origin": "/other/checkpoint-5", "step": 5}
    assert RunRecord.from_json(text) == record
    assert json.loads(RunRecord().to_json()).keys() == values.keys()


@pytest.mark.parametrize("missing", KEYS)
def test_a_file_without_a_key_says_nothing_of_it_and_all_the_rest(
    missing: str, record: RunRecord
) -> None:
    values = json.loads(record.to_json())
    del values[missing]
    default: Any = getattr(RunRecord(), missing)
    assert from_plain(RunRecord, values) == replace(record, **{missing: default})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("world_size", "two"),
        ("world_size", True),
        ("placement", 3),
        ("placement", [1]),
        ("notes", {"a": 1}),
        ("history", "none"),
        ("model_folder", 5),
        ("model_folder", ""),
        ("data", None),
    ],
)
def test_a_value_of_another_type_counts_as_missing(key: str, value: Any) -> None:
    assert from_plain(RunRecord, {key: value, "run_name": "r"}) == RunRecord(run_name="r")


def test_what_is_no_object_says_nothing_and_what_is_no_json_is_an_error() -> None:
    for text in ("[1]", "7", "null", "{}"):
        assert RunRecord.from_json(text) == RunRecord()
    with pytest.raises(ValueError, match="Expecting"):
        RunRecord.from_json("[1,")


def test_parts_may_be_missing_inside_and_unknown_keys_are_passed_over() -> None:
    record = from_plain(
        RunRecord,
        {
            "hardware": {"name": "A100", "device_count": 8, "color": "green"},
            "batch": {"global_batch_size": 64},
            "history": [{"rank": 1, "phase": "step"}, 5],
            "data": {"fingerprint": "f"},
            "later": 1,
        },
    )
    assert record.hardware is not None
    assert (record.hardware.name, record.hardware.device_count, record.hardware.nodes) == (
        "A100",
        8,
        1,
    )
    assert record.batch is not None
    assert (record.batch.global_batch_size, record.batch.micro_batch_size) == (64, 0)
    assert [(entry.rank, entry.phase, entry.step) for entry in record.history] == [(1, "step", 0)]
    assert record.data is not None
    assert (record.data.fingerprint, record.data.eval, record.data.train_stores) == ("f", None, [])
