"""The keys of ``predict``, for ``llmtune predict``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(slots=True, kw_only=True)
class PredictConfig:
    """The rows of ``llmtune predict``, and how they are predicted."""

    input: Any = None
    """The rows: what ``data.train`` takes. Labels and answers that they hold are not looked at."""
    output: str | None = None
    """The JSON Lines file for the predictions; null, or ``-``, prints them."""
    batch_size: int | str = "auto"
    """Rows of a forward pass; ``auto`` takes at most 32 rows, and 8,192 tokens with the answers."""
    top_k: int | None = None
    """Classes in ``scores``, the most probable first; null is all."""
    max_new_tokens: int = 256
    """Longest answer, in tokens."""
    temperature: float = 0.0
    """Sampling temperature; 0 always takes the likeliest token."""
    top_p: float = 1.0
    """Sample from the likeliest tokens that together have this probability."""
    seed: int = 42
    """Seed of the sampled answers; each is drawn with the seed and the number of its row alone."""
