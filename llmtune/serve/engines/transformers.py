"""``transformers serve``: a model folder on anything that torch runs on."""

from __future__ import annotations

import importlib.util
import sys

from llmtune.config.groups.verbs.serve import ServeConfig
from llmtune.serve.engine import ENGINES, Engine, Served

#: What ``transformers serve`` imports beyond transformers itself.
_PACKAGES = ("fastapi", "openai", "pydantic", "uvicorn")


def _find() -> list[str] | None:
    if any(importlib.util.find_spec(package) is None for package in _PACKAGES):
        return None
    # As a module, because the console script may belong to another environment.
    return [sys.executable, "-m", "transformers.cli.transformers", "serve"]


def _describe_arguments(served: Served, settings: ServeConfig) -> list[str]:
    words = [str(served.path), "--host", settings.host, "--port", str(settings.port)]
    return words + (["--trust-remote-code"] if served.trust_remote_code else [])


ENGINES.register(
    Engine(
        name="transformers",
        title="transformers serve",
        reads_gguf=False,
        find=_find,
        install='pip install "llmtune[serve]"',
        describe_arguments=_describe_arguments,
        # A server that was given a model answers for no other name than the one it was given.
        model_id=lambda served: str(served.path),
    )
)
