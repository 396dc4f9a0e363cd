"""The keys of ``serve``, for ``llmtune serve``."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True, kw_only=True)
class ServeConfig:
    """The server that ``llmtune serve`` starts."""

    engine: str = "auto"
    """``vllm``, ``transformers`` or ``llama_cpp``.

    ``auto`` is ``llama_cpp`` for a GGUF file, and for a folder the first of ``vllm`` and
    ``transformers`` that is installed.
    """
    host: str = "127.0.0.1"
    """Address to listen on; others than the loopback can be reached by everybody on the network."""
    port: int = 8000
    """TCP port."""
    arguments: list[str] = field(default_factory=list)
    """More words for the server's own command line.

    An example is ``serve.arguments=[--tensor-parallel-size,4]``.
    """
