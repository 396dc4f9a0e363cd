"""``vllm serve``: a model folder on GPUs, many requests at once."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from llmtune.config.groups.verbs.serve import ServeConfig
from llmtune.serve.engine import ENGINES, Engine, Served


def _find() -> list[str] | None:
    """Find the command beside this Python, which may not be on PATH, or on PATH."""
    own = shutil.which("vllm", path=str(Path(sys.executable).parent))
    found = own or shutil.which("vllm")
    return [found, "serve"] if found else None


def _describe_arguments(served: Served, settings: ServeConfig) -> list[str]:
    words = [str(served.path), "--served-model-name", served.name]
    words += ["--host", settings.host, "--port", str(settings.port)]
    # vLLM would take sampling defaults from the model's generation_config.json, and chat does not.
    words += ["--generation-config", "vllm"]
    return words + (["--trust-remote-code"] if served.trust_remote_code else [])


ENGINES.register(
    Engine(
        name="vllm",
        title="vLLM",
        reads_gguf=False,
        find=_find,
        install="pip install vllm",
        describe_arguments=_describe_arguments,
        model_id=lambda served: served.name,
        metrics="/metrics",
    )
)
