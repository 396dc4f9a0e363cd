"""A format of export from a file of one's own is checked, written, described and verified like any
other.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llmtune.storage.manifest import find_damage
from tests.support import TINY, run_cli

JOB = [
    *TINY,
    "data.train=stdlib_docs@50",
    "data.val_set_size=4",
    "train.max_steps=1",
    "launch.nproc=1",
]


@pytest.mark.process
@pytest.mark.slow
def test_a_run_ends_with_an_export_in_it(tmp_path: Path) -> None:
    (tmp_path / "conf/export").mkdir(parents=True)
    (tmp_path / "conf/export/names.yaml").write_text("format: names\n")
    places = [f"--config-dir={tmp_path / 'conf'}", f"output_dir={tmp_path / 'run'}"]
    done = run_cli(
        *JOB, "export=names", *places, env={"LLMTUNE_PLUGINS": "tests.extend.names_format"}
    )
    assert done.code == 0, done.err
    folder = tmp_path / "run/export-names"
    assert f"exported names: {folder}" in done.out + done.err
    assert "model.embed_tokens.weight" in (folder / "names.txt").read_text().splitlines()
    assert find_damage(folder) == []
    assert json.loads((folder / "manifest.json").read_text())["format"] == "names"
    card = (folder / "README.md").read_text()
    assert "as a list of names" in card
    assert "library_name: less" in card
    assert "\nless names.txt\n" in card
