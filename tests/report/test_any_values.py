"""Whatever values the files of a run folder hold, its pages are written."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmtune.report.compare_page import build_compare_page
from llmtune.report.html import render_page
from llmtune.report.run_facts import read_run
from llmtune.report.run_list import list_runs
from llmtune.report.run_page import build_run_page
from llmtune.storage.rank_files import FinishedRecord
from tests.report.run_folder import PLAN, make_run

FILES = [
    *("plan.json", "config.yaml", "environment.json", "samples.json", "data_examples.json"),
    *("confusion_matrix.json", "time.json", "ended.json", "finished.json", "restarts.jsonl"),
]

values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**20), 10**20)
    | st.floats()
    | st.sampled_from(["", "text", "\ud800", "1e400"]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.just("key"), inner),
    max_leaves=4,
)


def paths_in(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The places of all values within a value of JSON, with its own."""
    found = [path]
    entries: list[tuple[Any, Any]] = list(value.items()) if isinstance(value, dict) else []
    if isinstance(value, list):
        entries = list(enumerate(value))
    for key, inner in entries:
        found += paths_in(inner, (*path, key))
    return found


def replaced(value: Any, path: tuple[Any, ...], other: Any) -> Any:
    """The value with another one at a place."""
    if not path:
        return other
    value[path[0]] = replaced(value[path[0]], path[1:], other)
    return value


@pytest.mark.parametrize("name", FILES)
@settings(deadline=None, max_examples=1)
@given(data=st.data())
def test_pages_and_lists_are_written(name: str, data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        run, other = (make_run(Path(folder) / place) for place in ("a", "b"))
        best = {"metric": "eval_loss", "value": 1.0, "step": 4}
        FinishedRecord(step=8, best=best, goal="min eval_loss").write(run)
        file = run / name
        stored = json.loads(file.read_text())
        place = data.draw(st.sampled_from(paths_in(stored)))
        file.write_text(json.dumps(replaced(stored, place, data.draw(values))))
        facts = read_run(run)
        assert render_page(build_run_page(facts), "")
        assert render_page(build_compare_page([facts, read_run(other)]), "")
        assert len(list_runs(Path(folder))) == 2


@pytest.mark.parametrize("number", [float("nan"), float("inf"), 1e308, -1e308, 10**20])
def test_numbers_that_no_picture_shows_stop_no_page(number: float, tmp_path: Path) -> None:
    run = make_run(
        tmp_path / "a",
        time={"seconds": {"forward": number, "backward": 1.0}},
        ended={"outcome": "failed", "time": number},
        plan={**PLAN, "tokens_per_second": number, "history": [{"time": number, "step": 1}]},
    )
    (run / "restarts.jsonl").write_text(json.dumps({"time": number, "reason": "x", "step": 2}))
    page = render_page(build_run_page(read_run(run)), "")
    assert "Restarts and fallbacks" in page
