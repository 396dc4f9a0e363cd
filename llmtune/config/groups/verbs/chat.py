"""The keys of ``chat``, for ``llmtune chat``."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True, kw_only=True)
class ChatConfig:
    """Prompts and sampling of ``llmtune chat``."""

    prompt: str | None = None
    """Answer this prompt and end; the default is a conversation on the terminal."""
    system: str | None = None
    """System message."""
    max_new_tokens: int = 256
    """Longest answer, in tokens."""
    temperature: float = 0.0
    """Sampling temperature; 0 always takes the likeliest token."""
