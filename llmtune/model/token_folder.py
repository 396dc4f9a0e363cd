"""A model folder that knows more tokens: in its tokenizer, and in the tables with a row for each.

The base's files are linked, or copied where the disk cannot link them, and one file holds the
tables. A new token's row is the mean of the rows of the tokenizer's own tokens, as in transformers
(``resize_token_embeddings``), without its noise. So every rank, every placement and every restart
begins with the same rows, and whatever reads a model folder reads this one.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmtune.config.groups.model import ModelConfig
from llmtune.errors import ConfigError
from llmtune.model.folders.linked import link_base, write_index
from llmtune.model.source import make_once, resolve_model_folder
from llmtune.model.tokenizer import load_tokenizer
from llmtune.model.weights.files import Entry, identify_weights, read_entries, read_slice
from llmtune.plan.architecture.corrected_architecture import correct_architecture
from llmtune.storage.hashing import short_hash
from llmtune.storage.plain_json import parse_json
from llmtune.storage.tensors.row_blocks import row_ranges

if TYPE_CHECKING:
    import torch

#: Part of the cache key; raise it when rows are made or stored differently.
_VERSION = 1

#: The file with the tables. Its name comes after those of the base's files, so that its tensors
#: replace theirs.
_TABLES = "tables.safetensors"

_CONFIG = "config.json"
_TOKENIZER = "tokenizer.json"

_RESIZE = (
    "resize the model with transformers' resize_token_embeddings, save it, and name that folder"
)


def resolve_base_folder(
    config: ModelConfig, new_tokens: Sequence[str], cache_dir: Path, say: Callable[[str], None]
) -> Path:
    """Return the folder that training begins from: the model's, with ``tuner.new_tokens``.

    Args:
        say: Told what takes a while.

    Raises:
        MissingPrerequisiteError: The model cannot be found.
        ConfigError: A token is there already, or the model's tables cannot be changed.
    """
    base = resolve_model_folder(config, cache_dir, say)
    if not new_tokens:
        return base
    tokenizer = (base / _TOKENIZER).read_bytes() if (base / _TOKENIZER).is_file() else b""
    identity = [_VERSION, identify_weights(base), short_hash(tokenizer), list(new_tokens)]
    name = f"{base.name[:40]}-tokens-{short_hash(json.dumps(identity).encode())}"
    return make_once(
        cache_dir / "models" / name,
        lambda folder: _write_folder(base, folder, config, new_tokens, say),
    )


def find_token_ids(folder: Path, tokens: Sequence[str]) -> list[int]:
    """Return the numbers of tokens that were added to the tokenizer of a model folder."""
    if not tokens:
        return []
    added = parse_json((folder / _TOKENIZER).read_text())["added_tokens"]
    numbers = {entry["content"]: int(entry["id"]) for entry in added}
    return [numbers[token] for token in tokens]


def find_token_numbers(tokenizer: Any, texts: Sequence[str], name: str) -> dict[str, int]:
    """Return the numbers of tokens that are given as texts, as a tokenizer encodes each by itself.

    Args:
        name: The model's.

    Raises:
        ConfigError: A text is not exactly one token.
    """
    numbers = {}
    for text in texts:
        ids = tokenizer.encode(text, add_special_tokens=False)
        if len(ids) == 1 and (ids[0] != tokenizer.unk_token_id or text == tokenizer.unk_token):
            numbers[text] = int(ids[0])
            continue
        tokens = ", ".join(map(repr, tokenizer.convert_ids_to_tokens(ids)))
        what = f"{len(ids)} tokens of {name} ({tokens})" if len(ids) > 1 else f"no token of {name}"
        raise ConfigError(
            f"tuner.trainable_token_indices: {text!r} is {what}, and a row is that of one token;"
            f" tuner.new_tokens=[{text!r}] makes it one"
        )
    return numbers


def _write_folder(
    base: Path,
    folder: Path,
    config: ModelConfig,
    tokens: Sequence[str],
    say: Callable[[str], None],
) -> None:
    tokenizer: Any = load_tokenizer(base, config)
    known = len(tokenizer)
    numbers = _add_tokens(tokenizer, tokens, config.name_or_path)
    settings: dict[str, Any] = parse_json((base / _CONFIG).read_text())
    settings |= correct_architecture(base)
    tables = _find_tables(base, config.name_or_path)
    least = min(entry.shape[0] for entry in tables.values())
    if known > least:
        raise ConfigError(
            f"tuner.new_tokens: the tokenizer of {config.name_or_path} has {known} tokens, and the"
            f" model {least} rows for them; {_RESIZE}"
        )
    rows = max(len(tokenizer), *(entry.shape[0] for entry in tables.values()))
    text = settings.get("text_config")
    (text if isinstance(text, dict) else settings)["vocab_size"] = rows
    link_base(base, folder, settings, say)
    _write_tables(folder, tables, known, numbers, rows)
    _save_tokenizer(tokenizer, folder)
    grown = rows - max(entry.shape[0] for entry in tables.values())
    where = f"{grown} rows were added to" if grown else "which had rows to spare in"
    say(f"tuner.new_tokens: {len(tokens)} tokens, {where} {', '.join(sorted(tables))}")


def _add_tokens(tokenizer: Any, tokens: Sequence[str], name: str) -> list[int]:
    """Add tokens to a tokenizer, which are found in any text.

    Raises:
        ConfigError: It has one of them, or numbers its tokens with gaps.
    """
    from transformers import AddedToken

    vocabulary = tokenizer.get_vocab()
    if known := [token for token in tokens if token in vocabulary]:
        number = vocabulary[known[0]]
        raise ConfigError(
            f"tuner.new_tokens: {known[0]} is token {number} of {name} already; leave it out, and"
            f" train its row with tuner.trainable_token_indices=[{number}]"
        )
    first = len(tokenizer)
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in tokens])
    numbers = [int(number) for number in tokenizer.convert_tokens_to_ids(list(tokens))]
    if numbers != list(range(first, first + len(tokens))) or max(vocabulary.values()) >= first:
        raise ConfigError(
            f"tuner.new_tokens: the tokenizer of {name} has {first} tokens that are not numbered"
            " without gaps, and new ones would not come behind them"
        )
    return numbers


def _find_tables(base: Path, name: str) -> dict[str, Entry]:
    """Find the tables with a row for each token, by their names in the files.

    Raises:
        ConfigError: The model has others beside them, which would not have the new rows.
    """
    from llmtune.model.skeleton import build_skeleton
    from llmtune.model.weights.names import match_names

    model = build_skeleton(base)
    inputs, output = model.get_input_embeddings(), model.get_output_embeddings()
    has_bias = getattr(output, "bias", None) is not None
    if has_bias or getattr(model.config, "vocab_size_per_layer_input", None):
        what = "its output projection has a bias" if has_bias else "each layer has embeddings"
        raise ConfigError(
            f"tuner.new_tokens: tokens cannot be added to {name}, because {what}; {_RESIZE}"
        )
    modules = [module for module in (inputs, output) if module is not None]
    stored = read_entries(base)
    direct = match_names(model, stored).direct
    tables = {
        direct[name]: stored[direct[name]]
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if name in direct and any(parameter is module.weight for module in modules)
    }
    if not tables or not all(entry.dtype.is_floating_point for entry in tables.values()):
        raise ConfigError(
            f"tuner.new_tokens: the files of {name} hold no embeddings of 16 or 32 bits; take the"
            " model that is not quantized"
        )
    return tables


def _write_tables(
    folder: Path, tables: dict[str, Entry], known: int, numbers: Sequence[int], rows: int
) -> None:
    """Write the tables with the new tokens' rows, block by block.

    Args:
        known: Tokens whose mean a new row is.
        numbers: Of the new tokens.
        rows: Of the tables, once they are written.
    """
    import torch

    from llmtune.storage.tensors.safetensors_writer import TensorFile
    from llmtune.storage.tensors.tensor_spec import TensorSpec

    specs = [
        TensorSpec(name, entry.dtype, (rows, entry.shape[1])) for name, entry in tables.items()
    ]
    with TensorFile(folder / _TABLES, specs) as file:
        for spec in specs:
            entry = tables[spec.name]
            mean = _mean_row(entry, min(known, entry.shape[0])).to(spec.dtype)
            for first, last in row_ranges(spec.shape):
                block = torch.zeros(last - first, spec.shape[1], dtype=spec.dtype)
                stored = max(0, min(last, entry.shape[0]) - first)
                block[:stored] = _read_rows(entry, first, stored)
                if own := [number - first for number in numbers if first <= number < last]:
                    block[own] = mean
                file.write(block)
    index = {name: entry.file.name for name, entry in read_entries(folder).items()}
    write_index(folder, {**index, **dict.fromkeys(tables, _TABLES)})


def _mean_row(entry: Entry, count: int) -> torch.Tensor:
    """Return the mean of the first rows of a table, added up in fp64. Shape (width,)."""
    import torch

    total = torch.zeros(entry.shape[1], dtype=torch.float64)
    for first, last in row_ranges((count, entry.shape[1])):
        total += _read_rows(entry, first, last - first).double().sum(0)
    return total / count


def _read_rows(entry: Entry, first: int, count: int) -> torch.Tensor:
    width = entry.shape[1]
    return read_slice(entry, first * width, count * width).view(count, width)


def _save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Save a tokenizer in the place of files that are linked to the base's."""
    with tempfile.TemporaryDirectory(prefix="llmtune-") as aside:
        tokenizer.save_pretrained(aside)
        for file in (file for file in Path(aside).rglob("*") if file.is_file()):
            target = folder / file.relative_to(aside)
            # Writing into a link would change the base's own file.
            target.unlink(missing_ok=True)
            target.parent.mkdir(exist_ok=True)
            target.write_bytes(file.read_bytes())
