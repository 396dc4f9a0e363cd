"""``python -m tests.faults.table FILE``: the table of ``docs/reliability.md`` from the trials that
a session wrote.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tests.faults.harness import SAVE_STEPS

_HEADER = [
    "fault",
    "trials",
    "went on to the end",
    "steps done again, most",
    "more than `save_steps`",
    "beyond the bound",
    "wrong",
    "orphans",
]


def read_trials(file: Path) -> list[dict[str, object]]:
    """The last record of every trial, in order: one that was run again counts as it came out
    then.
    """
    trials = {}
    for line in file.read_text().splitlines():
        trial = json.loads(line)
        trials[trial["fault"], trial["name"]] = trial
    return list(trials.values())


def render_table(trials: list[dict[str, object]]) -> str:
    """Markdown: one line a kind of fault, and their sums."""
    kinds = list(dict.fromkeys(str(trial["fault"]) for trial in trials))
    lines = [_row(kind, [trial for trial in trials if trial["fault"] == kind]) for kind in kinds]
    head = [f"| {' | '.join(_HEADER)} |", f"| {' | '.join('---' for _ in _HEADER)} |"]
    return "\n".join([*head, *lines, _row("**all**", trials)])


def _row(kind: str, trials: list[dict[str, object]]) -> str:
    cells = [
        kind,
        len(trials),
        sum(bool(trial["resumed"]) for trial in trials),
        max(int(str(trial["lost_steps"])) for trial in trials),
        sum(int(str(trial["lost_steps"])) > SAVE_STEPS for trial in trials),
        sum(int(str(trial["beyond"])) for trial in trials),
        sum(bool(trial["wrong"]) for trial in trials),
        sum(int(str(trial["orphans"])) for trial in trials),
    ]
    return f"| {' | '.join(map(str, cells))} |"


def main(file: Path) -> None:
    """Print the table, and what was wrong."""
    trials = read_trials(file)
    print(f"{len(trials)} trials, save_steps {SAVE_STEPS}\n\n{render_table(trials)}")  # noqa: T201
    for trial in trials:
        if trial["wrong"]:
            print(f"\nwrong: {trial['fault']}, {trial['name']}: {trial['wrong']}")  # noqa: T201


if __name__ == "__main__":
    main(Path(sys.argv[1]))
