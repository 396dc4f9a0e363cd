"""How much of an export is written: share, size, speed and time left."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from llmtune.track import byte_progress
from llmtune.track.byte_progress import ByteProgress


def test_share_speed_and_time_left_are_those_of_the_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(byte_progress, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    progress, drawn = ByteProgress(), ByteProgress(with_bar=True)
    assert progress.describe() == ""
    for one in (progress, drawn):
        one.expect(4_000_000_000)
    assert progress.describe() == "0% of 4.0 GB"
    clock[0] = 110.0
    for one in (progress, drawn):
        one.add(600_000_000)
        one.add(400_000_000)
    assert progress.describe() == "25% of 4.0 GB, 100.0 MB/s, ETA 0:30"
    assert drawn.describe() == "#####............... 25% of 4.0 GB, 100.0 MB/s, ETA 0:30"
    # A writer may pad what it said; then it is checked, which has no share.
    progress.add(5_000_000_000)
    assert progress.describe() == "6.0 GB written"
