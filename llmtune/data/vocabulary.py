"""Tokens for which the model has no embedding: on a GPU they end a run far from where they are, with a failed assertion."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llmtune.data.problems import place
from llmtune.data.store import TokenStore
from llmtune.errors import DataError

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase


def embedding_rows(model_folder: Path) -> int | None:
    """Tokens that a model knows, by its configuration; None where that does not say."""
    file = model_folder / "config.json"
    if not file.is_file():
        return None
    config: dict[str, Any] = json.loads(file.read_text())
    rows = config.get("vocab_size") or (config.get("text_config") or {}).get("vocab_size")
    return int(rows) if rows else None


def check_stores(folders: Iterable[str], model_folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse rows with tokens that the model does not know.

    Args:
        folders: Of token stores.

    Raises:
        DataError: With the first such row.
    """
    rows = embedding_rows(model_folder)
    if rows is None:
        return
    for store in (TokenStore(Path(folder)) for folder in folders):
        if store.max_id < rows:
            continue
        for row in range(len(store)):
            ids, _ = store.read(row)
            if len(ids) and int(ids.max()) >= rows:
                raise beyond(store.place(row), int(ids.max()), rows, model_folder, tokenizer)


def check_block(
    ids: NDArray[np.int32],
    lengths: NDArray[np.int32],
    places: tuple[str, NDArray[np.int64]],
    model_folder: Path,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """The same of tokens on their way.

    Args:
        ids: Of all rows, one after the other. Shape (tokens,).
        lengths: Shape (rows,).
        places: File, and line of each row. Shape (rows,).

    Raises:
        DataError: With the first such row.
    """
    rows = embedding_rows(model_folder)
    if rows is None or not len(ids) or int(ids.max()) < rows:
        return
    row = int(np.searchsorted(np.cumsum(lengths), int(np.argmax(ids >= rows)), side="right"))
    file, lines = places
    raise beyond((file, int(lines[row])), int(ids[ids >= rows][0]), rows, model_folder, tokenizer)


def beyond(
    where: tuple[str, int], token: int, rows: int, model_folder: Path, tokenizer: PreTrainedTokenizerBase
) -> DataError:
    """The error of one token."""
    word = tokenizer.convert_ids_to_tokens(token)
    return DataError(
        f"{place(*where)}: token {token} ({word!r}) has no embedding: the model in {model_folder} has {rows}, its tokenizer "
        f"{len(tokenizer)}. Tokens were added to the tokenizer and not to the model: take the tokenizer that the model was "
        "saved with, or save the model once more after model.resize_token_embeddings(len(tokenizer))"
    )
