"""Tokenize blocks of rows in worker processes, in order."""

from __future__ import annotations

import contextlib
import gc
import itertools
import multiprocessing
import os
import pickle
import signal
import tempfile
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from multiprocessing import forkserver
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from llmtune.data.formats.recipe import Recipe
from llmtune.data.read.blocks import Block, parse_rows
from llmtune.data.rows.conversation import Conversation
from llmtune.data.rows.problems import Problem, RowError
from llmtune.data.tokenize.chat_template import ChatRenderer
from llmtune.data.tokenize.encode import Encoder
from llmtune.data.tokenize.settings import EncodeSettings
from llmtune.data.tokenize.token_row import Overflow, SplitRows, TokenBlock, TokenRow
from llmtune.data.tokenize.windows import Pulse
from llmtune.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: Blocks read ahead of the workers, for each of them: enough that none waits, and few enough to
#: hold in memory.
AHEAD = 3

#: Of a block of tokens that is written at once.
MOST_TOKENS = 1 << 20

#: Seconds between two signs of life while a worker is waited for.
PULSE_SECONDS = 0.5


Work = tuple[Block, Recipe]


@dataclass(slots=True)
class _ReadRows:
    """Notes that are taken while the rows of a block are read."""

    lines: list[int] = field(default_factory=list)
    """Lines of the rows that became conversations."""
    problems: list[Problem] = field(default_factory=list)
    unknown: set[str] = field(default_factory=set)
    """Fields that no format reads and that are not known to be harmless."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Document:
    """The rows of one row of the data."""

    line: int
    rows: list[TokenRow] | SplitRows
    hash: int
    """Hash of the ids of the whole document."""

    def lengths(self) -> Iterator[int]:
        """Return the number of tokens of each row."""
        if isinstance(self.rows, SplitRows):
            return self.rows.lengths()
        return (len(row.ids) for row in self.rows)

    def read(self, index: int) -> TokenRow:
        """Read one of the rows."""
        return self.rows.read(index) if isinstance(self.rows, SplitRows) else self.rows[index]


def make_encoder(
    tokenizer: PreTrainedTokenizerBase, settings: EncodeSettings, folder: Path | None = None
) -> Encoder:
    """Make an encoder that renders chats by the tokenizer's own template.

    Args:
        folder: As :class:`~llmtune.data.tokenize.encode.Encoder` takes it.
    """
    render_chat = ChatRenderer(tokenizer, every_answer=settings.train_on_inputs)
    return Encoder(tokenizer, settings, render_chat, folder)


def tokenize_block(
    block: Block,
    encoder: Encoder,
    recipe: Recipe,
    pulse: Pulse | None = None,
    most_tokens: int | None = None,
) -> Iterator[TokenBlock]:
    """Parse, render and encode the rows of a block.

    Args:
        pulse: Called now and then while a long text is tokenized.
        most_tokens: Of a block of tokens, where it has several rows; None for all in one. One row
            of many megabytes, which is split, becomes many rows, which are made as they are asked
            for.
    """
    # Each conversation is read when the one before it has been rendered, and freed.
    noted = _ReadRows()
    outcomes = encoder.encode(_read_conversations(block, recipe, noted), pulse)

    # Sort the outcomes: documents, over-long rows, and problems with their line.
    documents: list[_Document] = []
    overlong: list[int] = []
    for line, outcome in zip(noted.lines, outcomes, strict=True):
        if isinstance(outcome, RowError):
            noted.problems.append(Problem(block.file, line, str(outcome)))
        elif isinstance(outcome, Overflow):
            overlong.append(outcome.tokens)
        else:
            documents.append(_Document(line=line, rows=outcome, hash=_hash(outcome)))
    noted.problems.sort(key=lambda problem: problem.line or 0)

    # The facts about the block as a whole go with its first tokens.
    for index, rows in enumerate(_divide(documents, most_tokens)):
        made = _collect(block, rows, encoder)
        made.format = recipe.format
        if index == 0:
            made.problems, made.overlong = noted.problems, overlong
            made.unknown = frozenset(noted.unknown)
        yield made


def _read_conversations(block: Block, recipe: Recipe, noted: _ReadRows) -> Iterator[Conversation]:
    for line, row in parse_rows(block):
        try:
            if isinstance(row, RowError):
                raise row
            conversation, unread = recipe.read(row)
        except RowError as error:
            noted.problems.append(Problem(block.file, line, str(error)))
            continue
        noted.lines.append(line)
        noted.unknown |= unread
        # The text of a long row must not be held here while it is rendered.
        del row
        yield conversation


def _divide(
    documents: list[_Document], most_tokens: int | None
) -> Iterator[list[tuple[_Document, int]]]:
    """Yield rows that make a block of at most so many tokens, by the index of each in its document.

    There is one block at the least.
    """
    rows: list[tuple[_Document, int]] = []
    tokens = 0
    for document in documents:
        for index, length in enumerate(document.lengths()):
            if most_tokens is not None and tokens and tokens + length > most_tokens:
                yield rows
                rows, tokens = [], 0
            rows.append((document, index))
            tokens += length
    yield rows


def _collect(block: Block, entries: list[tuple[_Document, int]], encoder: Encoder) -> TokenBlock:
    rows = [document.read(index) for document, index in entries]
    ids = np.concatenate([row.ids for row in rows]) if rows else np.zeros(0, dtype=np.int32)
    return TokenBlock(
        file=block.file,
        position=block.next[0],
        ids=ids,
        mask=np.concatenate([row.mask for row in rows]) if rows else np.zeros(0, dtype=bool),
        lengths=np.array([len(row.ids) for row in rows], dtype=np.int32),
        trained=np.array([row.supervised_tokens for row in rows], dtype=np.int32),
        hashes=np.array([document.hash for document, _ in entries], dtype=np.uint64),
        begins=np.array([index == 0 for _, index in entries], dtype=bool),
        lines=np.array([document.line for document, _ in entries], dtype=np.int64),
        labels=[row.label for row in rows if row.label is not None],
        truncated=sum(row.truncated for row in rows),
        special=encoder.special.intersection(np.unique(ids).tolist()),
    )


def _hash(rows: Iterable[TokenRow]) -> int:
    """Hash a document as a whole."""
    state = xxhash.xxh3_64()
    for row in rows:
        state.update(row.ids.tobytes())
    return state.intdigest()


class TokenizerPool:
    """Workers that tokenize; a context manager.

    With ``workers=0`` the calling process does it itself.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        settings: EncodeSettings,
        workers: int,
        folder: Path,
    ):
        """
        Args:
            folder: For the tokens of long texts on their way; nothing is left in it.
        """
        self._encoder = make_encoder(tokenizer, settings, folder)
        self._ahead = AHEAD * workers
        self._pool: ProcessPoolExecutor | None = None
        self._started: Future[None] | None = None
        if workers:
            # Not forked from here: threads of torch and tokenizers may run. The fork server imports
            # once, for all workers.
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload([__name__, "transformers.utils.chat_template_utils"])
            _start_server()
            self._pool = ProcessPoolExecutor(
                workers, context, _start_worker, (tokenizer, settings, folder)
            )
            self._started = self._pool.submit(_nothing)

    def __enter__(self) -> TokenizerPool:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._pool is None:
            return
        server: Any = forkserver
        if kind is not None and not issubclass(kind, Exception):
            # Interrupted: workers that still import, or compute, are not waited for.
            _kill(*(self._pool._processes or ()), server._forkserver._forkserver_pid)
        self._pool.shutdown(wait=True, cancel_futures=True)
        # Left alone, the fork server would hold what it imported for as long as the training runs.
        server._forkserver._stop()

    def map(self, work: Iterable[Work], pulse: Pulse | None = None) -> Iterator[TokenBlock]:
        """Yield the tokens of each block, in their order; only a few blocks are held at a time.

        Args:
            pulse: Called now and then while a block takes its time, with the tokens that a long
                text has so far.

        Raises:
            DataError: A worker was killed.
        """
        waiting: deque[Future[TokenBlock | Path]] = deque()
        try:
            for block, recipe in work:
                # Workers take seconds to import what they need; meanwhile this process does their
                # work.
                if self._pool is None or self._started is None or not self._started.done():
                    yield from tokenize_block(block, self._encoder, recipe, pulse, MOST_TOKENS)
                    continue
                waiting.append(self._pool.submit(_work, block, recipe))
                if len(waiting) > self._ahead:
                    yield from _read_result(_await(waiting.popleft(), pulse))
            while waiting:
                yield from _read_result(_await(waiting.popleft(), pulse))
        except BrokenProcessPool as error:
            raise DataError(
                "a process that tokenized the data was ended from outside, most likely because"
                " memory ran out; take data.num_workers=1"
            ) from error


