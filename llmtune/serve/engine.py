"""The registry of servers: each says whether it is installed, and how it is started."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from llmtune.config.groups.verbs.serve import ServeConfig
from llmtune.registry import Registry

AUTO = "auto"


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """A model that a server answers for."""

    path: Path
    """A model folder, or a GGUF file."""
    name: str
    """The run's name, or that of the folder or file."""
    trust_remote_code: bool
    """The user lets code of the model's folder run."""
    has_chat_template: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """A server with OpenAI's API."""

    name: str
    """Its value of ``serve.engine``."""
    title: str
    """Its name for people."""
    reads_gguf: bool
    """It serves a GGUF file; else a folder that transformers loads."""
    find: Callable[[], list[str] | None]
    """Returns the words that start it; None where it is not installed."""
    install: str
    """The command that installs it."""
    describe_arguments: Callable[[Served, ServeConfig], list[str]]
    """Returns the words behind those of ``find``, without ``serve.arguments``."""
    model_id: Callable[[Served], str]
    """Returns the name that a request has to give as ``model``."""
    metrics: str | None = None
    """Path of its Prometheus metrics."""


ENGINES: Registry[Engine] = Registry(
    "serve.engine", "llmtune.serve.engines", also=(AUTO,), interface=Engine
)
