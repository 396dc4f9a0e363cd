"""The keys of ``target``: the run, checkpoint or model that a verb reads."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True, kw_only=True)
class TargetConfig:
    """The run, checkpoint or model that verbs such as ``export`` and ``predict`` work on.

    Each key has a short name (:data:`llmtune.config.keys.ALIASES`): ``run=``, ``checkpoint=``,
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
