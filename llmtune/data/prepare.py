"""Sources become tokenised rows on disk, once: Arrow files in the cache, keyed by a hash of all that shapes them."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
import sys
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from llmtune.config.schema import DataConfig
from llmtune.data.conversation import Conversation
from llmtune.data.render import render
from llmtune.data.sources import BUILTIN, read_source
from llmtune.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

#: Part of the cache key; raise it when rows come out differently.
LAYOUT_VERSION = 1

#: Held-out prompts that are answered before and after training.
SAMPLE_PROMPTS = 3


@dataclass(frozen=True, slots=True)
class SplitSummary:
    """Counts of one split."""

    rows: int
    tokens: int
    trained_tokens: int
    dropped: int
    truncated: int


@dataclass(frozen=True, slots=True)
class PreparedData:
    """Where the tokenised rows lie, and what they are."""

    folder: str
    fingerprint: str
    """Hash of sources, template, tokenizer and settings."""
    train: SplitSummary
    eval: SplitSummary | None

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> PreparedData:
        """From plain values."""
        held_out = values["eval"]
        return cls(
            folder=values["folder"],
            fingerprint=values["fingerprint"],
            train=SplitSummary(**values["train"]),
            eval=SplitSummary(**held_out) if held_out else None,
        )


@dataclass(frozen=True, slots=True)
class SamplePrompt:
    """A held-out question with the answer that the data gives."""

    messages: list[dict[str, str]]
    expected: str


def prepare_data(config: DataConfig, tokenizer: PreTrainedTokenizerBase, seed: int, cache_dir: Path) -> PreparedData:
    """Read, split, render and store; a second call with the same content only reads the summary.

    Raises:
        DataError: With ``file:line`` where a row is at fault.
    """
    fingerprint = _fingerprint(config, tokenizer, seed)
    folder = cache_dir / "data" / fingerprint
    if not (folder / "summary.json").is_file():
        aside = folder.with_name(f"{fingerprint}.{os.getpid()}.tmp")
        try:
            _write_rows(config, tokenizer, seed, aside)
            # Where another process published the same rows first, the rename fails and theirs are as good.
            with contextlib.suppress(OSError):
                aside.rename(folder)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    values = json.loads((folder / "summary.json").read_text())
    return PreparedData.from_dict({"folder": str(folder), "fingerprint": fingerprint, **values})


def _write_rows(config: DataConfig, tokenizer: PreTrainedTokenizerBase, seed: int, folder: Path) -> None:
    train, held_out = _split(config, seed)
    summary = {
        "train": asdict(_store(train, config, tokenizer, folder / "train")),
        "eval": asdict(_store(held_out, config, tokenizer, folder / "eval")) if held_out else None,
    }
    samples = [{"messages": c.prompt(), "expected": c.messages[-1].content} for c in held_out[:SAMPLE_PROMPTS]]
    (folder / "samples.json").write_text(json.dumps(samples, ensure_ascii=False, indent=1))
    (folder / "summary.json").write_text(json.dumps(summary))


def open_rows(data: PreparedData, split: str) -> Dataset:
    """Memory-mapped rows of ``train`` or ``eval``: ``input_ids``, ``mask``, ``length``, ``trained_tokens``."""
    from datasets import load_from_disk

    rows: Any = load_from_disk(str(Path(data.folder) / split))
    return rows


def read_samples(data: PreparedData) -> list[SamplePrompt]:
    """The held-out prompts, at most three; none without an evaluation split."""
    return [SamplePrompt(**sample) for sample in json.loads((Path(data.folder) / "samples.json").read_text())]


def _split(config: DataConfig, seed: int) -> tuple[list[Conversation], list[Conversation]]:
    """Training and held-out conversations; the split is drawn with the seed, the training order is the files'."""
    rows = [row for source in _sources(config.train) for row in read_source(source, config.format, seed)]
    if config.eval is not None:
        return rows, [row for source in _sources(config.eval) for row in read_source(source, config.format, seed)]
    size = config.val_set_size
    count = size if isinstance(size, int) else max(1, round(size * len(rows))) if size else 0
    if count >= len(rows):
        raise DataError(
            f"data.val_set_size={size} takes all {len(rows)} row(s) of data.train={config.train}: "
            "add rows, or take data.val_set_size=0"
        )
    held_out = random.Random(seed).sample(range(len(rows)), count)
    chosen = set(held_out)
    return [row for index, row in enumerate(rows) if index not in chosen], [rows[index] for index in held_out]


def _store(
    conversations: list[Conversation], config: DataConfig, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> SplitSummary:
    from datasets import Dataset, Features, Sequence, Value, disable_progress_bars

    disable_progress_bars()
    columns: dict[str, list[Any]] = {"input_ids": [], "mask": [], "length": [], "trained_tokens": []}
    dropped = truncated = 0
    for conversation in conversations:
        row = render(conversation, tokenizer, config.max_seq_length, config.overlong, config.train_on_inputs)
        if row is None:
            dropped += 1
            continue
        truncated += row.truncated
        columns["input_ids"].append(row.input_ids)
        columns["mask"].append(row.mask)
        columns["length"].append(len(row.input_ids))
        # The first token has nothing before it to be predicted from.
        columns["trained_tokens"].append(sum(row.mask[1:]))
    if not columns["length"]:
        raise DataError(
            f"all {dropped} row(s) are longer than data.max_seq_length={config.max_seq_length}: raise it, "
            "or take data.overlong=truncate"
        )
    features = Features(
        {
            "input_ids": Sequence(Value("int32")),
            "mask": Sequence(Value("bool")),
            "length": Value("int32"),
            "trained_tokens": Value("int32"),
        }
    )
    Dataset.from_dict(columns, features=features).save_to_disk(str(folder))
    return SplitSummary(
        len(columns["length"]), sum(columns["length"]), sum(columns["trained_tokens"]), dropped, truncated
    )


def _sources(value: Any) -> list[str]:
    return [str(source) for source in value] if isinstance(value, list) else [str(value)]


def _fingerprint(config: DataConfig, tokenizer: PreTrainedTokenizerBase, seed: int) -> str:
    """Hash of the sources' bytes and of everything that shapes the rows."""
    digest = xxhash.xxh3_128()
    settings = {key: value.value if isinstance(value, Enum) else value for key, value in asdict(config).items()}
    digest.update(json.dumps([LAYOUT_VERSION, seed, settings, tokenizer.chat_template], sort_keys=True).encode())
    backend: Any = tokenizer
    digest.update(backend.backend_tokenizer.to_str().encode())
    sources = _sources(config.train) + (_sources(config.eval) if config.eval is not None else [])
    for source in sources:
        name = re.sub(r"@\d+$", "", source)
        path = Path(source if Path(source).is_file() else name).expanduser()
        if name in BUILTIN:
            digest.update(f"{name} {sys.version}".encode())
        elif path.is_file():
            with path.open("rb") as file:
                while block := file.read(1 << 22):
                    digest.update(block)
    return digest.hexdigest()[:24]
