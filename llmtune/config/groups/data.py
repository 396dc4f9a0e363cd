"""The keys of ``data``: which rows are trained on, and how they become tokens."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, EnumMeta
from typing import Any

from omegaconf import MISSING

#: The value of ``data.format`` that follows the fields of each file's first row.
AUTO = "auto"


class _ByNameOrValue(EnumMeta):
    """An enum that OmegaConf also looks up by values: ``raise`` cannot be a member's name."""

    def __getitem__(cls, name: str) -> Any:
        members: dict[str, Any] = dict(cls.__members__)
        by_value = {member.value: member for member in members.values()}
        return by_value.get(name) or super().__getitem__(name)


class Overlong(Enum, metaclass=_ByNameOrValue):
    """The treatment of a row of more than ``max_seq_length`` tokens."""

    drop = "drop"
    truncate = "truncate"
    split = "split"
    error = "raise"


class OnBadRow(Enum, metaclass=_ByNameOrValue):
    """The treatment of a row that cannot be trained on."""

    error = "raise"
    skip = "skip"


def name_data(value: Any) -> str:
    """Return the sources of ``data.train`` or ``data.eval`` as a text for messages."""
    entries = value if isinstance(value, list) else [value]
    return ", ".join(
        str(entry.get("path") if isinstance(entry, dict) else entry) for entry in entries
    )


@dataclass(slots=True, kw_only=True)
class DataConfig:
    """The rows that are trained on, and how they become tokens."""

    train: Any = MISSING
    """A file, a pattern, a folder, a URL, a Hugging Face id, ``stdlib_docs``, or a list of them.

    ``@N`` behind it takes N rows drawn with the seed. Instead of a text, a mapping with ``path``
    and any of ``format fields ignore limit repeat weight split name revision``.
    """
    eval: Any = None
    """The same for evaluation; by default ``val_set_size`` rows are split off the training data."""
    val_set_size: int | float = 0.05
    """Number of rows, or share of the rows (below 1), that is split off for evaluation; 0 for none.

    A long text is split off whole, whatever ``overlong`` says.
    """
    format: str = AUTO
    """Format of the rows (``data/formats/``).

    ``auto`` derives it from the fields of each file's first row.
    """
    chat_template: str | None = None
    """A name in ``conf/chat_template/`` or a ``.jinja`` file; without it the tokenizer's own."""
    max_seq_length: int = 2048
    """Longest row, in tokens; with packing, the length of every row."""
    packing: bool = False
    """Put several short rows into one of ``max_seq_length``; they do not see each other."""
    overlong: Overlong = Overlong.drop
    """Treatment of longer rows: ``drop``, ``truncate``, ``raise``, or ``split`` (plain text only).

    All of them are counted.
    """
    class_weights: Any = "none"
    """Weights of the classes in the loss.

    ``none``; ``balanced``, so that each class weighs the same in all; or a list, in the order of
    the classes.
    """
    max_overlong_share: float = 0.1
    """Share of a source's rows that may be dropped or truncated before llmtune refuses the data."""
    train_on_inputs: bool = False
    """Also train on what the user and the system say."""
    allow_special_tokens: bool = False
    """Texts may hold special tokens, such as ``<|im_end|>``, and the tokenizer reads them as such.

    This is for texts that have been rendered with a chat template. Otherwise a row that holds one
    is refused.
    """
    on_bad_row: OnBadRow = OnBadRow.error
    """Reaction to rows that cannot be trained on: ``raise`` or ``skip``.

    ``raise`` refuses the data; ``skip`` leaves the rows out and lists them in a file.
    """
    num_workers: int | str = "auto"
    """Processes that tokenize; ``auto`` is one per core, and none for small files."""
    dataloader_num_workers: int = 0
    """Processes per rank that make batches ahead of the step; 0 makes them in the rank itself."""
    pin_memory: bool | str = "auto"
    """Batches in page-locked host memory, which copies to a GPU faster; ``auto`` on CUDA."""
    streaming: bool = False
    """Tokenize while training, for data larger than the disk.

    It needs ``train.max_steps``, and ``data.eval`` or no evaluation rows.
    """
    shuffle_buffer: int = 10_000
    """Rows among which streaming shuffles and packs."""
