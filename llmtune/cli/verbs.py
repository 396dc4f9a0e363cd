"""The table of verbs. Each imports its libraries only when it is run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmtune.errors import ConfigError

if TYPE_CHECKING:
    from llmtune.cli.arguments import Arguments, Options
    from llmtune.config.composed import Composed

#: Takes the configuration and the verb's options, and returns the exit code of the contract.
RunVerb = Callable[["Composed", "Options"], int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Verb:
    """One verb of the command line."""

    run: RunVerb
    summary: str
    """The line of ``--help``."""
    trains: bool = False
    """It trains: a signal means that nothing has begun yet, and the same command starts again.

    The libraries are imported only when the ranks have been started.
    """
    plans: bool = False
    """It plans a training that may never take place, so that no data has to be named."""
    loads_libraries: bool = True
    """transformers is imported, and kept off the console, before the verb runs."""


def compose(verb: Verb, arguments: Arguments) -> Composed:
    """Compose the configuration of a command, with the rules that its verb holds to.

    Raises:
        ConfigError: With every problem that was found.
    """
    from llmtune.config.compose import compose_config

    if not (verb.trains or verb.plans):
        return compose_config(arguments.overrides, arguments.options.config_dir)
    from llmtune.run.settings import find_problems

    composed = compose_config(
        arguments.overrides,
        arguments.options.config_dir,
        planning=verb.plans,
        more_rules=find_problems,
    )
    if any(key.split(".")[0] == "hparams_search" for key in composed.keys):
        raise ConfigError(
            f"{arguments.verb} is one run, and does not read hparams_search: take the verb sweep,"
            " as in python -m llmtune sweep hparams_search=lora"
        )
    return composed


def _train(composed: Composed, options: Options) -> int:
    from llmtune.cli.train import run

    return run(composed, options)


def _plan(composed: Composed, options: Options) -> int:
    from llmtune.cli.plan import run

    return run(composed, options)


def _data(composed: Composed, options: Options) -> int:
    from llmtune.cli.data import run

    return run(composed, options)


def _export(composed: Composed, options: Options) -> int:
    from llmtune.cli.export import run

    return run(composed, options)


def _eval(composed: Composed, options: Options) -> int:
    from llmtune.cli.eval import run

    return run(composed, options)


def _predict(composed: Composed, options: Options) -> int:
    from llmtune.cli.predict import run

    return run(composed, options)


def _chat(composed: Composed, options: Options) -> int:
    from llmtune.cli.chat import run

    return run(composed, options)


def _serve(composed: Composed, options: Options) -> int:
    from llmtune.cli.serve import run

    return run(composed, options)


def _verify(composed: Composed, options: Options) -> int:
    from llmtune.cli.folders.verify import run

    return run(composed, options)


def _report(composed: Composed, options: Options) -> int:
    from llmtune.cli.folders.report import run

    return run(composed, options)


def _runs(composed: Composed, options: Options) -> int:
    from llmtune.cli.folders.runs import run

    return run(composed, options)


def _sweep(composed: Composed, options: Options) -> int:
    from llmtune.cli.sweep import run

    return run(composed, options)


def _doctor(composed: Composed, options: Options) -> int:
    from llmtune.cli.doctor import run

    return run(composed, options)


VERBS = {
    "train": Verb(
        run=_train,
        summary=("plan, start one process per accelerator, train, resume, export (the default)"),
        trains=True,
        loads_libraries=False,
    ),
    "plan": Verb(
        run=_plan,
        summary=(
            "memory and speed of every placement, on this machine or a named one"
            " (hardware=8xa100_80gb)"
        ),
        plans=True,
    ),
    "data": Verb(
        run=_data,
        summary=(
            "check the data and show what the model will see: tokens, masks, lengths, packing"
        ),
    ),
    "export": Verb(
        run=_export,
        summary="a run, checkpoint or adapter becomes a model folder that other tools load",
    ),
    "merge": Verb(run=_export, summary="the same as export"),
    "eval": Verb(run=_eval, summary="held-out loss and metrics of a run, checkpoint or model"),
    "predict": Verb(
        run=_predict,
        summary="what a run, checkpoint or model says of every row of a file: labels, scores, text",
    ),
    "chat": Verb(run=_chat, summary="talk to a run, checkpoint or model"),
    "serve": Verb(
        run=_serve,
        summary="start a server with OpenAI's API for what was trained: serve run=runs/NAME",
        loads_libraries=False,
    ),
    "verify": Verb(
        run=_verify,
        summary="check checkpoints, adapters and exports against their manifests, every byte",
        loads_libraries=False,
    ),
    "report": Verb(
        run=_report,
        summary="a page about a run folder, or one that compares several: report runs/a runs/b",
        loads_libraries=False,
    ),
    "runs": Verb(
        run=_runs,
        summary="list run folders with state, step, loss and size: runs [FOLDER]",
        loads_libraries=False,
    ),
    "sweep": Verb(
        run=_sweep,
        summary="train with many settings, a run folder each, and name the best",
        loads_libraries=False,
    ),
    "doctor": Verb(
        run=_doctor,
        summary="what on this machine would stop a run, and the command that fixes it; --fix",
    ),
}
