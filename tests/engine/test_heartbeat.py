"""Every write of a phase record changes it."""

from __future__ import annotations

from pathlib import Path

from llmtune.engine.phases.heartbeat import PhaseLog
from llmtune.storage.rank_files import phase_file, read_phase


def test_every_write_changes_the_record(tmp_path: Path) -> None:
    log = PhaseLog(phase_file(tmp_path, 0))
    assert read_phase(tmp_path, 0).phase == "start"
    log.enter("evaluate")
    seen = [phase_file(tmp_path, 0).read_bytes()]
    for write in (log.beat, log.beat, lambda: log.enter("evaluate")):
        write()
        seen.append(phase_file(tmp_path, 0).read_bytes())
    assert len(set(seen)) == 4
    assert {len(record) for record in seen} == {len(seen[0])}
    assert read_phase(tmp_path, 0).phase == "evaluate"
    PhaseLog().beat()
