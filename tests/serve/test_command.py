"""What ``serve`` starts, for which model, and what it refuses before anything is loaded."""

from __future__ import annotations

import json
import socket
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from llmtune.cli.serve import describe
from llmtune.config.compose import compose_config
from llmtune.config.schema import Config
from llmtune.config.stored import dump_yaml
from llmtune.errors import ConfigError, ExportError, LlmtuneError, MissingPrerequisiteError
from llmtune.serve.command import ServeCommand, make_command
from llmtune.serve.engine import ENGINES
from llmtune.storage import layout
from llmtune.storage.hashing import hash_file
from llmtune.storage.manifest import mark_complete, write_manifest

FOLDERS = ["transformers", "vllm"]


@pytest.fixture
def port() -> int:
    """A port on which nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def write_model(
    folder: Path, architecture: str = "LlamaForCausalLM", template: bool = True
) -> Path:
    """A finished export, as far as ``serve`` looks at it."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"architectures": [architecture]}))
    if folder.name == "export-gguf":
        (folder / "model.gguf").write_bytes(b"GGUF")
    settings = {"chat_template": "{{ messages }}"} if template else {}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    write_manifest(folder, {file.name: hash_file(file) for file in folder.iterdir()}, {})
    mark_complete(folder)
    return folder


def write_run(run: Path, *exports: str) -> Path:
    """A run folder with some of its exports."""
    run.mkdir()
    (run / layout.CONFIG).write_text(dump_yaml(Config()))
    for name in exports:
        write_model(run / name)
    return run


