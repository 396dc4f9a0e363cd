"""``llmtune [VERB] [overrides]``: compose the configuration, run the verb, report errors.

An error becomes one screen of text and an exit code.
"""

import contextlib
import gc
import os
import signal
import sys
import traceback
from dataclasses import replace
from typing import NoReturn

from llmtune import __version__
from llmtune.cli.arguments import Arguments, parse
from llmtune.cli.dotenv_file import load_dotenv_file
from llmtune.cli.output import quiet_libraries
from llmtune.cli.verbs import VERBS, compose
from llmtune.errors import (
    EXIT_BY_SIGNAL,
    EXIT_DONE,
    EXIT_STOPPED,
    EXIT_UNEXPECTED,
    LlmtuneError,
    StoppedError,
)
from llmtune.launch.processes.descendants import end_now
from llmtune.launch.supervise.rank_report import to_user_error
from llmtune.launch.supervise.signals import (
    NOT_BEGUN,
    Interrupted,
    end_on_signals,
    raise_stops,
    received_stop,
)
from llmtune.process import END_SIGNALS, without_ignored
from llmtune.security.redaction import describe_secret_overrides, restrict_umask
from llmtune.security.terminal import to_terminal
from llmtune.security.working_folder import leave_working_folder

HELP = """llmtune {version}: fine-tune large language models on DeepSpeed

  python -m llmtune [VERB] [group=option ...] [key=value ...]

verbs
{verbs}

examples
  python -m llmtune                      LoRA on SmolLM2-135M, embedded data
  python -m llmtune model=llama3_8b data=alpaca data.train=my.jsonl
                                         your data, on all GPUs of this machine
  python -m llmtune +model=llama3_70b +zero=3
                                         '+group=x' and 'group=x' mean the same
  python -m llmtune data data.train=my.jsonl
                                         problems by line, masks, lengths
  python -m llmtune predict run=runs/NAME predict.input=rows.jsonl predict.output=out.jsonl
  python -m llmtune chat run=runs/NAME chat.prompt="..."
  python -m llmtune export run=runs/NAME export=safetensors
  python -m llmtune serve run=runs/NAME  a server with OpenAI's API, for vLLM, transformers
                                         or llama.cpp, whichever is installed
  python -m llmtune plan model=llama3_70b hardware=8xa100_80gb tuner=full
  python -m llmtune eval base=runs/NAME/merged
  python -m llmtune verify run=runs/NAME
  python -m llmtune report runs/a runs/b
                                         compare runs: a page, and a table
  python -m llmtune runs                 what is in runs/, with state, loss and size
  python -m llmtune sweep hparams_search=lora hparams_search.trials=20
                                         20 trainings with other settings, and the best
  deepspeed scripts/train.py model=llama3_70b zero=3
                                         the same training; torchrun works too

options
  --cfg job          print the composed configuration and stop
  --schema           print all keys as JSON Schema, for editors, and stop
  --config-dir DIR   look for group files (experiment/mine.yaml ...) in DIR too
  --json             plan, data, eval, predict, verify, doctor, report, runs, sweep: print one
                     JSON object
  --fix              doctor: fix what is safe to fix
  --mirror           verify: then copy to checkpoint.mirror what of a run is not there
  --version, --help

exit codes  0 done, 2 configuration, 3 does not fit, 4 data, 5 checkpoint, 6 export, 7 environment,
            75 train, predict or sweep stopped by a signal, saved, or out of memory under a
            launcher's ranks: the same command resumes,
            130, 143 and 129 any other verb ended by Ctrl-C (SIGINT), by SIGTERM,
            and with its terminal (SIGHUP)

Every key, its type, unit, default and meaning: docs/reference.md, or --schema;
every option: conf/."""

#: Overrides that show tracebacks even of what goes wrong before anything is composed.
_TRACES = ("debug=trace", "debug=fast", "trace=true")
_EXIT_BY_CTRL_C = EXIT_BY_SIGNAL + signal.SIGINT


