"""One command prepares once, however many attempts it takes."""

from __future__ import annotations

import json
import pkgutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmtune.cli.main import main
from llmtune.launch.supervise import restarts
from llmtune.launch.supervise.out_of_memory import MemoryEvent, RanOutOfMemoryError
from llmtune.launch.supervise.outcome import RanksFailedError
from llmtune.run import fallback
from llmtune.train.request import RunRequest
from tests.support import TINY

#: Done once per command.
ONCE = (
    "llmtune.config.compose.compose_config",
    "llmtune.run.prepare.RunFolder.find_changes",
    "llmtune.run.prepare.resume_point",
    "llmtune.run.prepare.resolve_base_folder",
    "llmtune.run.prepare.check_exportable",
    "llmtune.run.prepare.load_tokenizer",
    "llmtune.run.prepare.prepare_rows",
    "llmtune.data.prepare.hash_tokenizer",
)
#: Done once per attempt, and once per attempt after the first.
EACH = ("llmtune.run.attempt.RunFolder.begin",)
FURTHER = ("llmtune.run.attempt.resume_point",)


#: 13 M parameters, all trained: enough for another rung to need clearly less memory.
LARGE_ENOUGH = (
    "tuner=full",
    "model.config.hidden_size=512",
    "model.config.intermediate_size=2048",
    "model.config.num_hidden_layers=4",
    "model.config.num_attention_heads=8",
    "model.config.num_key_value_heads=8",
)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each of them was called."""
    counts: Counter[str] = Counter()

    def count(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **named: Any) -> Any:
            counts[name] += 1
            return real(*arguments, **named)

        return counted

    for name in (*ONCE, *EACH, *FURTHER):
        monkeypatch.setattr(name, count(name, pkgutil.resolve_name(name)))
    return counts


@pytest.mark.process
def test_a_restart_and_a_fallback_compose_and_prepare_nothing_again(
    calls: Counter[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(restarts, "FIRST_WAIT_SECONDS", 0.01)
    event = MemoryEvent(
        rank=0, phase="backward", step=3, peak_bytes=10**9, pool="host", message="std::bad_alloc"
    )
    failures: list[Exception] = [
        RanksFailedError("rank 0 ended", "rank 0 ended", step=2),
        RanOutOfMemoryError(event),
    ]
    requests: list[RunRequest] = []

    def run_ranks(request: RunRequest, *_: object) -> None:
        requests.append(request)
        if failures:
            raise failures.pop(0)

    monkeypatch.setattr(fallback, "run_request", run_ranks)
    command = [
        *TINY,
        *LARGE_ENOUGH,
        "data.train=stdlib_docs@50",
        "data.val_set_size=4",
        "train.max_steps=4",
        "export=none",
        "launch.nproc=1",
        f"offload.nvme_path={tmp_path}/nvme",
        f"output_dir={tmp_path}/run",
    ]
    assert main(command) == 0
    first, again, lower = requests
    assert first.plan.placement == again.plan.placement
    assert lower.plan.placement.uses_nvme
    assert first.data == lower.data
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert plan["placement"]["optimizer"] == "nvme"
    assert [entry["message"] for entry in plan["history"]] == ["std::bad_alloc"]
    times = dict.fromkeys(ONCE, 1) | dict.fromkeys(EACH, 3) | dict.fromkeys(FURTHER, 2)
    assert calls == times
