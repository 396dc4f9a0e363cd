"""A format of export from a file of one's own is planned for, checked, written, described and verified like any other."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from llmtune.config.groups.export import ExportConfig
from llmtune.errors import ConfigError
from llmtune.export.formats import format as formats
from llmtune.export.formats.format import find_format, list_formats, register
from llmtune.storage.manifest import find_damage
from tests.extend.names_format import NAMES
from tests.support import TINY, run


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is gone behind it."""
    list_formats()
    monkeypatch.setattr(formats, "_FORMATS", dict(formats._FORMATS))


@pytest.mark.process
def test_a_run_ends_with_an_export_in_it(tmp_path: Path) -> None:
    (tmp_path / "conf/export").mkdir(parents=True)
    (tmp_path / "conf/export/names.yaml").write_text("format: names\n")
    job = [*TINY, "data.train=stdlib_docs@50", "data.val_set_size=4", "train.max_steps=1", "launch.nproc=1"]
    places = [f"--config-dir={tmp_path / 'conf'}", f"output_dir={tmp_path / 'run'}"]
    done = run([sys.executable, "-m", "tests.extend.names_format", *job, "export=names", *places])
    assert done.code == 0, done.err
    folder = tmp_path / "run/export-names"
    assert f"exported names: {folder}" in done.out
    assert "model.embed_tokens.weight" in (folder / "names.txt").read_text().splitlines()
    assert find_damage(folder) == []
    assert json.loads((folder / "manifest.json").read_text())["format"] == "names"
    card = (folder / "README.md").read_text()
    assert "as a list of names" in card
    assert "library_name: less" in card
    assert "names.txt" in card


@pytest.mark.usefixtures("alone")
def test_a_name_is_taken_once_and_a_near_one_is_named() -> None:
    register(NAMES)
    assert list(list_formats()) == sorted(list_formats())
    assert find_format("names") is NAMES
    assert find_format("names").find_problems(ExportConfig(format="names")) is None
    with pytest.raises(ValueError, match="there is a format of this name"):
        register(replace(NAMES, name="gguf"))
    with pytest.raises(ConfigError, match=r"export\.format=name: no such format; did you mean names\?"):
        find_format("name")
    with pytest.raises(ConfigError, match="no such format; there are adapter, bnb_4bit, gguf, "):
        find_format("quite something else")
