"""After training: what is written, and what lies there already."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from llmtune.config.compose import compose_config
from llmtune.config.stored import dump_yaml
from llmtune.errors import ExportError, StoppedError
from llmtune.report.refresh import LAST_SECONDS, LAST_SECONDS_AFTER_STOP
from llmtune.run import finish
from llmtune.run.finish import maybe_export


class Silent:
    """A console that keeps what it was told."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text: str) -> None:
        """Keep it."""
        self.said.append(text)


@pytest.mark.parametrize(
    ("overrides", "written"),
    [
        (["tuner=full"], False),
        (["tuner=full", "export.dtype=fp32"], True),
        (["tuner=full", "export.dtype=fp16"], True),
        (["tuner=full", "export=gguf"], True),
        (["tuner=lora", "export=adapter"], False),
        (["tuner=lora"], True),
        (["tuner=lora", "export=none"], False),
    ],
)
def test_what_was_trained_is_the_export_only_if_nothing_else_was_asked_for(
    overrides: list[str], written: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = compose_config(["model=tiny", *overrides]).config
    (tmp_path / "config.yaml").write_text(dump_yaml(config))
    done: list[Any] = []
    monkeypatch.setattr(
        "llmtune.run.exporting.export_run", lambda *arguments: done.append(arguments)
    )
    console: Any = Silent()
    maybe_export(tmp_path, config.export, console)
    assert bool(done) is written
    assert any(str(tmp_path) in text for text in console.said)


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (None, "finished"),
        (StoppedError("stopped during the export"), "stopped"),
        (KeyboardInterrupt("ended by SIGINT"), "stopped"),
        (ExportError("no room"), "failed"),
        (ValueError("a mistake"), "failed"),
    ],
)
@pytest.mark.parametrize("is_written", [False, True])
def test_every_end_is_recorded_and_goes_on_as_it_was(
    error: BaseException | None,
    outcome: str,
    is_written: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said: list[str] = []
    seconds: list[float] = []
    monkeypatch.setattr(
        finish, "write_last_report", lambda _run, _cache, _say, limit: seconds.append(limit)
    )
    config = compose_config(["model=tiny", f"report.write={is_written}"]).config
    caught: BaseException | None = None
    try:
        with finish.recorded_end(tmp_path, config, said.append):
            if error is not None:
                raise error
    except BaseException as raised:
        caught = raised
    assert caught is error
    values = json.loads((tmp_path / "ended.json").read_text())
    assert (values["outcome"], values["message"]) == (outcome, str(error or ""))
    assert abs(values["time"] - time.time()) < 60
    limit = LAST_SECONDS_AFTER_STOP if outcome == "stopped" else LAST_SECONDS
    assert seconds == ([limit] if is_written else [])
    assert said == []


def test_a_disk_that_refuses_the_record_is_no_new_error(tmp_path: Path) -> None:
    said: list[str] = []
    config = compose_config(["model=tiny", "report.write=false"]).config
    with (
        pytest.raises(ExportError, match="the first"),
        finish.recorded_failure(tmp_path / "nowhere", config, said.append),
    ):
        raise ExportError("the first")
    assert len(said) == 1
    assert "ended.json cannot be written" in said[0]
