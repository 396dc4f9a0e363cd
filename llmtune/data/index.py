"""Write the index of prepared rows: the training and evaluation rows, and the packed rows."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from llmtune.config.groups.data import DataConfig, OnBadRow
from llmtune.data.prepared_data import PROBLEMS, SUMMARY
from llmtune.data.read.sources import Source
from llmtune.data.report.label_checks import (
    find_label_problems,
    find_mixed_labels,
    find_number_problems,
    find_unlabeled,
    have_numbers,
    keep_every_class,
    summarize_labels,
)
from llmtune.data.report.preflight import find_leaks, find_overlong_sources
from llmtune.data.rows.problem_report import refuse, write_problems
from llmtune.data.rows.problems import Problem
from llmtune.data.settings import check_packed_formats
from llmtune.data.store.mixing import mix, split_eval
from llmtune.data.store.packing import pack_rows, packing_efficiency
from llmtune.data.store.token_store import Rows, TokenStore
from llmtune.errors import DataError
from llmtune.plan.prepared_data import SplitSummary


@dataclass(frozen=True, slots=True, kw_only=True)
class _Splits:
    """Documents that are trained on, mixed, and those for evaluation."""

    train: Rows
    eval: Rows
    duplicates_of_eval: int
    """Documents left out of training because they equal one for evaluation."""


#: Key of the summary of rows with labels; raise its value when labels are checked or numbered
#: differently.
LABELS, LABELS_VERSION = "labels_version", 2


class IndexWriter:
    """Writes the index of a folder of prepared data, its problems and its summary."""

    def __init__(
        self,
        config: DataConfig,
        sources: list[Source],
        stores: list[str],
        eval_stores: list[str],
        seed: int,
        folder: Path,
        learns_numbers: bool = False,
    ):
        """
        Args:
            stores: Folders of the tokens of ``sources``.
            eval_stores: Those of ``data.eval``; empty where evaluation rows are split off.
            learns_numbers: Labels that are numbers are values, not classes.
        """
        self.config = config
        self.sources = sources
        self.seed = seed
        self.folder = folder
        self.names = stores, eval_stores
        self.stores = [TokenStore(Path(name)) for name in stores]
        self.eval_stores = [TokenStore(Path(name)) for name in eval_stores]
        self.as_numbers = learns_numbers and have_numbers(self.stores)

    def write(self) -> None:
        """Split, mix, check, pack and count.

        Raises:
            ConfigError: Rows with labels are to be packed.
            DataError: Nothing is left to train on.
        """
        if self.config.packing:
            check_packed_formats(name for store in self.stores for name in store.summary.formats)

        # Which rows are on which side, and what is wrong with them.
        every = [*self.stores, *self.eval_stores]
        splits = self._split()
        leaks, leaking = find_leaks(splits.train, splits.eval if self.eval_stores else None)
        of_sources = [
            *find_overlong_sources(
                every, self.config.max_seq_length, self.config.max_overlong_share
            ),
            *self._label_problems(every, splits),
        ]
        bad_rows = sum(store.summary.bad_rows for store in every)

        # Bad rows are left out, or training is refused.
        eval_rows = splits.eval
        fatal = len(of_sources)
        if self.config.on_bad_row is OnBadRow.skip:
            if len(leaking):
                eval_rows = Rows(eval_rows.stores, eval_rows.index[~leaking])
            problems = itertools.chain(of_sources, self._bad_rows(every), leaks)
        else:
            fatal += bad_rows + len(leaks)
            problems = itertools.chain(self._bad_rows(every), leaks, of_sources)
        with (self.folder / PROBLEMS).open("w", encoding="utf-8") as file:
            write_problems(problems, file)

        # The rows, and the summary.
        train = self._write_split(splits.train, "train", self.config.packing)
        summary = {
            "train": self._summarize(
                train, self.stores, duplicates_of_eval=splits.duplicates_of_eval
            ),
            "eval": None,
            "train_stores": self.names[0],
            "eval_stores": self.names[1] or self.names[0],
            **self._describe_labels(splits.train),
            "special_tokens": sorted({token for store in every for token in store.summary.special}),
            "unknown_fields": sorted({name for store in every for name in store.summary.unknown}),
            "formats": sorted({name for store in every for name in store.summary.formats}),
            "fatal": fatal,
            "left_out": bad_rows + len(leaks) + len(of_sources) - fatal,
        }
        if len(eval_rows):
            written = self._write_split(eval_rows, "eval", packing=False)
            summary["eval"] = self._summarize(written, self.eval_stores, leaks=len(leaks))
        (self.folder / SUMMARY).write_text(json.dumps(summary))

    def _label_problems(self, every: list[TokenStore], splits: _Splits) -> Iterable[Problem]:
        if problems := find_unlabeled(every):
            return problems
        if self.as_numbers:
            return find_number_problems(splits.train, splits.eval)
        return find_mixed_labels(every) or find_label_problems(splits.train, splits.eval)

    def _bad_rows(self, stores: list[TokenStore]) -> Iterator[Problem]:
        return (problem for store in stores for problem in store.problems())

    @cached_property
    def _counts(self) -> list[int]:
        return [len(store) for store in self.stores]

    def _split(self) -> _Splits:
        if self.stores and not sum(self._counts):
            raise self._nothing_left()
        if self.eval_stores:
            count = sum(len(store) for store in self.eval_stores)
            train = self._mix(np.arange(sum(self._counts), dtype=np.int64))
            eval_rows = Rows(self.eval_stores, np.arange(count, dtype=np.int64))
            return _Splits(train=train, eval=eval_rows, duplicates_of_eval=0)
        if not self.stores:
            # A stream has only what is in data.eval.
            nothing = np.zeros(0, dtype=np.int64)
            return _Splits(train=Rows([], nothing), eval=Rows([], nothing), duplicates_of_eval=0)

        # Evaluation rows are split off. Where many rows are bad, too few are left, and the bad rows
        # are the error to report.
        every = Rows(self.stores, np.arange(sum(self._counts), dtype=np.int64))
        try:
            keep, drawn = split_eval(every.documents("begins"), self.config.val_set_size, self.seed)
        except DataError as error:
            bad_rows = any(store.summary.bad_rows for store in self.stores)
            raise (refuse(self._bad_rows(self.stores), str(error)) if bad_rows else error) from None

        # Data often repeats rows; a row for evaluation must not be trained on all the same.
        duplicates = 0
        if len(drawn):
            hashes = every.documents("hashes")
            is_duplicate = np.isin(hashes[keep], hashes[drawn])
            keep, duplicates = keep[~is_duplicate], int(is_duplicate.sum())
            if every.labels and not self.as_numbers:
                keep, drawn = keep_every_class(keep, drawn, every.labels)
        return _Splits(
            train=self._mix(keep), eval=Rows(self.stores, drawn), duplicates_of_eval=duplicates
        )

    def _mix(self, rows: np.ndarray[Any, np.dtype[np.int64]]) -> Rows:
        """Return the rows of an epoch.

        Raises:
            DataError: There are none.
        """
        if not self.stores:
            return Rows([], np.zeros(0, dtype=np.int64))
        train = Rows(self.stores, mix(rows, self.sources, self._counts, self.seed))
        if not len(train):
            raise DataError(
                f"data.train={self.config.train}: every row equals one that data.val_set_size"
                " holds out"
            )
        return train

    def _write_split(self, rows: Rows, name: str, packing: bool) -> Rows:
        index = rows.index
        if packing:
            members, starts = pack_rows(
                rows.documents("lengths"), self.config.max_seq_length, self.seed
            )
            index = index[members]
            np.save(self.folder / f"{name}_packs.npy", starts)
            rows = Rows(rows.stores, index, starts)
        np.save(self.folder / f"{name}.npy", index)
        return rows

    def _summarize(
        self,
        rows: Rows,
        stores: list[TokenStore],
        duplicates_of_eval: int = 0,
        leaks: int = 0,
    ) -> dict[str, Any]:
        lengths = rows.documents("lengths")
        efficiency = None
        if rows.packed:
            efficiency = packing_efficiency(lengths, len(rows), self.config.max_seq_length)
        summaries = [store.summary for store in stores]
        return SplitSummary(
            rows=len(rows),
            documents=len(lengths),
            tokens=int(lengths.sum(dtype=np.int64)),
            supervised_tokens=int(rows.supervised_tokens.sum()),
            dropped=sum(summary.dropped for summary in summaries),
            truncated=sum(summary.truncated for summary in summaries),
            skipped=sum(summary.bad_rows for summary in summaries) + leaks,
            duplicates_of_eval=duplicates_of_eval,
            packing_efficiency=efficiency,
        ).to_dict()

    def _describe_labels(self, train: Rows) -> dict[str, Any]:
        labels = summarize_labels(train, self.as_numbers)
        if labels is None:
            return {"classes": []}
        return {
            LABELS: LABELS_VERSION,
            "classes": labels.classes,
            "class_counts": labels.counts,
            "label_kind": labels.kind.value,
            "outputs": labels.outputs,
        }

    def _nothing_left(self) -> DataError:
        dropped = sum(store.summary.dropped for store in self.stores)
        if dropped and not any(store.summary.bad_rows for store in self.stores):
            files = ", ".join(name for store in self.stores for name in store.summary.files[:1])
            return DataError(
                f"{files}: all rows are longer than"
                f" data.max_seq_length={self.config.max_seq_length} ({dropped:,} left out): raise"
                " it, or take data.overlong=truncate"
            )
        return refuse(
            self._bad_rows(self.stores),
            f"No row of data.train={self.config.train} can be trained on",
        )
