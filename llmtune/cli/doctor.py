"""``doctor``: find what on this machine would stop a run, and the command that fixes it."""

import itertools
import sys
from collections.abc import Iterator

from llmtune.cli.arguments import Options
from llmtune.cli.output import stdout_for_us
from llmtune.config.cache_folder import locate_cache
from llmtune.config.composed import Composed
from llmtune.doctor.finding import Finding
from llmtune.doctor.machine import inspect_machine
from llmtune.errors import EXIT_DONE, MissingPrerequisiteError
from llmtune.launch.launchers.environment import use_own_ninja
from llmtune.security.terminal import to_json_line
from llmtune.track.console import Console
from llmtune.track.service import SERVICES
from llmtune.track.status import Status
from llmtune.units import counted

MARKS = {"ok": "ok  ", "note": "note", "bad": "BAD "}
FIXED = "fixed"


def inspect_trackers() -> Iterator[Finding]:
    """Tell which experiment trackers could be used, and what would install the others."""
    installed, missing = [], []
    for service in SERVICES.list().values():
        if wanted := service.find_missing():
            missing.append(f"{service.name} (pip install '{wanted}')")
        else:
            installed.append(service.name)
    message = ", ".join(installed) or "none is installed"
    if missing:
        message += f"; not installed: {', '.join(missing)}"
    yield Finding(what="trackers", state="ok", message=message)


def run(composed: Composed, options: Options) -> int:
    """Print every finding; the exit code is 7 if something would stop a run and was not fixed."""
    use_own_ninja()
    rows, bad = [], 0
    with stdout_for_us() as write:
        cache = locate_cache(composed.config.paths)
        for finding in itertools.chain(inspect_machine(cache), inspect_trackers()):
            # Fix what is safe, where that was asked for.
            outcome = ""
            if finding.state != "ok" and options.fix and finding.fix is not None:
                with Status(Console(sys.stderr), f"fixing {finding.what}"):
                    reason = finding.fix()
                outcome = FIXED if reason is None else f"could not be fixed: {reason}"
            if finding.state == "bad" and outcome != FIXED:
                bad += 1
            rows.append(
                {
                    "what": finding.what,
                    "state": finding.state,
                    "message": finding.message,
                    "command": finding.command,
                    "mended": outcome or None,
                }
            )

            # A line per finding as it comes, because some take seconds.
            if not options.as_json:
                write(f"{MARKS[finding.state]}  {finding.what:<16} {finding.message}\n")
                if outcome:
                    write(f"{'':<23}{outcome}\n")
                elif finding.command and finding.state != "ok":
                    safe = " (doctor --fix does it)" if finding.fix else ""
                    write(f"{'':<23}-> {finding.command}{safe}\n")
        if options.as_json:
            write(to_json_line({"healthy": bad == 0, "findings": rows}, indent=1) + "\n")
    if bad:
        sys.stderr.write(f"{counted(bad, 'finding')} would stop a run\n")
        return MissingPrerequisiteError.exit_code
    return EXIT_DONE