def _await(block: Future[TokenBlock | Path], pulse: Pulse | None) -> TokenBlock | Path:
    while pulse is not None and not wait([block], PULSE_SECONDS).done:
        pulse(0)
    return block.result()


def _start_server() -> None:
    """Start the fork server with SIGINT blocked, which its workers inherit.

    Ctrl-C goes to the whole group. A server that it ends while it imports leaves a pool that waits
    for its workers for ever; the parent ends them all.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT,))
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _kill(*pids: int | None) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            if pid is not None:
                os.kill(pid, signal.SIGKILL)


def _end_with_parent() -> None:
    """Wait for the end of the process that asked for this worker, however it ends."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
    os._exit(1)


@dataclass(frozen=True, slots=True)
class _Worker:
    """The state of a worker process."""

    encoder: Encoder
    folder: Path


_WORKER: list[_Worker] = []


def _start_worker(
    tokenizer: PreTrainedTokenizerBase, settings: EncodeSettings, folder: Path
) -> None:
    # Not PR_SET_PDEATHSIG: the parent that it knows is the fork server, which lives as long as its
    # workers.
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # The workers share the work; each tokenizes with one thread.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _WORKER.append(_Worker(make_encoder(tokenizer, settings, folder), folder))
    # Rows make millions of small objects and no cycles: looking for some takes a tenth of the time.
    gc.freeze()
    gc.set_threshold(200_000, 50, 1000)


def _nothing() -> None:
    """Do nothing: the first task, which is done when a worker has started."""


def _work(block: Block, recipe: Recipe) -> TokenBlock | Path:
    """Tokenize a block in a worker; the tokens of a long text go through a file.

    A pipe would take all of them at once, in both processes.
    """
    worker = _WORKER[0]
    blocks = tokenize_block(block, worker.encoder, recipe, most_tokens=MOST_TOKENS)
    first = next(blocks)
    second = next(blocks, None)
    if second is None:
        return first
    with tempfile.NamedTemporaryFile(dir=worker.folder, delete=False) as file:
        for made in itertools.chain((first, second), blocks):
            pickle.dump(made, file, pickle.HIGHEST_PROTOCOL)
    return Path(file.name)


def _read_result(result: TokenBlock | Path) -> Iterator[TokenBlock]:
    """Yield the blocks of tokens that a worker made of a block, one at a time."""
    if isinstance(result, TokenBlock):
        yield result
        return
    with result.open("rb") as file:
        # The file is gone when it has been read, or when this process ends.
        result.unlink()
        while file.peek(1):
            yield pickle.load(file)
