"""The command line, taken apart: a verb, overrides, and the few options."""

from __future__ import annotations

import difflib
from collections.abc import Collection
from dataclasses import dataclass, field

from llmtune.errors import ConfigError

#: What launchers add to the command line of every rank.
LAUNCHER_OPTIONS = ("--local_rank", "--local-rank")


@dataclass(slots=True, kw_only=True)
class Arguments:
    """The command line, taken apart."""

    verb: str = "train"
    overrides: list[str] = field(default_factory=list)
    config_dir: str | None = None
    show_config: bool = False
    as_json: bool = False
    fix: bool = False
    mirror: bool = False


def parse(argv: list[str], verbs: Collection[str]) -> Arguments:
    """Verb, overrides and options; launchers' ``--local_rank`` is taken off.

    Args:
        verbs: Those that there are.

    Raises:
        ConfigError: An unknown verb or option, with the nearest known one.
    """
    arguments = Arguments()
    rest = list(argv)
    # Launchers put it before everything else.
    while rest and rest[0].partition("=")[0] in LAUNCHER_OPTIONS:
        _take_value(rest)
    if rest and not rest[0].startswith(("-", "+", "~")) and "=" not in rest[0]:
        arguments.verb = rest.pop(0)
        if arguments.verb not in verbs:
            close = difflib.get_close_matches(arguments.verb, verbs, n=1)
            hint = f": did you mean {close[0]!r}?" if close else f"; there are {', '.join(verbs)}"
            raise ConfigError(f"unknown verb {arguments.verb!r}{hint}")
    while rest:
        name, _, value = rest[0].partition("=")
        if name in LAUNCHER_OPTIONS:
            _take_value(rest)
            continue
        text = rest.pop(0)
        if not text.startswith("-"):
            arguments.overrides.append(text)
        elif name == "--config-dir" and (value or rest):
            arguments.config_dir = value or rest.pop(0)
        elif name == "--cfg" and (value or rest):
            what = value or rest.pop(0)
            if what != "job":
                raise ConfigError(f"--cfg {what}: only 'job' is known")
            arguments.show_config = True
        elif text == "--json":
            arguments.as_json = True
        elif text == "--mirror" and arguments.verb == "verify":
            arguments.mirror = True
        elif text == "--fix" and arguments.verb == "doctor":
            arguments.fix = True
        elif text in ("-m", "--multirun"):
            raise ConfigError(
                f"{text}: a command is one run. Start one command a value, such as for r in 8 16;"
                " do python -m llmtune tuner.lora_r=$r run_name=r$r; done, or a W&B sweep as in"
                " conf/sweep/lora.yaml"
            )
        else:
            from llmtune.config.foreign import meant_by
            from llmtune.config.keys import known_keys

            meant = meant_by(name.lstrip("-"), known_keys())
            raise ConfigError(
                f"unknown option {text!r}{meant or ';'} llmtune takes KEY=VALUE overrides, see"
                " --help"
            )
    return arguments


def _take_value(rest: list[str]) -> None:
    """Take an option and its value off the beginning."""
    if "=" not in rest.pop(0) and rest:
        rest.pop(0)
