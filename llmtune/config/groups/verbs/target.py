"""``target``: what the verbs on finished work read."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True, kw_only=True)
class TargetConfig:
    """What ``export``, ``eval``, ``predict``, ``chat`` and ``verify`` work on.

    Each has a short spelling (:data:`llmtune.config.keys.ALIASES`): ``run=``, ``checkpoint=``,
    ``base=`` and ``adapter=``.
    """

    run: str | None = None
    """Run folder: its trained model, or its newest checkpoint."""
    checkpoint: str | None = None
    """Checkpoint folder, of llmtune or of DeepSpeed."""
    base: str | None = None
    """Base model, instead of ``model.name_or_path``."""
    adapter: str | None = None
    """Adapter folder to put on ``base``."""
