"""Find problems that no single row shows: too many long rows, rows trained on and evaluated."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from llmtune.data.rows.problems import Problem, format_location
from llmtune.data.store.token_store import Rows, TokenStore

if TYPE_CHECKING:
    from numpy.typing import NDArray


def find_overlong_sources(
    stores: Sequence[TokenStore], max_seq_length: int, allowed_share: float
) -> list[Problem]:
    """Find sources of which more than the allowed share was dropped or truncated."""
    found = []
    for store in stores:
        summary = store.summary
        cut = summary.truncated + summary.dropped
        total = summary.rows + summary.dropped
        if total and cut / total > allowed_share:
            what = "dropped" if summary.dropped else "truncated"
            enough = _length_that_fits(store, allowed_share)
            hint = f"; data.max_seq_length={enough} would do" if enough else ""
            found.append(
                Problem(
                    summary.files[0] if summary.files else "",
                    None,
                    f"{cut:,} of {total:,} rows ({cut / total:.1%}) are {what} because they are"
                    f" longer than data.max_seq_length={max_seq_length}, more than"
                    f" data.max_overlong_share={allowed_share:g}{hint}",
                )
            )
    return found


def _length_that_fits(store: TokenStore, allowed_share: float) -> int | None:
    """Return the shortest length at which few enough rows are too long.

    It is None where truncation hid the lengths.
    """
    if store.summary.truncated:
        return None
    total = store.summary.rows + store.summary.dropped
    beyond = store.summary.dropped
    # Of long texts it is not known how long they are, but they are the longest.
    for tokens, count in sorted(store.summary.overlong, key=lambda pair: pair[0] or math.inf):
        beyond -= count
        if beyond / total <= allowed_share:
            return tokens or None
    return None


def find_leaks(train: Rows, eval_rows: Rows | None) -> tuple[list[Problem], NDArray[np.bool_]]:
    """Find evaluation rows that are trained on too.

    Returns:
        The problems; and for each evaluation row whether it is one of them, shape (rows,).
    """
    if eval_rows is None or not len(eval_rows):
        return [], np.zeros(0, dtype=bool)
    train_hashes, eval_hashes = train.documents("hashes"), eval_rows.documents("hashes")
    leaks = np.isin(eval_hashes, train_hashes)
    numbers = np.flatnonzero(leaks)
    if not len(numbers):
        return [], leaks
    duplicated: dict[int, int] = {}
    for index in np.flatnonzero(np.isin(train_hashes, eval_hashes[leaks])).tolist():
        duplicated.setdefault(int(train_hashes[index]), index)
    found = []
    for index in numbers.tolist():
        location = format_location(*train.location(duplicated[int(eval_hashes[index])]))
        message = f"the validation row is among the training rows too ({location})"
        found.append(Problem(*eval_rows.location(index), message))
    return found, leaks
