"""After training: what is written, and what lies there already."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llmtune.config.compose import compose_config
from llmtune.config.stored import dump_yaml
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
