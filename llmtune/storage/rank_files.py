"""The files through which ranks and their supervisor talk, each a dataclass that both sides use.

They are in a folder of the attempt, which the supervisor makes, closes to other users and
removes; ``LLMTUNE_FAILURE_DIR`` tells ranks where. R is the number of a rank.

=================  ==============================  ================================================
file               written by                      read by
=================  ==============================  ================================================
``phase-R.json``   rank R, at every phase          supervisor and R's own watchdog: hangs, the last
                   (:class:`PhaseRecord`)          step, what memory ran out in
``rank-R.json``    rank R, when it fails           supervisor: why the attempt ended
                   (:class:`FailureReport`)
``kills``          supervisor, at the start        supervisor, at the end: did the kernel kill
                   (:class:`KernelKills`)          processes for lack of memory meanwhile
``stack-R.txt``    rank R, on SIGUSR2, as text     supervisor: saved in the run folder
``import-R.txt``   rank R started ahead: what its  rank R: copied into the log when there is one
                   imports print
``meeting``        ranks, ``torch``'s file store   ranks: their process group
``heard``          rank 0, empty, when it begins   supervisor: until then it says itself what is
                   to write to the console         being done
=================  ==============================  ================================================

Six more are elsewhere. ``request.json``, the work of an attempt
(:class:`llmtune.train.request.RunRequest`), is in a folder of its own, for ranks may be started
before it is known. In the run folder, ``finished.json`` (:class:`FinishedRecord`) is written by
rank 0 at the end and read by the supervisor and by later starts; ``skipped_steps.json``
(:class:`SkippedSteps`) is written by rank 0 before it asks for a rollback and read by the ranks of
later attempts; ``restarts.jsonl`` (:class:`RestartRecord`) and ``ended.json``
(:class:`EndRecord`) are written by the supervisor for people; and ``SAVE`` is an empty file by
which a user asks a run to save and stop (:class:`llmtune.train.stop_request.Stop`).
"""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llmtune.security.redaction import redact_values
from llmtune.storage import layout
from llmtune.storage.atomic import read_json, write_atomically
from llmtune.storage.phase_record import PhaseRecord
from llmtune.storage.plain_fields import from_plain
from llmtune.storage.plain_json import parse_json


def phase_file(folder: Path, rank: int) -> Path:
    """Return the file in which a rank keeps its :class:`PhaseRecord`."""
    return folder / f"phase-{rank}.json"


def heard_file(folder: Path) -> Path:
    """Return the file that is there as soon as rank 0 writes to the console."""
    return folder / "heard"


def read_phase(folder: Path, rank: int) -> PhaseRecord:
    """Read the last record of a rank; ``start`` where there is none yet."""
    try:
        return from_plain(PhaseRecord, parse_json(read_raw_phase(folder, rank)))
    except ValueError:
        return PhaseRecord()


def read_raw_phase(folder: Path, rank: int) -> bytes:
    """Return a rank's record as bytes, to tell whether it changed; empty where there is none."""
    try:
        return phase_file(folder, rank).read_bytes()
    except OSError:
        return b""


@dataclass(frozen=True, slots=True, kw_only=True)
class FailureReport:
    """The error that ended a rank, in the rank's own words."""

    rank: int
    code: int
    """The exit code."""
    message: str
    known: bool
    """The message says what to do; an unexpected exception does not."""
    time: float
    """Seconds since 1970."""
    out_of_memory: str | None = None
    """``device`` or ``host``, where memory ran out."""
    rollback: bool = False
    """The rank asks to be started again from an older checkpoint."""

    def write(self, folder: Path) -> None:
        """Write the report for the supervisor."""
        (folder / f"rank-{self.rank}.json").write_text(json.dumps(asdict(self)))

    @classmethod
    def read_all(cls, folder: Path) -> list[FailureReport]:
        """Read the reports of all ranks, by time; those that say what to do come first.

        A rank that was killed while it wrote has reported nothing.
        """
        reports = []
        for file in sorted(folder.glob("rank-*.json")):
            try:
                reports.append(from_plain(cls, parse_json(file.read_bytes())))
            except ValueError:
                continue
        return sorted(reports, key=lambda report: (not report.known, report.time))


