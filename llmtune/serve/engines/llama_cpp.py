"""llama.cpp's server through ``llama-cpp-python``: a GGUF file, also on small machines."""

from __future__ import annotations

import importlib.util
import sys

from llmtune.config.groups.verbs.serve import ServeConfig
from llmtune.serve.engine import ENGINES, Engine, Served

#: The package, and what its server imports beyond it.
_PACKAGES = ("llama_cpp", "fastapi", "uvicorn", "sse_starlette", "starlette_context")


def _find() -> list[str] | None:
    if any(importlib.util.find_spec(package) is None for package in _PACKAGES):
        return None
    return [sys.executable, "-m", "llama_cpp.server"]


def _describe_arguments(served: Served, settings: ServeConfig) -> list[str]:
    words = ["--model", str(served.path), "--model_alias", served.name]
    # 0: the context that the file names, instead of 2,048 tokens.
    return [*words, "--host", settings.host, "--port", str(settings.port), "--n_ctx", "0"]


ENGINES.register(
    Engine(
        name="llama_cpp",
        title="llama.cpp",
        reads_gguf=True,
        find=_find,
        install='pip install "llama-cpp-python[server]"',
        describe_arguments=_describe_arguments,
        model_id=lambda served: served.name,
    )
)
