"""The command: choose the checks, run them one after the other, report."""

from __future__ import annotations

import argparse
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from llmtune.errors import MissingPrerequisiteError
from scripts.gpu_check.bench import Bench, SkippedError
from scripts.gpu_check.checks import Check, all_checks, select
from scripts.gpu_check.commands import RunFailedError
from scripts.gpu_check.machine import Machine, find_machine
from scripts.gpu_check.report import Result, make_console, print_table, write_json

EXIT_FAILED, EXIT_USAGE, EXIT_NO_GPU = 1, 2, 7
#: Seconds of a check, and of a run on the CPU.
TIMEOUTS = {"cuda": 120.0, "cpu": 400.0}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the checks; 0 where none failed."""
    given = _parse(argv)
    try:
        machine = find_machine(given.cpu)
    except MissingPrerequisiteError as error:
        sys.stderr.write(f"error: {error}\n")
        return EXIT_NO_GPU
    checks = all_checks(machine.device, machine.cards)
    chosen = select(checks, given.only)
    if given.list:
        sys.stdout.write("".join(f"{check.name}\n" for check in checks))
        return 0
    if unknown := [pattern for pattern in given.only if not select(checks, [pattern])]:
        sys.stderr.write(f"error: no check is named like {unknown[0]}; --list names them\n")
        return EXIT_USAGE
    started = time.monotonic()
    out = Path(given.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with _work_folder(out.parent) as work, _ended_by_signals():
        bench = Bench(machine.device, work, given.timeout or TIMEOUTS[machine.device])
        try:
            # Another run's report does not stand for this one.
            write_json(out, machine, [])
            results = run_checks(
                bench, chosen, keep=lambda results: write_json(out, machine, results)
            )
        finally:
            bench.close()
    return _report(machine, results, out, time.monotonic() - started)


def run_checks(
    bench: Bench, checks: Sequence[Check], keep: Callable[[Sequence[Result]], None]
) -> list[Result]:
    """Each in its turn, with a line when it starts and one when it ends.

    Args:
        keep: Is given all results after each check, so that a lent machine may go before the end.
    """
    if bench.device != "cpu":
        # The runs on the CPU need no GPU, and go on beside those that do.
        for check in checks:
            for job in check.jobs:
                bench.ask(job)
    results = []
    for number, check in enumerate(checks, 1):
        place = f"[{number}/{len(checks)}] {check.name}"
        _say(f"{place} ...")
        result = run_check(bench, check)
        _say(
            f"{place}: {result.state} in {result.seconds:.1f}"
            f" s{'' if result.passed else f': {result.note}'}"
        )
        results.append(result)
        keep(results)
    return results


def run_check(bench: Bench, check: Check) -> Result:
    """One check; what it needs of the CPU is not counted in its seconds."""
    bench.prepare(check.jobs, check.alone)
    bench.start_clock()
    started = time.monotonic()

    def result(passed: bool | None, **more: Any) -> Result:
        return Result(
            name=check.name, passed=passed, seconds=round(time.monotonic() - started, 1), **more
        )

    try:
        verdict = check.run(bench)
    except SkippedError as reason:
        return result(None, skipped=str(reason))
    except RunFailedError as error:
        return result(False, problems=[str(error)])
    except Exception as error:
        # Of whatever kind: the other checks go on.
        return result(False, problems=[f"{type(error).__name__}: {error}"])
    found = {
        "measured": verdict.measured,
        "expected": verdict.expected,
        "tolerance": verdict.tolerance,
    }
    return result(not verdict.problems, **found, problems=verdict.problems)


def _report(machine: Machine, results: Sequence[Result], out: Path, seconds: float) -> int:
    print_table(make_console(), machine, results)
    counts = {
        state: [result.state for result in results].count(state)
        for state in ("passed", "failed", "skipped")
    }
    _say(
        f"{', '.join(f'{count} {state}' for state, count in counts.items())} in {seconds:.0f} s;"
        f" {out}"
    )
    return EXIT_FAILED if counts["failed"] or not counts["passed"] else 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/gpu_check.sh", description=__doc__)
    parser.add_argument("--cpu", action="store_true", help="put the CPU in the GPU's place")
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="NAME-PATTERN",
        help="run those checks; may be repeated",
    )
    parser.add_argument(
        "--out",
        default="outputs/gpu_check.json",
        metavar="FILE",
        help="the report (default: %(default)s)",
    )
    parser.add_argument(
        "--timeout",
        type=float,
        metavar="SECONDS",
        help="of one check (default: 120, with --cpu 400)",
    )
    parser.add_argument("--list", action="store_true", help="name the checks")
    return parser.parse_args(argv)


@contextmanager
def _work_folder(parent: Path) -> Iterator[Path]:
    """Beside the report: ``/tmp`` is in memory on some machines, and a swap folder must be on a
    disk.
    """
    work = Path(tempfile.mkdtemp(prefix="gpu_check-", dir=parent)).resolve()
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """A signal that would end this program lets it clean up first."""

    def end(number: int, _: Any) -> NoReturn:
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
