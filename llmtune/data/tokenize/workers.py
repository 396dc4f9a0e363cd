"""Blocks of rows become blocks of tokens, in worker processes, in order."""

from __future__ import annotations

import contextlib
import gc
import itertools
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from multiprocessing import forkserver
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from llmtune.data.formats.recipe import Recipe
from llmtune.data.read.readers import Block, parse_rows
from llmtune.data.rows.conversation import Conversation
from llmtune.data.rows.problems import Problem, RowError
from llmtune.data.tokenize.encode import Encoder, EncodeSettings, Overflow, TokenRow
from llmtune.data.tokenize.windows import Pulse
from llmtune.errors import DataError

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

# : Blocks read ahead of the workers, for each of them: enough that none waits, and few enough to
# hold in memory.
AHEAD = 3

#: Of a block of tokens that is written at once.
MOST_TOKENS = 1 << 20

#: Seconds between two signs of life of whoever waits for a worker.
PULSE_SECONDS = 0.5


Work = tuple[Block, Recipe]


@dataclass(slots=True, kw_only=True)
class TokenBlock:
    """The tokens of one block. Shapes: (tokens,) for ``ids`` and ``mask``, (rows,) for the rest."""

    file: str
    position: int
    """Where in the file the next block begins: byte of JSON lines, row of anything else."""
    ids: NDArray[np.int32]
    mask: NDArray[np.bool_]
    lengths: NDArray[np.int32]
    trained: NDArray[np.int32]
    """Trained tokens of each row."""
    hashes: NDArray[np.uint64]
    """Of the ids of the whole document, to find the same one elsewhere; the pieces of a split
    document share it.
    """
    begins: NDArray[np.bool_]
    """Whether a row begins a document; the other pieces of a document that was split follow the
    first.
    """
    lines: NDArray[np.int64]
    labels: list[str | int | float] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    overlong: list[int] = field(default_factory=list)
    """Tokens of the rows that were dropped as too long; 0 of long texts, which were not counted."""
    truncated: int = 0
    special: frozenset[int] = frozenset()
    """Special tokens that occur."""
    unknown: frozenset[str] = frozenset()
    """Fields that no format reads and that are not known to be harmless."""
    format: str = ""
    """As what the rows were read."""


def tokenize_block(
    block: Block,
    encoder: Encoder,
    recipe: Recipe,
    pulse: Pulse | None = None,
    most_tokens: int | None = None,
) -> Iterator[TokenBlock]:
    """Parse, render and encode.

    Args:
        pulse: Called now and then while a long text is tokenized.
        most_tokens: Of a block of tokens, where it has several rows; None for all in one. One row
            of many megabytes, which is split, becomes many rows, of which no second copy is made.
    """
    lines: list[int] = []
    conversations: list[Conversation] = []
    problems: list[Problem] = []
    unknown: set[str] = set()
    for line, row in parse_rows(block):
        try:
            if isinstance(row, RowError):
                raise row
            conversation, unread = recipe.read(row)
            conversations.append(conversation)
            lines.append(line)
            unknown |= unread
        except RowError as error:
            problems.append(Problem(block.file, line, str(error)))
    rows: list[TokenRow] = []
    places: list[tuple[int, int, bool]] = []
    overlong: list[int] = []
    for line, outcome in zip(lines, encoder.encode(conversations, pulse), strict=True):
        if isinstance(outcome, RowError):
            problems.append(Problem(block.file, line, str(outcome)))
        elif isinstance(outcome, Overflow):
            overlong.append(outcome.tokens)
        else:
            whole = _hash(outcome)
            places += [(line, whole, number == 0) for number in range(len(outcome))]
            rows += outcome
    problems.sort(key=lambda problem: problem.line or 0)
    for begin, end in itertools.pairwise(_borders(rows, most_tokens)):
        made = _collect(block, rows[begin:end], places[begin:end], encoder)
        made.format = recipe.format
        if begin == 0:
            made.problems, made.overlong, made.unknown = problems, overlong, frozenset(unknown)
        yield made


def _borders(rows: list[TokenRow], most_tokens: int | None) -> list[int]:
    """Where blocks of at most so many tokens begin, and the end; one block at the least."""
    borders, tokens = [0], 0
    for number, row in enumerate(rows):
        if most_tokens is not None and tokens and tokens + len(row.ids) > most_tokens:
            borders.append(number)
            tokens = 0
        tokens += len(row.ids)
    return [*borders, len(rows)]