class Command:
    """One command of a user."""

    def __init__(self, argv: list[str]):
        self._argv = argv
        self.trace = any(text.lstrip("+") in _TRACES for text in argv)
        """Show errors with their traceback; also set by the composed ``trace``."""

    def run(self) -> int:
        """Run the verb, or print what an option asks for; return the exit code."""
        if any(text in ("--help", "-h") for text in self._argv):
            verbs = "\n".join(f"  {name:<8} {verb.summary}" for name, verb in VERBS.items())
            _print(HELP.format(version=__version__, verbs=verbs))
            return EXIT_DONE
        if "--version" in self._argv:
            _print(f"llmtune {__version__}")
            return EXIT_DONE
        if "--schema" in self._argv:
            from llmtune.cli.reference.schema import to_text

            _print(to_text())
            return EXIT_DONE
        left_out = load_dotenv_file()
        arguments = parse(self._argv, VERBS)
        _say_once(describe_secret_overrides(arguments.overrides))
        if left_out:
            _say_once(
                "note: .env: only keys and tokens are taken from it, and not"
                f" {', '.join(left_out)}; set them in the environment"
            )
        if arguments.show_config:
            _print(compose(VERBS[arguments.verb], arguments).yaml.rstrip())
            return EXIT_DONE
        return self._run_verb(arguments)

    def _run_verb(self, arguments: Arguments) -> int:
        from llmtune.track.console import Console
        from llmtune.track.status import QUIET_AT_START_SECONDS, Status
        from llmtune.track.webhook import hide_address

        verb = VERBS[arguments.verb]
        console = Console(sys.stderr)
        with Status(console, "loading the libraries", quiet_seconds=QUIET_AT_START_SECONDS):
            options = arguments.options
            with raise_stops(NOT_BEGUN) if verb.trains else contextlib.nullcontext():
                if verb.trains:
                    from llmtune.cli.train import join_launcher

                    options = replace(options, launcher=join_launcher())
                composed = compose(verb, arguments)
                hide_address(composed.config.tracker.webhook)
            self.trace = self.trace or composed.config.trace
            if verb.loads_libraries:
                quiet_libraries()
        return verb.run(composed, options)


def main(argv: list[str] | None = None) -> int:
    """Run one command.

    Returns:
        The exit code of the contract.
    """
    command = Command(sys.argv[1:] if argv is None else argv)
    try:
        return command.run()
    except StoppedError as error:
        return _report(error, error.exit_code, command.trace)
    except KeyboardInterrupt as error:
        by_signal = error.exit_code if isinstance(error, Interrupted) else _EXIT_BY_CTRL_C
        return _report(error, by_signal, command.trace)
    except Exception as error:
        number = received_stop()
        if number is not None:
            # Sent to the whole group, the signal has ended a worker too, and its end was noticed
            # first.
            stop = Interrupted(number)
            return _report(stop, stop.exit_code, command.trace)
        known = to_user_error(error)
        code = known.exit_code if known else EXIT_UNEXPECTED
        return _report(known or error, code, command.trace)


def run(argv: list[str] | None = None) -> NoReturn:
    """Run :func:`main` as the program ``llmtune``, which signals end, and exit quickly."""
    leave_working_folder()
    restrict_umask()
    ending = end_on_signals()
    code = main(argv)
    for number in without_ignored(END_SIGNALS):
        signal.signal(number, lambda *_: os._exit(code))
    if ending.received:
        sys.stdout.flush()
        end_now(code)
    # At its end Python visits all objects of torch and transformers several times, which takes a
    # second and is of no use.
    gc.freeze()
    sys.exit(code)


def _report(error: BaseException, code: int, trace: bool) -> int:
    if trace:
        text = "".join(traceback.format_exception(error)).rstrip()
    elif code == EXIT_STOPPED:
        text = str(error)
    elif isinstance(error, LlmtuneError):
        text = f"error: {error}"
    elif isinstance(error, KeyboardInterrupt):
        text = str(error) or "ended by SIGINT"
    else:
        text = f"error: {type(error).__name__}: {error}\nAdd debug=trace for the traceback."
    sys.stderr.write(to_terminal(text + "\n"))
    return code


def _say_once(text: str) -> None:
    """Write a note to standard error; of ranks that a launcher started, only the first does."""
    if text and os.environ.get("RANK", "0") == "0":
        sys.stderr.write(to_terminal(text + "\n"))


def _print(text: str) -> None:
    sys.stdout.write(to_terminal(text + "\n"))
