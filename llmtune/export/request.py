"""The request of an export: what is exported, and to where."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from llmtune.export.progress import ProgressCallbacks
from llmtune.storage.signature import Signer


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportRequest:
    """The inputs and the output folder of an export."""

    base: Path
    """Model folder; for full fine-tuning, the trained model itself."""
    base_name: str
    """The name of the base in the model card."""
    adapter: Path | None
    """None for full fine-tuning."""
    run: Path | None
    """The run folder whose files describe the training."""
    output: Path
    zero: Path | None = None
    """DeepSpeed's own checkpoint, which holds the tensors; ``base`` only describes the model."""
    unpacked_from: Path | None = None
    """DeepSpeed's own checkpoint that ``adapter``, a folder of this start alone, was made from."""
    progress: ProgressCallbacks = field(default_factory=ProgressCallbacks)
    say: Callable[[str], None] = lambda _: None
    """Takes a line for the user."""
    signer: Signer | None = None
    """Signs what is published."""


_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def is_hub_id(name: str) -> bool:
    """Return whether this is a name on the hub, and no folder of this machine."""
    return bool(_HUB_ID.fullmatch(name)) and not Path(name).expanduser().exists()
