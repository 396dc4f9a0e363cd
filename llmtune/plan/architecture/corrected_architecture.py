"""Tell BERT from RoBERTa where a folder's ``config.json`` does not, or says the wrong one.

Chinese RoBERTa-wwm was trained as RoBERTa, and is built as BERT. Copies of it are found whose
configuration says ``roberta``, or nothing, so that transformers goes by the folder's name. Its
weights would then be left out, and new ones drawn.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llmtune.storage.layout import MODEL_INDEX, MODEL_WEIGHTS
from llmtune.storage.plain_json import parse_json
from llmtune.storage.tensors.safetensors_header import read_header

#: ``model_type`` -> the beginning of its classes' names.
_CLASSES = {"bert": "Bert", "roberta": "Roberta"}
_WORDS = "embeddings.word_embeddings.weight"
#: Settings that are the first dimension of a table.
_TABLES = {
    "vocab_size": _WORDS,
    "max_position_embeddings": "embeddings.position_embeddings.weight",
    "type_vocab_size": "embeddings.token_type_embeddings.weight",
}


def correct_architecture(folder: Path) -> dict[str, Any]:
    """Return the keys of a folder's ``config.json`` that must have other values.

    The folder is not changed.

    Args:
        folder: Of a model; any other path needs no correction.

    Returns:
        ``model_type``, and what goes with it; empty where the configuration is right, or is of
        another architecture than BERT and RoBERTa.
    """
    try:
        stored = parse_json((folder / "config.json").read_text())
    except (OSError, ValueError):
        return {}
    if not isinstance(stored, dict) or stored.get("model_type") not in (None, *_CLASSES):
        return {}
    tables = _read_tables(folder)
    kind = _find_kind(folder, stored, tables)
    if kind is None or kind == stored.get("model_type"):
        return {}
    changes: dict[str, Any] = {"model_type": kind}
    classes = [_rename_class(name, kind) for name in stored.get("architectures") or ()]
    if classes:
        changes["architectures"] = classes
    for key, table in _TABLES.items():
        rows = next((count for name, count in tables.items() if name.endswith(table)), None)
        if rows is not None and stored.get(key, rows) != rows:
            changes[key] = rows
    padding = _padding_token(folder)
    if padding is not None and stored.get("pad_token_id", padding) != padding:
        changes["pad_token_id"] = padding
    return changes


def corrected_settings(folder: Path) -> dict[str, Any]:
    """Return all settings of a folder's model where its ``config.json`` is wrong, or none."""
    changes = correct_architecture(folder)
    if not changes:
        return {}
    return {**parse_json((folder / "config.json").read_text()), **changes}


def describe_correction(folder: Path) -> str | None:
    """Say as what a folder's model is read where its ``config.json`` says something else."""
    changes = correct_architecture(folder)
    if not changes:
        return None
    stored = parse_json((folder / "config.json").read_text()).get("model_type")
    says = "names no model_type" if stored is None else f"says model_type {stored}"
    return (
        f"{folder} is read as {changes['model_type']}, by its weights and its tokenizer; its"
        f" config.json {says}"
    )


def _rename_class(name: str, kind: str) -> str:
    """Rename a class, such as RobertaForMaskedLM, to that of another architecture."""
    for other in _CLASSES.values():
        if name.startswith(other):
            return _CLASSES[kind] + name.removeprefix(other)
    return name


def _read_tables(folder: Path) -> dict[str, int | None]:
    """Map the names of a folder's tensors to their rows, where the header says them."""
    try:
        if (folder / MODEL_WEIGHTS).is_file():
            header = read_header(folder / MODEL_WEIGHTS)
            return {name: (*entry.shape, None)[0] for name, entry in header.items()}
        index = parse_json((folder / MODEL_INDEX).read_text())
        return dict.fromkeys(index["weight_map"])
    except (OSError, ValueError, KeyError, TypeError):
        # What is wrong with the files is said where they are read for training.
        return {}


def _find_kind(folder: Path, stored: dict[str, Any], tables: dict[str, int | None]) -> str | None:
    """Find the architecture by the names of the weights, or else by the tokenizer."""
    for name in tables:
        prefix = name.removesuffix(_WORDS)
        if prefix != name and prefix.rstrip(".") in _CLASSES:
            return prefix.rstrip(".")
    # The positions of RoBERTa begin after the number of its padding token, which makes its table
    # longer than the rows by two. Some RoBERTas have a WordPiece tokenizer.
    positions = next((tables[name] for name in tables if "position_embeddings" in name), None)
    positions = positions or stored.get("max_position_embeddings", 512)
    if _padding_token(folder) == 0 and positions % 8 == 0:
        return "bert"
    return None


def _padding_token(folder: Path) -> int | None:
    """Return the number of ``[PAD]`` in a WordPiece vocabulary; None for other tokenizers."""
    try:
        if (folder / "vocab.txt").is_file():
            words = (folder / "vocab.txt").read_text().split("\n")
            return words.index("[PAD]") if "[PAD]" in words else None
        model = parse_json((folder / "tokenizer.json").read_text())["model"]
        number = model["vocab"].get("[PAD]") if model.get("type") == "WordPiece" else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return number if isinstance(number, int) else None
