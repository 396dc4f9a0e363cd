"""Make tokenized rows on disk from sources, once, and an index of the rows that are trained on.

The tokens of each source are in the cache under a hash of its content and of all that shapes them;
the index, under a hash of those and of how sources are mixed, split and packed. A second start
finds both and reads a summary.
"""

from __future__ import annotations

import contextlib
import itertools
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmtune.config.cache_folder import INSTEAD, KEY
from llmtune.config.groups.data import DataConfig
from llmtune.data.index import LABELS, LABELS_VERSION, IndexWriter
from llmtune.data.prepared_data import SAMPLES, SUMMARY, SamplePrompt, open_index, read_problems
from llmtune.data.read.fingerprint import hash_tokenizer, identify_file
from llmtune.data.read.parse_sources import parse_sources
from llmtune.data.read.sources import Source, resolve_files
from llmtune.data.rows.problem_report import refuse
from llmtune.data.rows.problems import RowError
from llmtune.data.settings import check_eval_sources, check_streamed_sources
from llmtune.data.tokenize.chat_template import ChatTemplates
from llmtune.data.tokenized_source import (
    ProgressCallback,
    find_conversations,
    token_folder,
    tokenize_source,
)
from llmtune.draws import DRAWS_VERSION
from llmtune.errors import ConfigError
from llmtune.plan.prepared_data import PreparedData
from llmtune.security.trust import require_own
from llmtune.storage.atomic import remove_folder, write_cache_folder
from llmtune.storage.hashing import hash_json
from llmtune.storage.plain_fields import from_plain

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: Part of the cache key; raise it when rows are mixed, split or packed differently.
INDEX_VERSION = 2

#: Evaluation prompts that are answered before and after training.
SAMPLE_PROMPTS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class _TokenizedSources:
    """The sources of a split, and the keys of their tokens in the cache."""

    sources: list[Source]
    keys: list[str]

    def folders(self, cache_dir: Path) -> list[str]:
        """Return the folders of their tokens."""
        return [str(token_folder(cache_dir, key)) for key in self.keys]


def prepare_data(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    cache_dir: Path,
    watch: ProgressCallback | None = None,
    strict: bool = True,
    learns_numbers: bool = False,
) -> PreparedData:
    """Read, tokenize, check, split, mix, pack and store.

    A second call with the same content only reads the summary.

    Args:
        watch: Told of the progress of tokenizing.
        strict: Refuse data with problems; otherwise they are in :func:`read_problems`.
        learns_numbers: Labels that are numbers are values, not classes: ``model.task=regression``.

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
        stream = _identify_stream(sources)
        sources = []

    # The tokens of each source.
    def tokenize(of_split: list[Source]) -> _TokenizedSources:
        keys = [
            tokenize_source(source, config, tokenizer, tokenizer_hash, seed, cache_dir, watch)
            for source in of_split
        ]
        return _TokenizedSources(sources=of_split, keys=keys)

    splits = tokenize(sources), tokenize(eval_sources)

    # The index over them.
    identity = [stream, "numbers"] if learns_numbers else stream
    fingerprint = _fingerprint(config, seed, tokenizer_hash, *splits, identity)
    folder = cache_dir / "data" / "prepared" / fingerprint
    if _is_outdated(folder):
        remove_folder(folder)
    if not (folder / SUMMARY).is_file():
        with write_cache_folder(folder) as aside:
            _write_index(config, tokenizer, seed, cache_dir, splits, aside, learns_numbers)
    require_own(folder, KEY, INSTEAD)
    values = _read_summary(folder)
    data = from_plain(PreparedData, {"folder": str(folder), "fingerprint": fingerprint, **values})
    if strict and data.fatal:
        advice = (
            "Fix them, or leave bad rows out with data.on_bad_row=skip; llmtune data shows them all"
        )
        raise refuse(itertools.islice(read_problems(data), data.fatal), advice)
    return data


def _read_summary(folder: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((folder / SUMMARY).read_text())
    values.pop(LABELS, None)
    return values


def _is_outdated(folder: Path) -> bool:
    """Tell whether an index of rows with labels is that of an earlier version."""
    if not (folder / SUMMARY).is_file():
        return False
    summary = json.loads((folder / SUMMARY).read_text())
    has_labels = bool(summary["classes"]) or "label_kind" in summary
    return has_labels and summary.get(LABELS) != LABELS_VERSION


def _write_index(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    cache_dir: Path,
    splits: tuple[_TokenizedSources, _TokenizedSources],
    folder: Path,
    learns_numbers: bool,
) -> None:
    """Write the index, its summary, and the evaluation prompts.

    Args:
        splits: For training, and for evaluation.
    """
    train, evaluation = splits
    stores = train.folders(cache_dir)
    eval_stores = evaluation.folders(cache_dir)
    IndexWriter(
        config=config,
        sources=train.sources,
        stores=stores,
        eval_stores=eval_stores,
        seed=seed,
        folder=folder,
        learns_numbers=learns_numbers,
    ).write()
    samples = _find_samples(
        folder, eval_stores or stores, evaluation.sources or train.sources, tokenizer
    )
    text = json.dumps([asdict(sample) for sample in samples], ensure_ascii=False, indent=1)
    (folder / SAMPLES).write_text(text)


def _fingerprint(
    config: DataConfig,
    seed: int,
    tokenizer_hash: str,
    train: _TokenizedSources,
    evaluation: _TokenizedSources,
    other: Any,
) -> str:
    """Hash all that shapes the index; its order is part of it.

    Args:
        other: The files of a stream, and how labels are read.
    """
    mixing = [(source.repeat, source.weight) for source in train.sources]
    settings = [
        None if evaluation.sources else config.val_set_size,
        config.packing,
        config.on_bad_row.value,
        config.max_overlong_share,
        config.max_seq_length,
    ]
    versions = [INDEX_VERSION, DRAWS_VERSION, tokenizer_hash]
    return hash_json([*versions, train.keys, evaluation.keys, other, mixing, settings, seed])


def _identify_stream(sources: list[Source]) -> list[list[str]]:
    """Return names and sizes of the files of a stream, which are too large to be hashed.

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


def _find_samples(
    folder: Path, stores: list[str], sources: list[Source], tokenizer: PreTrainedTokenizerBase
) -> list[SamplePrompt]:
    """Read the first evaluation conversations again from their files."""
    if json.loads((folder / SUMMARY).read_text())["eval"] is None or not tokenizer.chat_template:
        return []
    rows = open_index(folder, stores, "eval")
    locations = [rows.source_location(index) for index in range(min(SAMPLE_PROMPTS, len(rows)))]
    found = find_conversations([replace(s, limit=None) for s in sources], locations)
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
