"""Parse the command line: a verb, overrides, and the few options."""

from __future__ import annotations

import difflib
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from llmtune.errors import ConfigError

if TYPE_CHECKING:
    from llmtune.launch.launchers.launcher import Launcher

#: What launchers add to the command line of every rank.
LAUNCHER_OPTIONS = ("--local_rank", "--local-rank")

#: Verbs behind which folders stand without a key.
FOLDER_VERBS = ("report", "runs")
_OUTPUT = "output="


@dataclass(slots=True, kw_only=True)
class Options:
    """The options of a verb."""

    config_dir: str | None = None
    """``--config-dir``: a folder of the user's own group files."""
    as_json: bool = False
    """``--json``: print one JSON object."""
    fix: bool = False
    """``doctor --fix``: fix what is safe to fix."""
    mirror: bool = False
    """``verify --mirror``: copy to ``checkpoint.mirror`` what is not there."""
    folders: tuple[str, ...] = ()
    """The run folders that ``report`` and ``runs`` are given."""
    launcher: Launcher | None = None
    """The launcher that started this process as a rank; None where llmtune starts the ranks.

    It is not an option.
    """


@dataclass(slots=True, kw_only=True)
class Arguments:
    """The parsed command line."""

    verb: str = "train"
    overrides: list[str] = field(default_factory=list)
    show_config: bool = False
    """``--cfg job``: print the composed configuration and stop."""
    options: Options = field(default_factory=Options)


def parse(argv: list[str], verbs: Collection[str]) -> Arguments:
    """Parse the verb, the overrides and the options; launchers' ``--local_rank`` is dropped.

    Args:
        verbs: Names of the known verbs.

    Raises:
        ConfigError: An unknown verb or option, with the nearest known one.
    """
    arguments = Arguments()
    rest = list(argv)
    # Launchers put their option before everything else.
    while rest and rest[0].partition("=")[0] in LAUNCHER_OPTIONS:
        _take_value(rest)
    if rest and not rest[0].startswith(("-", "+", "~")) and "=" not in rest[0]:
        arguments.verb = rest.pop(0)
        _check_verb(arguments.verb, verbs)
    while rest:
        if rest[0].partition("=")[0] in LAUNCHER_OPTIONS:
            _take_value(rest)
        elif rest[0].startswith("-"):
            _read_option(arguments, rest)
        elif arguments.verb in FOLDER_VERBS and _is_folder(rest[0]):
            arguments.options.folders += (rest.pop(0),)
        else:
            arguments.overrides.append(_expand(rest.pop(0), arguments.verb))
    return arguments


def _expand(override: str, verb: str) -> str:
    """Write ``output=`` of ``report`` in full; elsewhere it may be meant for ``output_dir=``."""
    is_short = verb == "report" and override.startswith(_OUTPUT)
    return f"report.{override}" if is_short else override


def _is_folder(text: str) -> bool:
    """Tell an existing folder, and any text that cannot be an override, from overrides."""
    if text.startswith("+") or not text:
        return False
    return "=" not in text or Path(text).is_dir()


def _check_verb(verb: str, verbs: Collection[str]) -> None:
    if verb in verbs:
        return
    close = difflib.get_close_matches(verb, verbs, n=1)
    hint = f": did you mean {close[0]!r}?" if close else f"; there are {', '.join(verbs)}"
    raise ConfigError(f"unknown verb {verb!r}{hint}")


def _read_option(arguments: Arguments, rest: list[str]) -> None:
    """Take an option, with its value if it has one, off the beginning of ``rest``."""
    text = rest.pop(0)
    name, _, value = text.partition("=")
    options = arguments.options
    if name == "--config-dir" and (value or rest):
        options.config_dir = value or rest.pop(0)
    elif name == "--cfg" and (value or rest):
        shown = value or rest.pop(0)
        if shown != "job":
            raise ConfigError(f"--cfg {shown}: only 'job' is known")
        arguments.show_config = True
    elif text == "--json":
        options.as_json = True
    elif text == "--mirror" and arguments.verb == "verify":
        options.mirror = True
    elif text == "--fix" and arguments.verb == "doctor":
        options.fix = True
    else:
        raise ConfigError(_explain_unknown(text))


def _explain_unknown(option: str) -> str:
    if option in ("-m", "--multirun"):
        return (
            f"{option}: a command is one run, and sweep is the verb for many: python -m llmtune"
            " sweep hparams_search=lora, or hparams_search.sampler=grid"
            " hparams_search.space.tuner.lora_r.choices=[8,16] for every value; or a W&B sweep as"
            " in conf/sweep/lora.yaml"
        )
    from llmtune.config.foreign import meant_by
    from llmtune.config.keys import known_keys

    meant = meant_by(option.partition("=")[0].lstrip("-"), known_keys())
    return f"unknown option {option!r}{meant or ';'} llmtune takes KEY=VALUE overrides, see --help"


def _take_value(rest: list[str]) -> None:
    """Take an option and its value off the beginning."""
    if "=" not in rest.pop(0) and rest:
        rest.pop(0)
