"""What the supervisor asks for is what the ranks read."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from llmtune.data.prepare import prepare_data
from llmtune.plan.length.resolve_steps import resolve_steps
from llmtune.plan.resolve import resolve_plan
from llmtune.task.labels import LabelKind, Labels
from llmtune.train.request import RunRequest
from tests.train.test_resume import config_of


@pytest.mark.parametrize("resume_from", [None, Path("/runs/r/checkpoint-4")])
def test_every_part_of_a_request_arrives(
    resume_from: Path | None, tiny_model: Path, tmp_path: Path
) -> None:
    config = config_of(
        "data.train=stdlib_docs@40",
        "data.val_set_size=4",
        "checkpoint.mirror=s3://bucket/place",
        "launch.nproc=1",
    )
    tokenizer: Any = AutoTokenizer.from_pretrained(tiny_model)
    data = prepare_data(config.data, tokenizer, 1, tmp_path)
    plan = resolve_plan(config, 1)
    steps = resolve_steps(
        config.train, config.schedule, data.train.rows, plan.batch.global_batch_size
    )
    request = RunRequest(
        config=config,
        plan=plan,
        steps=steps,
        data=data,
        labels=Labels(kind=LabelKind.tags, names=("O", "B-名"), weights=(1.0, 0.5)),
        run_folder=tmp_path / "run",
        run_name="name",
        model_folder=tiny_model,
        resume_from=resume_from,
        run_id="an id",
    )
    read = RunRequest.from_json(request.to_json())
    for part in fields(RunRequest):
        there, here = getattr(read, part.name), getattr(request, part.name)
        if part.name == "plan":
            # Without the tensors that it was made from.
            there, here = (json.loads(json.dumps(plan.to_dict())) for plan in (there, here))
        assert there == here, part.name