def _collect(
    block: Block, rows: list[TokenRow], places: list[tuple[int, int, bool]], encoder: Encoder
) -> TokenBlock:
    """
    Args:
        places: Of each row its line, the hash of its document, and whether it begins that.
    """
    ids = np.concatenate([row.ids for row in rows]) if rows else np.zeros(0, dtype=np.int32)
    return TokenBlock(
        file=block.file,
        position=block.next[0],
        ids=ids,
        mask=np.concatenate([row.mask for row in rows]) if rows else np.zeros(0, dtype=bool),
        lengths=np.array([len(row.ids) for row in rows], dtype=np.int32),
        trained=np.array([row.trained_tokens for row in rows], dtype=np.int32),
        hashes=np.array([whole for _, whole, _ in places], dtype=np.uint64),
        begins=np.array([begins for _, _, begins in places], dtype=bool),
        lines=np.array([line for line, _, _ in places], dtype=np.int64),
        labels=[row.label for row in rows if row.label is not None],
        truncated=sum(row.truncated for row in rows),
        special=encoder.special.intersection(np.unique(ids).tolist()),
    )


def _hash(pieces: list[TokenRow]) -> int:
    """Of a document as a whole."""
    state = xxhash.xxh3_64()
    for piece in pieces:
        state.update(piece.ids.tobytes())
    return state.intdigest()


class TokenizerPool:
    """Workers that tokenize; a context manager.

    With ``workers=0`` the calling process does it itself.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, settings: EncodeSettings, workers: int):
        self._encoder = Encoder(tokenizer, settings)
        self._ahead = AHEAD * workers
        self._pool: ProcessPoolExecutor | None = None
        self._started: Future[None] | None = None
        if workers:
            # Not forked from here: threads of torch and tokenizers may run. The fork server imports
            # once, for all workers.
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload([__name__, "transformers.utils.chat_template_utils"])
            _start_server()
            self._pool = ProcessPoolExecutor(workers, context, _start_worker, (tokenizer, settings))
            self._started = self._pool.submit(_nothing)

    def __enter__(self) -> TokenizerPool:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._pool is None:
            return
        server: Any = forkserver
        if kind is not None and not issubclass(kind, Exception):
            # Interrupted: nobody waits for workers that still import, or for what they were given.
            _kill(*(self._pool._processes or ()), server._forkserver._forkserver_pid)
        self._pool.shutdown(wait=True, cancel_futures=True)
        # Left alone, the fork server would hold what it imported for as long as the training runs.
        server._forkserver._stop()

    def map(self, work: Iterable[Work], pulse: Pulse | None = None) -> Iterator[TokenBlock]:
        """The tokens of each block, in the order of the blocks; only a few are held at a time.

        Args:
            pulse: Called now and then while a block takes its time, with the tokens that a long
                text has so far.

        Raises:
            DataError: A worker was killed.
        """
        waiting: deque[Future[list[TokenBlock]]] = deque()
        try:
            for block, recipe in work:
                # Workers take seconds to import what they need; meanwhile this process does their
                # work.
                if self._pool is None or self._started is None or not self._started.done():
                    yield from tokenize_block(block, self._encoder, recipe, pulse, MOST_TOKENS)
                    continue
                waiting.append(self._pool.submit(_work, block, recipe))
                if len(waiting) > self._ahead:
                    yield from _await(waiting.popleft(), pulse)
            while waiting:
                yield from _await(waiting.popleft(), pulse)
        except BrokenProcessPool as error:
            raise DataError(
                "a process that tokenized the data was ended from outside, most likely because"
                " memory ran out; take data.num_workers=1"
            ) from error


def _await(block: Future[list[TokenBlock]], pulse: Pulse | None) -> list[TokenBlock]:
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


#: The encoder of a worker process.
_WORKER: list[Encoder] = []


def _start_worker(tokenizer: PreTrainedTokenizerBase, settings: EncodeSettings) -> None:
    # Not PR_SET_PDEATHSIG: the parent that it knows is the fork server, which lives as long as its
    # workers.
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # The workers are the parallelism.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _WORKER.append(Encoder(tokenizer, settings))
    # Rows make millions of small objects and no cycles: looking for some takes a tenth of the time.
    gc.freeze()
    gc.set_threshold(200_000, 50, 1000)


def _nothing() -> None:
    """The first task, which is done when a worker has started."""


def _work(block: Block, recipe: Recipe) -> list[TokenBlock]:
    return list(tokenize_block(block, _WORKER[0], recipe, most_tokens=MOST_TOKENS))
