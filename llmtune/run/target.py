"""The target of ``export``, ``eval``, ``predict`` and ``chat``: a model on disk."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from llmtune.config.schema import Config
from llmtune.task.labels import Labels

#: Of a GPU's free memory; the rest is for activations and the cache of an answer.
WEIGHTS_SHARE = 0.75


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A model on disk."""

    config: Config
    """The run's configuration with the command line on top, or the command line's."""
    model_folder: Path
    """Weights, configuration, tokenizer."""
    adapter: Path | None
    run: Path | None
    base_name: str
    labels: Labels = field(default_factory=Labels)
    """The classes that the model tells apart; none for a language model."""
    code_asked_by: str | None = None
    """Origin of ``model.trust_remote_code=true`` in a stored configuration, which is not enough."""
