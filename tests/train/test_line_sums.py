"""A line of several steps has the mean loss of all their trained tokens, wherever the run was
interrupted in it.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmtune.train.line_sums import LineSums
from tests.support import TINY, losses, run_cli

STEPS = st.lists(
    st.tuples(
        st.one_of(st.floats(0, 20), st.just(float("nan")), st.just(float("inf"))),
        st.integers(1, 10**6),
        st.booleans(),
    ),
    min_size=2,
    max_size=20,
)


@given(steps=STEPS, cut=st.integers(0, 20))
def test_the_mean_is_weighted_by_tokens_and_leaves_out_what_is_no_number(
    steps: list[tuple[float, int, bool]], cut: int
) -> None:
    line = LineSums()
    for number, (loss, tokens, applied) in enumerate(steps, 1):
        line = line.add(number, loss, tokens, applied)
        if number == cut:
            line = LineSums.from_dict(json.loads(json.dumps(asdict(line), allow_nan=False)))
    record = line.to_record(steps[-1][0])
    counted = [(loss, tokens) for loss, tokens, _ in steps if loss == loss and loss != float("inf")]
    if counted:
        expected = sum(loss * tokens for loss, tokens in counted) / sum(
            tokens for _, tokens in counted
        )
        assert record["loss"] == pytest.approx(expected, rel=1e-12)
    else:
        assert record["loss"] != record["loss"]
    skipped = [number for number, (_, _, applied) in enumerate(steps, 1) if not applied]
    assert record.get("skipped_steps", []) == skipped
    assert record.get("skipped", False) == bool(skipped)


@given(loss=st.floats(0, 100), tokens=st.integers(1, 10**6), applied=st.booleans())
def test_a_line_of_one_step_is_that_step_in_every_digit(
    loss: float, tokens: int, applied: bool
) -> None:
    record = LineSums().add(7, loss, tokens, applied).to_record(loss)
    assert record == {"loss": loss} | ({} if applied else {"skipped": True})
    assert LineSums.from_dict(None) == LineSums()


@pytest.mark.process
def test_every_third_line_is_the_mean_of_three_steps(tmp_path: Path) -> None:
    job = [
        *TINY,
        "precision=fp32",
        "train.max_steps=5",
        "train.eval_max_rows=2",
        "export=none",
        "launch.nproc=1",
    ]
    job += ["optim.learning_rate=1e-2", "train.global_batch_size=1"]
    for name, steps in (("one", 1), ("three", 3)):
        done = run_cli(*job, f"train.logging_steps={steps}", f"output_dir={tmp_path / name}")
        assert done.code == 0, done.err
    each, third = losses(tmp_path / "one"), losses(tmp_path / "three")
    assert len(third) == 2
    assert min(each[:3]) < third[0] < max(each[:3])
    assert third[0] != each[2]
    assert min(each[3:]) < third[1] < max(each[3:])
