"""Refuse tokens for which the model has no embedding.

On a GPU they end a run with a failed assertion, far from the row that holds them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llmtune.data.rows.problems import Problem
from llmtune.data.store.token_store import TokenStore
from llmtune.errors import ConfigError, DataError
from llmtune.storage.plain_json import parse_json

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

#: Where the configurations of models that see or hear say how many tokens they read.
_TEXT_PARTS = ("text_config", "language_config", "llm_config")


def embedding_rows(model_folder: Path) -> int | None:
    """Read the number of tokens that a model knows; None where its configuration does not say."""
    file = model_folder / "config.json"
    if not file.is_file():
        return None
    config: dict[str, Any] = parse_json(file.read_text())
    # Of models that see or hear as well, the part that reads text has its own.
    parts = (config, *(config.get(name) or {} for name in _TEXT_PARTS))
    return next((int(part["vocab_size"]) for part in parts if part.get("vocab_size")), None)


def find_beyond(
    folders: Iterable[str], model_folder: Path, tokenizer: PreTrainedTokenizerBase
) -> Iterator[Problem]:
    """Find rows with tokens that the model does not know, each with the first of them.

    Args:
        folders: Of token stores.
    """
    rows = embedding_rows(model_folder)
    if rows is None:
        return
    for store in (TokenStore(Path(folder)) for folder in dict.fromkeys(folders)):
        if store.max_id < rows:
            continue
        for row in range(len(store)):
            ids, _ = store.read(row)
            if len(ids) and int(ids.max()) >= rows:
                first = int(ids[ids >= rows][0])
                yield Problem(
                    *store.location(row),
                    describe_unknown_token(first, rows, model_folder, tokenizer),
                )


def check_stores(
    folders: Iterable[str], model_folder: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Refuse rows with tokens that the model does not know.

    Args:
        folders: Of token stores.

    Raises:
        DataError: With the first such row.
        ConfigError: Rows cannot be padded.
    """
    check_padding(model_folder, tokenizer)
    for problem in find_beyond(folders, model_folder, tokenizer):
        raise DataError(str(problem))


def check_padding(model_folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a padding token that the model does not know: it is looked up like any other.

    Raises:
        ConfigError: It is one.
    """
    rows, padding = embedding_rows(model_folder), tokenizer.pad_token_id
    if rows is None or padding is None or padding < rows:
        return
    end = tokenizer.eos_token_id
    known = "one that it has"
    if end is not None and end < rows:
        known = f"model.pad_token='{tokenizer.eos_token}'"
    raise ConfigError(
        f"the padding token {padding} ({tokenizer.pad_token!r}) has no embedding: the model in"
        f" {model_folder} has {rows}; take {known}, or save the model once more after"
        " model.resize_token_embeddings(len(tokenizer))"
    )


def check_block(
    ids: NDArray[np.int32],
    lengths: NDArray[np.int32],
    locations: tuple[str, NDArray[np.int64]],
    model_folder: Path,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Refuse tokens that the model does not know, before they are in a store.

    Args:
        ids: Of all rows, one after the other. Shape (tokens,).
        lengths: Shape (rows,).
        locations: File, and line of each row. Shape (rows,).

    Raises:
        DataError: With the first such row.
    """
    rows = embedding_rows(model_folder)
    if rows is None or not len(ids) or int(ids.max()) < rows:
        return
    row = int(np.searchsorted(np.cumsum(lengths), int(np.argmax(ids >= rows)), side="right"))
    file, lines = locations
    token = int(ids[ids >= rows][0])
    raise DataError(
        str(
            Problem(
                file, int(lines[row]), describe_unknown_token(token, rows, model_folder, tokenizer)
            )
        )
    )


def describe_unknown_token(
    token: int, rows: int, model_folder: Path, tokenizer: PreTrainedTokenizerBase
) -> str:
    """The message about a token that the model does not know.

    Args:
        rows: Tokens that it knows.
    """
    word = tokenizer.convert_ids_to_tokens(token)
    return (
        f"token {token} ({word!r}) has no embedding: the model in {model_folder} has {rows}, its"
        f" tokenizer {len(tokenizer)}. Tokens were added to the tokenizer and not to the model:"
        " take the tokenizer that the model was saved with, or save the model once more after"
        " model.resize_token_embeddings(len(tokenizer))"
    )
