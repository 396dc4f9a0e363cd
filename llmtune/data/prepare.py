"""Sources become tokenized rows on disk, once, and an index that says which of them are trained on
and in which packed row.

The tokens of each source lie in the cache under a hash of its content and of all that shapes them;
the index, under a hash of those and of how sources are mixed, split and packed. A second start
finds both and reads a summary.
"""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llmtune.config.cache_folder import INSTEAD, KEY
from llmtune.config.groups.data import DataConfig, OnBadRow
from llmtune.data.read.fingerprint import digest, hash_tokenizer, identify_file
from llmtune.data.read.sources import Source, parse_sources, resolve_files
from llmtune.data.report.preflight import check_labels, check_leaks, check_overlong
from llmtune.data.rows.problems import Problem, RowError, read_problem_file, refuse, write_problems
from llmtune.data.settings import check_eval_sources, check_streamed_sources
from llmtune.data.store.mixing import hold_out, mix
from llmtune.data.store.packing import pack_rows, packing_efficiency
from llmtune.data.store.token_store import Rows, TokenStore, publish_folder
from llmtune.data.tokenize.chat_template import ChatTemplates
from llmtune.data.tokenized_source import (
    ProgressCallback,
    find_conversations,
    token_folder,
    tokenize_source,
)
from llmtune.draws import DRAWS_VERSION
from llmtune.errors import ConfigError, DataError
from llmtune.plan.prepared_data import PreparedData, SplitSummary
from llmtune.security.trust import require_own

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: Part of the cache key; raise it when rows are mixed, split or packed differently.
INDEX_VERSION = 2

#: Held-out prompts that are answered before and after training.
SAMPLE_PROMPTS = 3

#: More different labels than this are values, not classes.
MAX_CLASSES = 1000

_SUMMARY, _SAMPLES, PROBLEMS = "summary.json", "samples.json", "problems.jsonl"


@dataclass(frozen=True, slots=True)
class SamplePrompt:
    """A held-out question with the answer that the data gives."""

    messages: list[dict[str, Any]]
    expected: str
    text: str
    """The messages as the model reads them, with the row's tools, up to where it answers."""


def prepare_data(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    cache_dir: Path,
    watch: ProgressCallback | None = None,
    strict: bool = True,
) -> PreparedData:
    """Read, tokenize, check, split, mix, pack and store; a second call with the same content only
    reads the summary.

    Args:
        watch: Told of the progress of tokenizing.
        strict: Refuse data with problems; otherwise they are in :func:`read_problems`.

    Raises:
        ConfigError: A source is not written as one, or a chat template is missing.
        DataError: A file cannot be read, nothing is left to train on; or, if strict, with the first
            ``file:line`` of each kind of problem and its count.
    """
    sources = parse_sources(config.train, "data.train", config.format)
    eval_sources = parse_sources(config.eval, "data.eval", config.format)
    tokenizer_hash = hash_tokenizer(tokenizer)
    check_eval_sources(eval_sources)
    stream = None
    if config.streaming:
        stream, sources = _identify_stream(sources), []
    keys = [
        tokenize_source(s, config, tokenizer, tokenizer_hash, seed, cache_dir, watch)
        for s in sources
    ]
    eval_keys = [
        tokenize_source(s, config, tokenizer, tokenizer_hash, seed, cache_dir, watch)
        for s in eval_sources
    ]
    mixing = [(source.repeat, source.weight) for source in sources]
    settings = [
        config.val_set_size if not eval_sources else None,
        config.packing,
        config.on_bad_row.value,
    ]
    settings += [config.max_overlong_share, config.max_seq_length]
    fingerprint = digest(
        [
            INDEX_VERSION,
            DRAWS_VERSION,
            tokenizer_hash,
            keys,
            eval_keys,
            stream,
            mixing,
            settings,
            seed,
        ]
    )
    folder = cache_dir / "data" / "prepared" / fingerprint
    if not (folder / _SUMMARY).is_file():
        with publish_folder(folder) as aside:
            stores = [str(token_folder(cache_dir, key)) for key in keys]
            eval_stores = [str(token_folder(cache_dir, key)) for key in eval_keys]
            _Index(config, sources, stores, eval_stores, seed, aside).write()
            samples = _samples(aside, eval_stores or stores, eval_sources or sources, tokenizer)
            (aside / _SAMPLES).write_text(
                json.dumps([asdict(s) for s in samples], ensure_ascii=False, indent=1)
            )
    require_own(folder, KEY, INSTEAD)
    values = json.loads((folder / _SUMMARY).read_text())
    data = PreparedData.from_dict({"folder": str(folder), "fingerprint": fingerprint, **values})
    if strict and data.fatal:
        advice = (
            "Mend them, or leave bad rows out with data.on_bad_row=skip; llmtune data shows"
            " them all"
        )
        raise refuse(itertools.islice(read_problems(data), data.fatal), advice)
    return data


