"""The files of an attempt: what one side writes, the other reads."""

from __future__ import annotations

import os
from pathlib import Path

from llmtune.storage import layout
from llmtune.storage.phase_record import PhaseRecord
from llmtune.storage.rank_files import (
    FailureReport,
    FinishedRecord,
    KernelKills,
    RestartRecord,
    SkippedSteps,
    phase_file,
    read_phase,
    read_raw_phase,
)

LARGEST = PhaseRecord(
    phase="backward",
    step=10**12,
    peak_bytes=10**15,
    beats=10**15,
    device_peak_bytes=10**15,
    at_limit="device",
)


def test_a_record_is_written_over_the_one_before_whatever_its_length(tmp_path: Path) -> None:
    descriptor = PhaseRecord.open(phase_file(tmp_path, 3))
    assert read_phase(tmp_path, 3) == PhaseRecord()
    sizes = set()
    for record in (LARGEST, PhaseRecord(phase="load", step=1), LARGEST, PhaseRecord()):
        record.write(descriptor)
        assert read_phase(tmp_path, 3) == record
        sizes.add(len(read_raw_phase(tmp_path, 3)))
    os.close(descriptor)
    assert len(sizes) == 1


def test_a_rank_without_a_record_or_with_half_of_one_is_starting(tmp_path: Path) -> None:
    assert read_phase(tmp_path, 0) == PhaseRecord(phase="start", step=0)
    for text in ('{"phase": "st', "", "7", "[]"):
        phase_file(tmp_path, 0).write_text(text)
        assert read_phase(tmp_path, 0).phase == "start"


def test_reports_that_say_what_to_do_come_first_then_the_earliest(tmp_path: Path) -> None:
    for rank, known, time in ((0, False, 1.0), (1, True, 3.0), (2, True, 2.0), (3, False, 0.5)):
        FailureReport(rank=rank, code=1, message="m", known=known, time=time).write(tmp_path)
    reports = FailureReport.read_all(tmp_path)
    assert [report.rank for report in reports] == [2, 1, 3, 0]
    assert reports[0] == FailureReport(rank=2, code=1, message="m", known=True, time=2.0)


def test_counts_of_kills_and_the_end_of_a_run_are_read_back(tmp_path: Path) -> None:
    KernelKills(5).write(tmp_path)
    assert KernelKills.read(tmp_path) == KernelKills(5)
    assert FinishedRecord.read(tmp_path) is None
    for best in (None, {"metric": "eval_loss", "value": 1.5, "step": 4}):
        record = FinishedRecord(step=4, tokens=100, best=best)
        record.write(tmp_path)
        assert FinishedRecord.read(tmp_path) == record
    (tmp_path / layout.FINISHED).write_text('{"step"')
    assert FinishedRecord.read(tmp_path) is None
    (tmp_path / layout.FINISHED).write_text('{"step": 7}')
    assert FinishedRecord.read(tmp_path) == FinishedRecord(step=7)


def test_skipped_steps_are_a_sorted_list_and_lists_of_earlier_versions_are_read(
    tmp_path: Path,
) -> None:
    assert SkippedSteps.read(tmp_path) == SkippedSteps()
    SkippedSteps(frozenset({7, 3, 11})).write(tmp_path)
    assert (tmp_path / layout.SKIPPED_STEPS).read_text() == "[3, 7, 11]"
    for text, steps in (
        ("[3, 7, 11]", {3, 7, 11}),
        ("[]", set()),
        ("[3, 7, ", set()),
        ('{"steps": [3]}', set()),
        ('[3, "a", true, null, 5]', {3, 5}),
    ):
        (tmp_path / layout.SKIPPED_STEPS).write_text(text)
        assert SkippedSteps.read(tmp_path).steps == steps


def test_restarts_are_lines_and_those_of_earlier_versions_are_read(tmp_path: Path) -> None:
    assert RestartRecord.read_all(tmp_path) == []
    written = (
        '{"time": 5.0, "reason": "rank 1 ended", "step": 4, "resumed_from": null,'
        ' "rollback": false}\n'
    )
    RestartRecord(time=5.0, reason="rank 1 ended", step=4).append(tmp_path)
    assert (tmp_path / layout.RESTARTS).read_text() == written
    second = RestartRecord(
        time=6.0, reason="\u2028 \n", step=9, resumed_from="checkpoint-8", rollback=True
    )
    second.append(tmp_path)
    with (tmp_path / layout.RESTARTS).open("a") as file:
        file.write('\n{"time": 7.0, "rea')
    first, *rest = RestartRecord.read_all(tmp_path)
    assert first == RestartRecord(time=5.0, reason="rank 1 ended", step=4)
    assert rest == [second]
    with (tmp_path / layout.RESTARTS).open("w") as file:
        file.write('{"time": 1, "reason": "an older llmtune", "step": 2}\n')
    (old,) = RestartRecord.read_all(tmp_path)
    assert (old.resumed_from, old.rollback) == (None, False)
