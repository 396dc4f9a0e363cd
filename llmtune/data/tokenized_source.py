"""Take the tokens of one source from the cache, or have the workers make them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from llmtune.config.cache_folder import INSTEAD, KEY
from llmtune.config.groups.data import DataConfig
from llmtune.data.formats.format import FORMATS
from llmtune.data.formats.recipe import Recipe
from llmtune.data.read.blocks import Block, Lines, count_rows, parse_rows, select_rows
from llmtune.data.read.find_recipes import find_recipe, find_recipes
from llmtune.data.read.fingerprint import hash_files
from llmtune.data.read.readers import read_blocks
from llmtune.data.read.sources import DataFile, Source, is_compressed, resolve_files
from llmtune.data.rows.conversation import Conversation
from llmtune.data.rows.problems import RowError
from llmtune.data.rows.values import Row
from llmtune.data.store.store_writer import write_store
from llmtune.data.store.token_store import is_stored
from llmtune.data.tokenize.chat_template import check_chat_template
from llmtune.data.tokenize.settings import EncodeSettings
from llmtune.data.tokenize.token_row import TokenBlock
from llmtune.data.tokenize.workers import TokenizerPool, Work
from llmtune.draws import DRAWS_VERSION, Draw, draw_rows
from llmtune.security.trust import require_own
from llmtune.storage.atomic import remove_folder, write_cache_folder
from llmtune.storage.hashing import hash_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: Part of the cache key; raise it when rows come out differently.
TOKENS_VERSION = 6

#: Below this many bytes, starting workers takes longer than tokenizing.
SMALL_BYTES = 8_000_000

#: Most workers that ``auto`` takes.
MAX_AUTO_WORKERS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizeProgress:
    """Progress of tokenizing a source."""

    source: str
    rows: int
    tokens: int
    seconds: float
    share: float | None
    """Share of the source's bytes; None where its size says nothing about the rows."""


ProgressCallback = Callable[[TokenizeProgress], None]


def tokenize_source(
    source: Source,
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    tokenizer_hash: str,
    seed: int,
    cache: Path,
    watch: ProgressCallback | None,
) -> str:
    """Tokenize a source unless its tokens are in the cache already; return their key there.

    Raises:
        DataError: A file cannot be read, or there is no row in it.
        ConfigError: The rows are chats, and the tokenizer has no chat template.
        MissingPrerequisiteError: The tokens in the cache are another user's, or others may write to
            them.
    """
    # The key: content, tokenizer, and all settings that shape tokens.
    files = resolve_files(source)
    settings = EncodeSettings.from_config(config)
    shaping = [settings.max_seq_length, settings.overlong.value, settings.train_on_inputs]
    shaping.append(settings.allow_special_tokens)
    drawn = [source.limit, seed, DRAWS_VERSION] if source.limit else None
    contents = hash_files(files, source, cache)
    columns = [source.fields, sorted(source.ignore)]
    # A plug-in's format may read a row differently tomorrow.
    shaping += [plugins] if (plugins := FORMATS.hash_plugins()) else []
    key = hash_json(
        [TOKENS_VERSION, tokenizer_hash, contents, source.format, *columns, drawn, shaping]
    )
    folder = token_folder(cache, key)
    if not is_stored(folder):
        # An earlier version may have left one.
        remove_folder(folder)
        recipes = find_recipes(source, files)
        if any(FORMATS.find(recipe.format).is_chat for recipe in recipes.values()):
            check_chat_template(tokenizer, tokenizer.name_or_path)
        with (
            write_cache_folder(folder) as aside,
            TokenizerPool(tokenizer, settings, _workers(config, files), aside) as pool,
        ):
            watched = _Watched(source, files, watch)
            blocks = pool.map(read_source(source, files, recipes, seed, contents), watched.pulse)
            write_store(watched.count(blocks), aside)
    require_own(folder, KEY, INSTEAD)
    return key


def token_folder(cache: Path, key: str) -> Path:
    """Return the folder of a source's tokens in the cache."""
    return cache / "data" / "tokens" / key