def _identify_stream(sources: list[Source]) -> list[list[str]]:
    """Names and sizes of the files of a stream, which are too large to be hashed.

    Raises:
        ConfigError: A source cannot be streamed.
    """
    check_streamed_sources(sources)
    files = []
    for source in sources:
        for file in resolve_files(source):
            if file.kind == "hub" and not Path(file.path).is_dir():
                raise ConfigError(
                    f"data.streaming=true with {source.path}: name the data set's files, such as"
                    f" hf://datasets/{source.path}/**/*.parquet, so that they are read as they are"
                    " needed"
                )
            files.append(identify_file(file))
    return files


def open_rows(data: PreparedData, split: str) -> Rows:
    """Memory-mapped rows of ``train`` or ``eval``."""
    stores = data.train_stores if split == "train" else data.eval_stores
    return _open(Path(data.folder), stores, split)


def read_samples(data: PreparedData) -> list[SamplePrompt]:
    """The held-out prompts, at most three; none without an evaluation split."""
    return [
        SamplePrompt(**sample) for sample in json.loads((Path(data.folder) / _SAMPLES).read_text())
    ]


def read_problems(data: PreparedData) -> Iterator[Problem]:
    """All that is wrong with the data; first the ``fatal`` ones, then what was left out."""
    return read_problem_file(Path(data.folder) / PROBLEMS)


def _open(folder: Path, stores: list[str], split: str) -> Rows:
    packs = folder / f"{split}_packs.npy"
    return Rows(
        [TokenStore(Path(store)) for store in stores],
        np.load(folder / f"{split}.npy", mmap_mode="r"),
        np.load(packs, mmap_mode="r") if packs.is_file() else None,
    )