def install(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Pretend that these servers are installed, and no other."""

    def finder(name: str) -> Callable[[], list[str] | None]:
        return lambda: [f"/bin/{name}"] if name in names else None

    known = ENGINES.list()
    found = {name: replace(engine, find=finder(name)) for name, engine in known.items()}
    monkeypatch.setattr(ENGINES, "_variants", found)


def make(*overrides: str) -> ServeCommand:
    return make_command(compose_config(["data=files", "data.train=x", "model=tiny", *overrides]))


@pytest.mark.parametrize(
    ("installed", "engine"),
    [(["vllm", "transformers"], "vllm"), (["transformers"], "transformers"), (["vllm"], "vllm")],
)
def test_the_fastest_that_is_installed_serves_the_merged_model(
    installed: list[str], engine: str, tmp_path: Path, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, *installed)
    run = write_run(tmp_path / "mine", "merged")
    command = make(f"target.run={run}", f"serve.port={port}", "serve.arguments=[--seed,7]")
    assert command.engine.name == engine
    assert command.words[0] == f"/bin/{engine}"
    assert command.words[1] == str(run / "merged")
    assert command.words[-2:] == ["--seed", "7"]
    assert command.words[command.words.index("--port") + 1] == str(port)
    assert command.words[command.words.index("--host") + 1] == "127.0.0.1"
    assert command.model_id == ("mine" if engine == "vllm" else str(run / "merged"))
    text = describe(command)
    assert f"http://127.0.0.1:{port}/v1" in text
    assert "note" not in text


def test_what_was_trained_in_full_is_served(
    tmp_path: Path, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, "vllm")
    run = write_run(tmp_path / "mine", "model")
    assert make(f"target.run={run}", f"serve.port={port}").served.path == run / "model"
    base = make(f"target.base={run / 'model'}", f"serve.port={port}")
    assert (base.served.path, base.served.name) == (run / "model", "model")


def test_a_gguf_file_is_for_llama_cpp(
    tmp_path: Path, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, "vllm", "transformers", "llama_cpp")
    run = write_run(tmp_path / "mine", "merged", "export-gguf")
    file = run / "export-gguf" / "model.gguf"
    ports = f"serve.port={port}"
    for overrides in ([f"target.base={file}"], [f"target.run={run}", "serve.engine=llama_cpp"]):
        command = make(*overrides, ports)
        assert command.engine.name == "llama_cpp"
        assert command.served.path == file
        assert command.words[command.words.index("--model") + 1] == str(file)
    with pytest.raises(ConfigError, match=r"serve.engine=vllm reads a model folder, and .*gguf"):
        make(f"target.base={file}", "serve.engine=vllm", ports)
    with pytest.raises(ConfigError, match=r"serve.engine=llama_cpp reads a GGUF file, and"):
        make(f"target.base={run / 'merged'}", "serve.engine=llama_cpp", ports)


@pytest.mark.parametrize("engine", ENGINES.list())
def test_what_is_not_installed_is_named_with_its_command(
    engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch)
    run = write_run(tmp_path / "mine", "merged", "export-gguf")
    with pytest.raises(MissingPrerequisiteError, match="pip install") as raised:
        make(f"target.run={run}", f"serve.engine={engine}")
    assert ENGINES.find(engine).install in str(raised.value)
    with pytest.raises(MissingPrerequisiteError, match=r"vLLM: pip.*transformers serve: pip"):
        make(f"target.run={run}")


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        ([], ConfigError, "serve needs run=FOLDER"),
        (["target.run={run}", "target.base={run}"], ConfigError, "exclude each other"),
        (["target.checkpoint={run}"], ConfigError, "python -m llmtune export"),
        (["target.run={folder}"], ConfigError, "not a run folder"),
        (["target.run={run}"], ExportError, r"no model to serve yet: python -m llmtune export"),
        (["target.run={run}", "serve.engine=llama_cpp"], ExportError, "export=gguf"),
        (["target.base={folder}/none"], ConfigError, "no such folder or file"),
        (["target.base={folder}"], ConfigError, "no model folder"),
        (["target.base={classifier}"], ConfigError, "take predict"),
        (["target.base={torn}"], ConfigError, "config.json"),
        (["target.run={run}", "serve.engine=vlm"], ConfigError, "did you mean vllm"),
    ],
)
def test_what_cannot_be_served_is_refused_with_what_to_do(
    overrides: list[str],
    error: type[LlmtuneError],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    install(monkeypatch, "vllm", "transformers", "llama_cpp")
    places = {
        "folder": tmp_path,
        "run": write_run(tmp_path / "mine"),
        "classifier": write_model(tmp_path / "classifier", "RobertaForSequenceClassification"),
        "torn": tmp_path / "torn",
    }
    places["torn"].mkdir()
    (places["torn"] / "config.json").write_text('{"architectures": [')
    with pytest.raises(error, match=message):
        make(*(text.format(**places) for text in overrides))


def test_a_damaged_model_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "vllm", "llama_cpp")
    run = write_run(tmp_path / "mine", "merged", "export-gguf")
    (run / "merged" / "tokenizer_config.json").write_text("{}")
    with pytest.raises(LlmtuneError, match="tokenizer_config.json"):
        make(f"target.run={run}")
    file = run / "export-gguf" / "model.gguf"
    file.write_bytes(b"GGUX")
    for overrides in ([f"target.run={run}", "serve.engine=llama_cpp"], [f"target.base={file}"]):
        with pytest.raises(LlmtuneError, match="model.gguf"):
            make(*overrides)


@pytest.mark.parametrize("port", [-1, 0, 70000])
def test_a_port_that_there_is_not_is_refused(
    port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, "vllm")
    run = write_run(tmp_path / "mine", "merged")
    with pytest.raises(ConfigError, match="from 1 to 65535"):
        make(f"target.run={run}", f"serve.port={port}")


def test_a_port_that_is_taken_is_refused_before_the_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, "vllm")
    run = write_run(tmp_path / "mine", "merged")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        taken = listener.getsockname()[1]
        with pytest.raises(MissingPrerequisiteError, match=r"in use; take another serve.port="):
            make(f"target.run={run}", f"serve.port={taken}")
    with pytest.raises(MissingPrerequisiteError, match="take an address of this machine"):
        make(f"target.run={run}", "serve.host=192.0.2.1")


def test_who_can_reach_it_and_what_it_cannot_answer_is_said(
    tmp_path: Path, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, "vllm")
    model = write_model(tmp_path / "base", template=False)
    text = describe(make(f"target.base={model}", "serve.host=0.0.0.0", f"serve.port={port}"))
    assert "everybody who reaches 0.0.0.0" in text
    assert f"http://127.0.0.1:{port}/v1" in text
    assert "no chat template" in text


@pytest.mark.parametrize("engine", FOLDERS)
def test_code_of_the_model_runs_only_where_it_is_trusted(
    engine: str, tmp_path: Path, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, engine)
    run = write_run(tmp_path / "mine", "merged")
    ports = (f"target.run={run}", f"serve.port={port}")
    assert "--trust-remote-code" not in make(*ports).words
    assert "--trust-remote-code" in make(*ports, "model.trust_remote_code=true").words


def test_an_engine_is_found_where_it_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "vllm"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    assert ENGINES.find("vllm").find() == [str(program), "serve"]
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    monkeypatch.setenv("PATH", "/nowhere")
    assert ENGINES.find("vllm").find() is None