@dataclass(frozen=True, slots=True)
class KernelKills:
    """The number of processes that the OOM killer has ended in this machine or container."""

    count: int = 0

    def write(self, folder: Path) -> None:
        """Write the number, to be compared with the one at the end."""
        (folder / "kills").write_text(json.dumps(asdict(self)))

    @classmethod
    def read(cls, folder: Path) -> KernelKills:
        """Read the count at the start.

        Raises:
            OSError: It was not written.
        """
        return from_plain(cls, parse_json((folder / "kills").read_bytes()))


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishedRecord:
    """The end of a run: of its last step, or before it by early stopping."""

    step: int
    tokens: int = 0
    """Tokens that were trained on."""
    best: dict[str, Any] | None = None
    """``metric``, ``value`` and ``step`` of the best evaluation, where one is looked for."""
    goal: str | None = None
    """Rule by which the best was chosen, such as ``min eval_loss``."""
    published_step: int | None = None
    """Step of the published model; None in records of earlier versions, where it is ``step``."""
    loaded_best: bool = False
    """The run was asked to publish the best model instead of the last one."""
    stale_evaluations: int | None = None
    """Evaluations in a row without an improvement at the end."""
    stopped_early: bool = False
    """The run ended before its last step, because its patience was over."""

    def write(self, run: Path) -> None:
        """Write the record, which marks the run as finished."""
        write_atomically(run / layout.FINISHED, json.dumps(asdict(self)))

    @classmethod
    def read(cls, run: Path) -> FinishedRecord | None:
        """Read the record of a run folder; None where the run is not finished."""
        values = read_json(run / layout.FINISHED)
        return from_plain(cls, values) if values else None


@dataclass(frozen=True, slots=True, kw_only=True)
class EndRecord:
    """The end of a start of a run, for people; a start that is killed leaves none."""

    outcome: str
    """``finished``, ``stopped`` or ``failed``."""
    time: float
    """Seconds since 1970."""
    message: str = ""
    """The reason for an end before the last step, or for an export that failed."""

    def write(self, run: Path) -> None:
        """Replace the record of the run folder.

        Raises:
            OSError: The disk refused.
        """
        write_atomically(run / layout.ENDED, json.dumps(redact_values(asdict(self))))


@dataclass(frozen=True, slots=True)
class SkippedSteps:
    """The steps that a run leaves out after rollbacks; in the file, a list of their numbers."""

    steps: frozenset[int] = frozenset()

    def write(self, run: Path) -> None:
        """Replace the list in the run folder."""
        write_atomically(run / layout.SKIPPED_STEPS, json.dumps(sorted(self.steps)))

    @classmethod
    def read(cls, run: Path) -> SkippedSteps:
        """The steps of a run folder; none where there is no list, or half of one."""
        stored = read_json(run / layout.SKIPPED_STEPS)
        steps = stored if isinstance(stored, list) else []
        return cls(frozenset(step for step in steps if type(step) is int))


@dataclass(frozen=True, slots=True, kw_only=True)
class RestartRecord:
    """A restart after ranks failed: one line of ``restarts.jsonl``."""

    time: float
    """Seconds since 1970."""
    reason: str
    step: int
    """The last step that was done."""
    resumed_from: str | None = None
    """The checkpoint that the failed attempt had resumed from; None for the beginning."""
    rollback: bool = False
    """A rank asked for it, because a loss or gradient was not finite."""

    def append(self, run: Path) -> None:
        """Add the line to the run folder.

        Raises:
            OSError: The disk refused.
        """
        with (run / layout.RESTARTS).open("a") as file:
            file.write(json.dumps(asdict(self)) + "\n")

    @classmethod
    def read_all(cls, run: Path) -> list[RestartRecord]:
        """The restarts of a run folder, oldest first; a line that was cut off is passed over."""
        try:
            lines = (run / layout.RESTARTS).read_bytes().splitlines()
        except FileNotFoundError:
            return []
        records = []
        for line in lines:
            with suppress(ValueError):
                records.append(from_plain(cls, parse_json(line)))
        return records


def stack_file(folder: Path, rank: int) -> Path:
    """Return the file to which a rank writes its threads' stacks when it is asked for them."""
    return folder / f"stack-{rank}.txt"


def import_file(folder: Path, rank: int) -> Path:
    """Return the file for what a rank started ahead prints while there is no log yet."""
    return folder / f"import-{rank}.txt"


def meeting_file(folder: Path) -> Path:
    """Return the file at which the ranks of this node meet."""
    return folder / "meeting"
