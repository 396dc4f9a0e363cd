"""``llmtune.train``: the whole job, in ranks of its own."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from llmtune.api.overrides import Override, compose_verb
from llmtune.api.run import Run, load_run
from llmtune.errors import (
    ERRORS_BY_CODE,
    EXIT_BY_SIGNAL,
    EXIT_DONE,
    LlmtuneError,
    StoppedError,
)

if TYPE_CHECKING:
    from llmtune.launch.supervise.child_command import ChildEnd
    from llmtune.launch.supervise.signals import StopRequests


def train(*overrides: Override, config_dir: str | None = None) -> Run:
    """Train, and export what was trained; the same call again resumes, or finds the run finished.

    The command line runs as a child process, which starts one process per accelerator. Nothing of
    torch or DeepSpeed is set up in this process, and it can train any number of times. What the
    command says goes to ``sys.stdout`` and ``sys.stderr``. Ctrl-C, or the interruption of a
    notebook's kernel, saves and stops; if this process ends, the training ends with it, and the
    next call goes on from the newest checkpoint.

    Args:
        overrides: Texts such as ``"model=llama3_8b"``, or mappings such as
            ``{"data.train": ["a.jsonl", "b.jsonl"]}``.
        config_dir: A folder with group files of your own, as ``--config-dir``.

    Returns:
        The finished run.

    Raises:
        ConfigError: With every problem of the configuration, before anything is started.
        StoppedError: A signal stopped it; the state was saved, and the same call resumes.
        LlmtuneError: Of the kind that the command line has an exit code for, with its message.
    """
    composed = compose_verb("train", overrides, config_dir)
    from llmtune.launch.supervise.child_command import run_child
    from llmtune.run.attempt import resolve_run_target

    folder = resolve_run_target(composed).folder.absolute()
    options = ["--config-dir", str(Path(config_dir).expanduser().resolve())] if config_dir else []
    with _remembered_stops() as stops:
        end = run_child(["train", *options, *composed.overrides], stops, shows_out=True)
    _check_end(end, folder)
    return load_run(folder)


@contextlib.contextmanager
def _remembered_stops() -> Iterator[StopRequests]:
    """Hand signals on to the child; Python has them in its main thread alone."""
    from llmtune.launch.supervise.signals import StopRequests, remember_stops

    if threading.current_thread() is not threading.main_thread():
        yield StopRequests()
        return
    with remember_stops() as stops:
        yield stops


def _check_end(end: ChildEnd, folder: Path) -> None:
    """Raise the error that an exit code stands for.

    Raises:
        LlmtuneError: Of the command's kind.
    """
    code = end.exit_code
    if code == EXIT_DONE:
        return
    if end.is_stopped:
        raise StoppedError(f"stopped; the same call goes on with {folder}")
    if code < 0 or code > EXIT_BY_SIGNAL:
        number = -code if code < 0 else code - EXIT_BY_SIGNAL
        raise LlmtuneError(
            f"the training was ended by signal {number}; the same call goes on from the newest"
            f" checkpoint of {folder}"
        )
    error = ERRORS_BY_CODE.get(code, LlmtuneError)
    raise error(end.error or f"the training ended with exit code {code}; see {folder}/train.log")