def read_source(
    source: Source,
    files: list[DataFile],
    recipes: dict[str, Recipe],
    seed: int,
    contents: list[list[str]],
) -> Iterator[Work]:
    """Yield the blocks of a source with their recipes, only the drawn rows where ``limit`` is set.

    Args:
        contents: Name and content hash of each file. No two sources draw the same numbers, and a
            source that is moved draws those that it drew.

    Raises:
        DataError: A file cannot be read.
    """
    filled = [file for file in files if file.path in recipes]

    def blocks() -> Iterator[Block]:
        for file in filled:
            yield from read_blocks(file, source)

    chosen = blocks()
    if source.limit is not None:
        count = count_rows(blocks())
        if source.limit < count:
            position = int(hash_json([content for _, content in contents]), 16)
            drawn = draw_rows(count, source.limit, seed, Draw.source_rows, position)
            chosen = select_rows(blocks(), drawn.tolist())
    return ((block, recipes[block.file]) for block in chosen)


def find_conversations(
    sources: Sequence[Source], locations: list[tuple[int, str, int]]
) -> list[Conversation]:
    """Read the conversations at some locations again, in that order.

    Args:
        locations: Index of the source, file, line.
    """
    conversations: dict[tuple[int, str, int], Conversation] = {}
    for index in sorted({index for index, _, _ in locations}):
        for file in resolve_files(sources[index]):
            lines = {
                line for source, path, line in locations if (source, path) == (index, file.path)
            }
            recipe = find_recipe(sources[index], file) if lines else None
            if recipe is None:
                continue
            for line, row in _read_lines(sources[index], file, lines):
                if not isinstance(row, RowError):
                    conversation, _ = recipe.read(row)
                    conversations.setdefault((index, file.path, line), conversation)
    return [conversations[location] for location in locations if location in conversations]


def _read_lines(
    source: Source, file: DataFile, lines: set[int]
) -> Iterator[tuple[int, Row | RowError]]:
    """Read the rows on some lines of a file."""
    for block in read_blocks(file, source):
        if _may_hold(block, lines):
            yield from ((line, row) for line, row in parse_rows(block) if line in lines)


def _may_hold(block: Block, lines: set[int]) -> bool:
    if isinstance(block.content, Lines):
        last = block.first + block.content.count(b"\n")
    elif isinstance(block.content, list):
        last = block.content[-1][0]
    else:
        last = block.first + block.content.num_rows
    return any(block.first <= line <= last for line in lines)


def _workers(config: DataConfig, files: list[DataFile]) -> int:
    """Return the number of processes that tokenize; 0 for none."""
    if isinstance(config.num_workers, int):
        return config.num_workers
    if sum(file_size(file) for file in files) < SMALL_BYTES:
        return 0
    return min(len(os.sched_getaffinity(0)), MAX_AUTO_WORKERS)


def file_size(file: DataFile) -> int:
    """Return the bytes of a file on disk; any other file counts as large."""
    if file.kind == "builtin":
        return 0
    path = Path(file.path)
    return path.stat().st_size if path.is_file() else SMALL_BYTES


class _Watched:
    """Counts the blocks of a source, and reports its progress.

    It reports after each block, and while a block takes long.
    """

    def __init__(self, source: Source, files: list[DataFile], watch: ProgressCallback | None):
        self._source, self._watch = source, watch
        self._started = time.monotonic()
        self._rows = self._tokens = 0
        self._sizes = {file.path: file_size(file) for file in files}
        # Position and size are both in bytes of the file only of JSON lines that are local and not
        # compressed.
        known = all(
            file.kind == "jsonl" and not is_compressed(file.path) and "://" not in file.path
            for file in files
        )
        self._known = known and not source.limit
        self._before = self._position = 0
        self._current = ""

    def count(self, blocks: Iterator[TokenBlock]) -> Iterator[TokenBlock]:
        """Count the blocks on their way to the writer."""
        for block in blocks:
            yield block
            self._rows += len(block.lengths)
            self._tokens += len(block.ids)
            if block.file != self._current:
                self._before += self._sizes.get(self._current, 0)
                self._current = block.file
            self._position = block.position
            self.pulse(0)

    def pulse(self, tokens: int) -> None:
        """Report the progress.

        Args:
            tokens: Of the text that is being tokenized.
        """
        if self._watch is None:
            return
        share = None
        if self._known:
            share = (self._before + self._position) / max(1, sum(self._sizes.values()))
        seconds = time.monotonic() - self._started
        self._watch(
            TokenizeProgress(
                source=self._source.path,
                rows=self._rows,
                tokens=self._tokens + tokens,
                seconds=seconds,
                share=share,
            )
        )
