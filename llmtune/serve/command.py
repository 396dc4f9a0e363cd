"""Find what is served and by which server, and write its command line."""

from __future__ import annotations

import errno
import socket
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llmtune.config.composed import Composed
from llmtune.config.groups.verbs.serve import ServeConfig
from llmtune.config.stored import load_config
from llmtune.errors import ConfigError, ExportError, MissingPrerequisiteError
from llmtune.serve.engine import AUTO, ENGINES, Engine, Served
from llmtune.storage import layout
from llmtune.storage.manifest import check_undamaged, is_complete
from llmtune.storage.plain_json import parse_json

_GGUF = ".gguf"
_TEMPLATE_FILE = "chat_template.jinja"
_TOKENIZER = "tokenizer_config.json"
_CONFIG = "config.json"
_LAST_PORT = 65535
#: How a class of transformers is named that writes text.
_WRITES_TEXT = ("ForCausalLM", "ForConditionalGeneration", "LMHeadModel")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeCommand:
    """A server, ready to be started."""

    engine: Engine
    served: Served
    words: list[str]
    """Its command line."""
    settings: ServeConfig

    @property
    def address(self) -> str:
        """Return the base URL for a client of OpenAI's API."""
        host = self.settings.host
        reached = "127.0.0.1" if host in ("0.0.0.0", "::", "") else host
        return f"http://{f'[{reached}]' if ':' in reached else reached}:{self.settings.port}/v1"

    @property
    def model_id(self) -> str:
        """Return the name that a request has to give as ``model``."""
        return self.engine.model_id(self.served)


def make_command(composed: Composed) -> ServeCommand:
    """Find out what is started for a command line.

    Raises:
        ConfigError: Nothing that can be served is named, or the engine does not read it.
        CheckpointError: The model is damaged.
        ExportError: The run has no export yet that the engine reads.
        MissingPrerequisiteError: The engine is not installed, or the port is taken.
    """
    settings = composed.config.serve
    named = None if settings.engine == AUTO else ENGINES.find(settings.engine)
    name, path = _find_model(composed, named)
    is_gguf = _is_gguf(path)
    if named is not None and named.reads_gguf != is_gguf:
        reads = "a GGUF file" if named.reads_gguf else "a model folder"
        raise ConfigError(f"serve.engine={named.name} reads {reads}, and {path} is none")
    engine, start = _choose_engine(named, is_gguf)
    trusts = composed.config.model.trust_remote_code
    served = Served(
        path=path,
        name=name,
        trust_remote_code=trusts,
        has_chat_template=is_gguf or _has_chat_template(path),
    )
    _check_port(settings)
    words = [*start, *engine.describe_arguments(served, settings), *settings.arguments]
    return ServeCommand(
        engine=engine, served=served, words=words, settings=replace(settings, engine=engine.name)
    )


def _find_model(composed: Composed, engine: Engine | None) -> tuple[str, Path]:
    """Return the name and the place of what is served, whole and of a model that writes text."""
    target = composed.config.target
    if target.checkpoint or target.adapter:
        raise ConfigError(
            "serve takes run=FOLDER or base=FOLDER: write a checkpoint or an adapter as a model"
            " first, with python -m llmtune export"
        )
    if target.run and target.base:
        raise ConfigError("run= and base= exclude each other")
    if target.run:
        run = Path(target.run).expanduser().absolute()
        name, path = run.name, _find_export(run, engine)
        _check_path(path)
        return name, path
    if not target.base:
        raise ConfigError("serve needs run=FOLDER, or base=FOLDER with a model or a .gguf file")
    path = Path(target.base).expanduser().absolute()
    if not path.exists():
        raise ConfigError(
            f"base={target.base}: no such folder or file; serve takes a model on this disk"
        )
    _check_path(path)
    return path.name.removesuffix(_GGUF), path


def _find_export(run: Path, engine: Engine | None) -> Path:
    """Find the export of a run that the engine reads.

    Raises:
        ConfigError: It is no run folder.
        ExportError: There is no complete export.
    """
    load_config(run / layout.CONFIG)
    if engine is not None and engine.reads_gguf:
        folder = layout.export_folder(run, "gguf")
        files = sorted(folder.glob(f"*{_GGUF}")) if is_complete(folder) else []
        if not files:
            raise ExportError(
                f"{run} has no GGUF file yet: python -m llmtune export run={run} export=gguf"
            )
        return files[0]
    for folder in (layout.export_folder(run, "safetensors"), run / layout.MODEL):
        if is_complete(folder):
            return folder
    raise ExportError(
        f"{run} has no model to serve yet: python -m llmtune export run={run} writes what was"
        " trained, or the newest checkpoint"
    )


def _is_gguf(path: Path) -> bool:
    return path.is_file() and path.suffix.lower() == _GGUF


def _check_path(path: Path) -> None:
    """Check that a folder is undamaged, and a model that writes text.

    Raises:
        CheckpointError: It is damaged.
        ConfigError: It is no model folder, or a classifier.
    """
    folder = path.parent if _is_gguf(path) else path
    if (folder / layout.MANIFEST).is_file():
        check_undamaged(folder)
    if _is_gguf(path):
        return
    if not (path / _CONFIG).is_file():
        raise ConfigError(f"{path} is no model folder: it has no {_CONFIG}")
    classes = _read(path / _CONFIG).get("architectures") or []
    if classes and not any(str(name).endswith(_WRITES_TEXT) for name in classes):
        raise ConfigError(
            f"serve needs a model that writes text, and {path} is a {classes[0]}; take predict,"
            " with predict.input=FILE"
        )


def _choose_engine(named: Engine | None, is_gguf: bool) -> tuple[Engine, list[str]]:
    """Choose the engine that was named, or the first that is installed.

    Raises:
        MissingPrerequisiteError: It is not installed, or none is.
    """
    # The table is sorted by name, and vLLM is the faster one.
    able = sorted(
        (engine for engine in ENGINES.list().values() if engine.reads_gguf == is_gguf),
        key=lambda engine: engine.name != "vllm",
    )
    wanted = [named] if named is not None else able
    for engine in wanted:
        start = engine.find()
        if start is not None:
            return engine, start
    hints = ", or ".join(f"{engine.title}: {engine.install}" for engine in wanted)
    raise MissingPrerequisiteError(f"no server is installed that reads this model; {hints}")


def _has_chat_template(folder: Path) -> bool:
    if (folder / _TEMPLATE_FILE).is_file():
        return True
    settings = folder / _TOKENIZER
    return settings.is_file() and bool(_read(settings).get("chat_template"))


def _read(file: Path) -> dict[str, Any]:
    """Read an object from a JSON file.

    Raises:
        ConfigError: It is none.
    """
    try:
        found = parse_json(file.read_bytes())
    except ValueError as error:
        raise ConfigError(f"{file}: {error}") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{file}: this is no JSON object")
    return found


def _check_port(settings: ServeConfig) -> None:
    """Check that the address can be listened on, before the model is loaded.

    Raises:
        ConfigError: There is no such port.
        MissingPrerequisiteError: Another program listens there, or the address is none of this
            machine's.
    """
    if not 1 <= settings.port <= _LAST_PORT:
        raise ConfigError(f"serve.port={settings.port}: a TCP port is from 1 to {_LAST_PORT}")
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((settings.host, settings.port))
        except OSError as error:
            of_port = error.errno in (errno.EADDRINUSE, errno.EACCES)
            hint = "take another serve.port=" if of_port else "take an address of this machine"
            raise MissingPrerequisiteError(
                f"serve.host={settings.host} serve.port={settings.port}: {error.strerror}; {hint}"
            ) from error
