"""The verbs: what each does, and how it is loaded.

A verb imports its libraries only when it is asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from llmtune.cli.arguments import Arguments

#: Takes the command line, returns the exit code of the contract.
RunVerb = Callable[[Arguments], int]


def _load_train() -> RunVerb:
    from llmtune.cli.train import main

    return main


def _load_plan() -> RunVerb:
    from llmtune.cli.plan import main

    return main


def _load_data() -> RunVerb:
    from llmtune.cli.data import main

    return main


def _load_export() -> RunVerb:
    from llmtune.cli.export import main

    return main


def _load_eval() -> RunVerb:
    from llmtune.cli.eval import main

    return main


def _load_chat() -> RunVerb:
    from llmtune.cli.chat import main

    return main


def _load_verify() -> RunVerb:
    from llmtune.cli.verify import main

    return main


def _load_doctor() -> RunVerb:
    from llmtune.cli.doctor import main

    return main


@dataclass(frozen=True, slots=True)
class Verb:
    """One verb."""

    load: Callable[[], RunVerb]
    summary: str
    """For ``--help``."""


VERBS = {
    "train": Verb(
        _load_train, "plan, start one process per accelerator, train, resume, export (the default)"
    ),
    "plan": Verb(
        _load_plan,
        "memory and speed of every placement, on this machine or a named one"
        " (hardware=8xa100_80gb)",
    ),
    "data": Verb(
        _load_data,
        "check the data and show what the model will see: tokens, masks, lengths, packing",
    ),
    "export": Verb(
        _load_export, "a run, checkpoint or adapter becomes a model folder that other tools load"
    ),
    "merge": Verb(_load_export, "the same as export"),
    "eval": Verb(_load_eval, "held-out loss and perplexity of a run, checkpoint or model"),
    "chat": Verb(_load_chat, "talk to a run, checkpoint or model"),
    "verify": Verb(
        _load_verify, "check checkpoints, adapters and exports against their manifests, every byte"
    ),
    "doctor": Verb(
        _load_doctor, "what on this machine would stop a run, and the command that fixes it; --fix"
    ),
}