class _Index:
    """Builds the index of prepared rows."""

    def __init__(
        self,
        config: DataConfig,
        sources: list[Source],
        stores: list[str],
        eval_stores: list[str],
        seed: int,
        folder: Path,
    ):
        self.config = config
        self.sources = sources
        self.seed = seed
        self.folder = folder
        self.names = stores, eval_stores
        self.stores = [TokenStore(Path(name)) for name in stores]
        self.eval_stores = [TokenStore(Path(name)) for name in eval_stores]

    def write(self) -> None:
        """Split, mix, check, pack, count."""
        own_eval = bool(self.eval_stores)
        every = [*self.stores, *self.eval_stores]
        bad_rows = sum(store.summary.bad_rows for store in every)
        train, rows, twins = self._divide(own_eval)
        leaks, leaking = check_leaks(train, rows if own_eval else None)
        whole = check_overlong(
            every, self.config.max_seq_length, self.config.max_overlong_share
        ) + check_labels(every)
        fatal = len(whole)
        if self.config.on_bad_row is OnBadRow.skip:
            rows = Rows(rows.stores, rows.index[~leaking] if len(leaking) else rows.index)
            problems = itertools.chain(whole, self._bad_rows(every), leaks)
        else:
            fatal += bad_rows + len(leaks)
            problems = itertools.chain(self._bad_rows(every), leaks, whole)
        with (self.folder / PROBLEMS).open("w", encoding="utf-8") as file:
            write_problems(problems, file)
        summary = {
            "train": self._summarize(
                self._write_split(train, "train", self.config.packing), self.stores, twins=twins
            ),
            "eval": None,
            "train_stores": self.names[0],
            "eval_stores": self.names[1] or self.names[0],
            "classes": _classes(every),
            "special_tokens": sorted({token for store in every for token in store.summary.special}),
            "unknown_fields": sorted({name for store in every for name in store.summary.unknown}),
            "formats": sorted({name for store in every for name in store.summary.formats}),
            "fatal": fatal,
            "left_out": bad_rows + len(leaks) + len(whole) - fatal,
        }
        if len(rows):
            written = self._write_split(rows, "eval", False)
            summary["eval"] = self._summarize(written, self.eval_stores, leaks=len(leaks))
        (self.folder / _SUMMARY).write_text(json.dumps(summary))

    def _bad_rows(self, stores: list[TokenStore]) -> Iterator[Problem]:
        return (problem for store in stores for problem in store.problems())

    def _divide(self, own_eval: bool) -> tuple[Rows, Rows, int]:
        """Documents that are trained on, mixed; those that are held out; and how many equal one of
        those.
        """
        counts = [len(store) for store in self.stores]
        nothing = np.zeros(0, dtype=np.int64)
        twins = 0
        if not self.stores:
            # A stream has only what is held out.
            train, held_out = Rows([], nothing), nothing
        elif not sum(counts):
            raise self._nothing_left()
        else:
            every = Rows(self.stores, np.arange(sum(counts), dtype=np.int64))
            try:
                size = 0 if own_eval else self.config.val_set_size
                keep, held_out = hold_out(every.documents("begins"), size, self.seed)
            except DataError as error:
                # Too few rows are left because many are bad: that is the news.
                bad_rows = any(store.summary.bad_rows for store in self.stores)
                raise (
                    refuse(self._bad_rows(self.stores), str(error)) if bad_rows else error
                ) from None
            if len(held_out):
                # Data often repeats rows; what is held out must not be trained on all the same.
                hashes = every.documents("hashes")
                twin = np.isin(hashes[keep], hashes[held_out])
                keep, twins = keep[~twin], int(twin.sum())
            train = Rows(self.stores, mix(keep, self.sources, counts, self.seed))
            if not len(train):
                raise DataError(
                    f"data.train={self.config.train}: every row equals one that data.val_set_size"
                    " holds out"
                )
        if own_eval:
            held_out = np.arange(sum(len(store) for store in self.eval_stores), dtype=np.int64)
        return train, Rows(self.eval_stores or self.stores, held_out), twins

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
        self, rows: Rows, stores: list[TokenStore], twins: int = 0, leaks: int = 0
    ) -> dict[str, Any]:
        lengths = rows.documents("lengths")
        summaries = [store.summary for store in stores]
        summary = SplitSummary(
            rows=len(rows),
            documents=len(lengths),
            tokens=int(lengths.sum(dtype=np.int64)),
            trained_tokens=int(rows.trained_tokens.sum()),
            dropped=sum(summary.dropped for summary in summaries),
            truncated=sum(summary.truncated for summary in summaries),
            skipped=sum(summary.bad_rows for summary in summaries) + leaks,
            twins=twins,
            packing_efficiency=(
                packing_efficiency(lengths, len(rows), self.config.max_seq_length)
                if rows.packed
                else None
            ),
        )
        return asdict(summary)

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


def _classes(stores: list[TokenStore]) -> list[Any]:
    """Different labels, sorted."""
    every = {label for store in stores for label in store.labels()}
    return sorted(every, key=lambda label: (isinstance(label, str), label))[:MAX_CLASSES]


def _samples(
    folder: Path, stores: list[str], sources: list[Source], tokenizer: PreTrainedTokenizerBase
) -> list[SamplePrompt]:
    """The first held-out conversations, read again from their files."""
    if json.loads((folder / _SUMMARY).read_text())["eval"] is None or not tokenizer.chat_template:
        return []
    rows = _open(folder, stores, "eval")
    places = [rows.source_place(number) for number in range(min(SAMPLE_PROMPTS, len(rows)))]
    found = find_conversations([replace(s, limit=None) for s in sources], places)
    templates = ChatTemplates(tokenizer)
    samples = []
    for conversation in found:
        if conversation.plain or len(conversation.messages) < 2:
            continue
        # A template may refuse a beginning, although it took the whole.
        with contextlib.suppress(RowError):
            samples.append(
                SamplePrompt(
                    conversation.prompt(),
                    conversation.expected(),
                    templates.render_prompt(conversation),
                )
            )
    return samples
