"""Stream rows that are tokenized while training, for data larger than the disk.

The stream is cut into windows of whole blocks. Within a window rows are shuffled, and packed, as a
function of seed and window number alone. So a position is small (the positions in the files when
the window began, and how many of its rows are done), resuming makes one window again, and any
number of ranks sees the same global batches: each rank tokenizes the whole stream and takes its
share.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch.utils.data import IterableDataset

from llmtune.config.groups.data import DataConfig, OnBadRow
from llmtune.data.formats.format import FORMATS
from llmtune.data.formats.recipe import Recipe
from llmtune.data.load.collate import Collator
from llmtune.data.load.loader import LoaderSettings, StepBatch, load, share_of_rank
from llmtune.data.read.blocks import Block
from llmtune.data.read.find_recipes import find_recipe
from llmtune.data.read.parse_sources import parse_sources
from llmtune.data.read.readers import read_blocks
from llmtune.data.read.sources import DataFile, Source, resolve_files
from llmtune.data.rows.problem_report import refuse, write_problems
from llmtune.data.rows.problems import Problem
from llmtune.data.store.packing import pack_rows
from llmtune.data.store.token_store import Row, join_documents
from llmtune.data.store.vocabulary import check_block
from llmtune.data.tokenize.settings import EncodeSettings
from llmtune.data.tokenize.token_row import TokenBlock
from llmtune.data.tokenize.workers import make_encoder, tokenize_block
from llmtune.draws import Draw, generator
from llmtune.errors import CheckpointError, DataError
from llmtune.plan.batch_sizes import BatchPlan
from llmtune.plan.length.batch_schedule import BEGINNING, Reached, ScheduledBatch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(slots=True, kw_only=True)
class Cursor:
    """A position in the stream."""

    window: int = 0
    """Windows begun, which seeds their shuffling."""
    row: int = 0
    """Rows of the window that are done."""
    files: list[int] = field(default_factory=list)
    """Index of the file that each source has reached."""
    places: list[list[int]] = field(default_factory=list)
    """Position of each source in that file, as :attr:`Block.next` has it."""
    taken: list[int] = field(default_factory=list)
    """Rows taken of each source."""

    def copy(self) -> Cursor:
        """An independent copy."""
        return replace(
            self,
            files=list(self.files),
            places=[list(p) for p in self.places],
            taken=list(self.taken),
        )


class RowStream:
    """The rows of all sources, tokenized, window by window, without end."""

    def __init__(
        self,
        config: DataConfig,
        tokenizer: PreTrainedTokenizerBase,
        seed: int,
        bad_rows: Path | None = None,
        model_folder: Path | None = None,
    ):
        """
        Args:
            bad_rows: File that gets the rows that were left out.
            model_folder: Of the model that is to know all tokens.
        """
        self._model_folder = model_folder
        self._tokenizer = tokenizer
        self.config = config
        self.seed = seed
        self._bad_rows = bad_rows
        self._encoder = make_encoder(tokenizer, EncodeSettings.from_config(config))
        self._sources = parse_sources(config.train, "data.train", config.format)
        self._files = [resolve_files(source) for source in self._sources]
        self._recipes: dict[str, Recipe | None] = {}

    def start(self) -> Cursor:
        """Return the cursor at the beginning of the stream."""
        count = len(self._sources)
        return Cursor(
            window=0,
            row=0,
            files=[0] * count,
            places=[[0, 1] for _ in range(count)],
            taken=[0] * count,
        )

    def window(self, cursor: Cursor) -> tuple[list[Row], Cursor]:
        """Return the rows of the window that begins at the cursor, and the cursor behind it.

        Raises:
            DataError: There is a bad row, or a source without any row that can be trained on.
        """
        blocks, after = self._read_window(cursor)
        return self._arrange(blocks, cursor.window), after

    def find_unknown_fields(self) -> set[str]:
        """Look at the first window as a preflight looks at files.

        Returns:
            Fields of its rows that no format reads.

        Raises:
            DataError: A row cannot be trained on, too many are over-long, or they are for a
                classifier.
        """
        blocks, _ = self._read_window(self.start())
        cut = sum(len(block.overlong) + block.truncated for block in blocks)
        total = sum(len(block.lengths) + len(block.overlong) for block in blocks)
        if cut > self.config.max_overlong_share * total:
            raise DataError(
                f"data.train={self.config.train}: {cut:,} of the stream's first {total:,} rows are"
                f" longer than data.max_seq_length={self.config.max_seq_length}, more than"
                f" data.max_overlong_share={self.config.max_overlong_share:g}"
            )
        return {name for block in blocks for name in block.unknown}

    def _read_window(self, cursor: Cursor) -> tuple[list[TokenBlock], Cursor]:
        after = cursor.copy()
        blocks: list[TokenBlock] = []
        readers: dict[int, Iterator[TokenBlock]] = {}
        count = 0
        idle = [0] * len(self._files)

        # The next source depends on counts alone, so that every rank reads the same blocks.
        while count < self.config.shuffle_buffer:
            index = self._next_source(after)
            if index is None:
                # All have been read once; the next pass begins its own window, unless this one has
                # nothing yet.
                if count:
                    break
                index = 0
                self._rewind(after, range(len(self._files)), idle)

            # At its end, a source with a weight begins again; others wait for the next pass.
            block = next(readers.setdefault(index, self._read(index, after)), None)
            if block is None:
                del readers[index]
                if self._weighted:
                    self._rewind(after, [index], idle)
                continue
            self._report(block)
            blocks.append(block)
            after.taken[index] += len(block.lengths)
            count += len(block.lengths)

            # A source that gives rows is not idle. Without weights, a row of any source counts for
            # all.
            if len(block.lengths):
                idle = [
                    0 if n == index or not self._weighted else passes
                    for n, passes in enumerate(idle)
                ]
        after.window, after.row = cursor.window + 1, 0
        return blocks, after

    def _rewind(self, cursor: Cursor, numbers: Iterable[int], idle: list[int]) -> None:
        """Begin sources again; those that gave nothing since the last time never will."""
        for index in numbers:
            idle[index] += 1
            # The first time, the window may just have begun at the end of a pass.
            if idle[index] > 2:
                raise DataError(
                    f"data.train: {self._sources[index].path} has no row that can be trained on"
                )
            cursor.files[index], cursor.places[index] = 0, [0, 1]

    @property
    def _weighted(self) -> bool:
        return self._sources[0].weight is not None

    def _next_source(self, cursor: Cursor) -> int | None:
        """Return the source that is furthest behind its weight.

        Without weights they take turns until each has ended.
        """
        unread = [
            n
            for n, files in enumerate(self._files)
            if cursor.files[n] < len(files) or self._weighted
        ]
        if not unread:
            return None
        return min(unread, key=lambda n: (cursor.taken[n] / (self._sources[n].weight or 1), n))

    def _read(self, index: int, cursor: Cursor) -> Iterator[TokenBlock]:
        """Yield blocks of a source from the cursor on, and move the cursor along."""
        source = self._sources[index]
        files = self._files[index]
        while cursor.files[index] < len(files):
            file = files[cursor.files[index]]
            recipe = self._recipe(source, file)
            if recipe is not None:
                start = (cursor.places[index][0], cursor.places[index][1])
                for block in read_blocks(file, source, start):
                    cursor.places[index] = list(block.next)
                    yield self._tokenize(block, recipe)
            cursor.files[index] += 1
            cursor.places[index] = [0, 1]

    def _tokenize(self, block: Block, recipe: Recipe) -> TokenBlock:
        (made,) = tokenize_block(block, self._encoder, recipe)
        if self._model_folder is not None:
            locations = (made.file, made.lines)
            check_block(made.ids, made.lengths, locations, self._model_folder, self._tokenizer)
        return made

    def _recipe(self, source: Source, file: DataFile) -> Recipe | None:
        if file.path not in self._recipes:
            recipe = find_recipe(source, file)
            if recipe is not None and FORMATS.find(recipe.format).has_labels:
                raise DataError(
                    f"{file.path}: the labels of all rows must be known before training begins;"
                    " take data.streaming=false"
                )
            self._recipes[file.path] = recipe
        return self._recipes[file.path]

    def _report(self, block: TokenBlock) -> None:
        problems: list[Problem] = block.problems
        if problems and self.config.on_bad_row is OnBadRow.error:
            raise refuse(problems, "Fix them, or leave bad rows out with data.on_bad_row=skip")
        if problems and self._bad_rows is not None:
            with self._bad_rows.open("a", encoding="utf-8") as file:
                write_problems(problems, file)

    def _arrange(self, blocks: list[TokenBlock], window: int) -> list[Row]:
        documents = []
        for block in blocks:
            ends = np.cumsum(block.lengths)
            for end, length in zip(ends.tolist(), block.lengths.tolist(), strict=True):
                documents.append((block.ids[end - length : end], block.mask[end - length : end]))
        groups = [[index] for index in range(len(documents))]
        if self.config.packing:
            lengths = np.array([len(ids) for ids, _ in documents], dtype=np.int32)
            members, starts = pack_rows(lengths, self.config.max_seq_length, self.seed, window)
            groups = [members[begin:end].tolist() for begin, end in itertools.pairwise(starts)]
        order = generator(self.seed, Draw.window_order, window).permutation(len(groups)).tolist()
        rows = []
        for index in order:
            members_of_row = [documents[member] for member in groups[index]]
            rows.append(join_documents(members_of_row))
        return rows


class StreamLoader:
    """Global batches of a stream, and this rank's share of them."""

    def __init__(
        self,
        stream: RowStream,
        batch: BatchPlan | ScheduledBatch,
        rank: int,
        collator: Collator,
        settings: LoaderSettings,
    ):
        self.stream = stream
        scheduled = ScheduledBatch.of(batch)
        self.batch, self.schedule = scheduled.first, scheduled.schedule
        self.rank = rank
        self.collator = collator
        # One process keeps the order.
        self.settings = replace(settings, workers=min(settings.workers, 1))

    def from_position(
        self, position: Mapping[str, Any] | None, steps: int, reached: Reached = BEGINNING
    ) -> Iterator[StepBatch]:
        """Yield the next ``steps`` steps after a position; None is the beginning.

        Args:
            reached: The steps and tokens before it, which a growing batch depends on.

        Raises:
            CheckpointError: The position is not one of a stream of so many sources.
            DataError: A row of the stream cannot be trained on.
        """
        start = self.stream.start()
        cursor = start
        if position is not None:
            try:
                cursor = Cursor(**position)
            except TypeError as error:
                raise CheckpointError(
                    f"the checkpoint's place in the data is {dict(position)}, not a stream's"
                ) from error
            if len(cursor.files) != len(start.files):
                raise CheckpointError(
                    "the checkpoint's place in the data is that of another number of sources"
                )
        for item in load(_Stream(self, cursor, steps, reached), None, self.settings):
            if isinstance(item, DataError):
                raise item
            yield item

    def locations(self, row: int) -> list[str]:  # noqa: ARG002 - as for rows in a store
        """Return nothing: a stream's rows have no numbers."""
        return []

    def steps(self, cursor: Cursor, steps: int, reached: Reached) -> Iterator[StepBatch]:
        """Yield batches from the cursor on."""
        rows, after = self.stream.window(cursor)
        for _ in range(steps):
            size = self.schedule.rows_at(reached)
            chosen: list[Row] = []

            # The rows of a global batch, which may begin in one window and end in the next.
            while len(chosen) < size:
                if cursor.row == len(rows):
                    cursor = after
                    rows, after = self.stream.window(cursor)
                taken = rows[cursor.row : cursor.row + size - len(chosen)]
                chosen += taken
                cursor = replace(cursor, row=cursor.row + len(taken))

            # Longest first, as in ``TrainLoader``; then this rank's share.
            chosen.sort(key=lambda row: -len(row.ids))
            mine = share_of_rank(chosen, self.batch.resized(size), self.rank)
            tokens = sum(len(row.ids) for row in chosen)
            reached = Reached(reached.steps + 1, reached.tokens + tokens)
            collate = partial(self.collator.collate_rows, packed=self.stream.config.packing)
            yield StepBatch(
                micro_batches=[collate(rows_of) for rows_of in mine],
                loss_weight=sum(int(np.count_nonzero(row.mask)) for row in chosen),
                tokens=tokens,
                position=asdict(cursor),
            )


class _Stream(IterableDataset[Any]):
    """A data set for torch's DataLoader.

    An error is handed over as an item: the loader would wrap it into a traceback.
    """

    def __init__(self, loader: StreamLoader, cursor: Cursor, steps: int, reached: Reached):
        self._loader = loader
        self._cursor = cursor
        self._steps = steps
        self._reached = reached

    def __iter__(self) -> Iterator[StepBatch | DataError]:
        try:
            yield from self._loader.steps(self._cursor, self._steps, self._reached)
        except DataError as error:
            yield error
