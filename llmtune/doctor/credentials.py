"""Findings about tokens of the model hub and W&B: whether they are set, never their values."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from llmtune.doctor.finding import Finding


def inspect_credentials() -> Iterator[Finding]:
    """Report which tokens are set, in the environment or in files of the tools that use them."""
    hub = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser() / "token"
    present = "HF_TOKEN" in os.environ or hub.is_file()
    yield Finding(
        what="HF_TOKEN",
        state="ok",
        message="present" if present else "absent: gated models (Llama) cannot be downloaded",
    )
    netrc = Path("~/.netrc").expanduser()
    present = "WANDB_API_KEY" in os.environ or (
        netrc.is_file() and "wandb" in netrc.read_text(errors="replace")
    )
    yield Finding(
        what="WANDB_API_KEY",
        state="ok",
        message="present" if present else "absent: tracker=wandb works offline",
    )
