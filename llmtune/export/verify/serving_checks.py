"""Find problems that serving programs have with a model folder.

These are tensors that the architecture does not have, tokens without a row, ids out of range, and
chat templates that fail.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llmtune.errors import ConfigError, ExportError
from llmtune.export.architecture import (
    TEXT,
    TEXT_TO_TEXT,
    find_architecture,
    is_renamed,
    task_of,
)
from llmtune.export.sources.tensor_source import TensorSource, find_name, is_embedding
from llmtune.export.writers.model_files import has_tokenizer
from llmtune.model.skeleton import build_skeleton, tied_aliases
from llmtune.storage.plain_json import parse_json
from llmtune.template_bounds import bounded_template, refuse_powers
from llmtune.template_errors import TEMPLATE_ERRORS, describe_template_error

_SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")


def find_serving_problems(folder: Path, source: TensorSource) -> tuple[list[str], list[str]]:
    """Examine a model folder as a serving program would load it.

    Args:
        folder: Holds ``config.json``, tokenizer and generation settings.
        source: The tensors that are, or are going to be, beside them.

    Returns:
        Problems, with which a program that loads the folder would refuse it or compute something
        else; and notes, with which it can be served, but which the user should know.

    Raises:
        ExportError: There is no ``config.json``.
    """
    if not (folder / "config.json").is_file():
        raise ExportError(
            f"{folder.name}: no config.json, so that nothing can load the weights; give base= its"
            " model folder"
        )
    config: dict[str, Any] = parse_json((folder / "config.json").read_text())
    notes: list[str] = []
    problems = find_tensor_mismatches(folder, source)
    problems += _find_token_problems(folder, config, source, notes)
    return problems, notes


def find_tensor_mismatches(folder: Path, source: TensorSource) -> list[str]:
    """Find tensors that the architecture lacks, that are missing, or that have another shape.

    Architectures whose stored names transformers translates are not examined.
    """
    if is_renamed(folder):
        return []
    model = build_skeleton(folder)
    aliases = tied_aliases(model)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    names = [*parameters, *dict(model.named_buffers())]
    stored = {name: find_name(name, source.specs) for name in names}

    # Parameters without a tensor, or with one of another shape.
    problems = []
    for name in sorted(parameters):
        shape = tuple(parameters[name].shape)
        tensor = stored[name]
        if tensor is None:
            if not any(stored.get(other) for other in aliases.get(name, ())):
                problems.append(f"{name} is missing")
        elif source.specs[tensor].shape != shape:
            problems.append(f"{name} is {source.specs[tensor].shape}, config.json makes it {shape}")

    # Tensors without a parameter, but those that transformers ignores: buffers that older versions
    # stored, such as rotary frequencies and position numbers.
    ignored = ("inv_freq", *(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()))
    for name in sorted(source.specs.keys() - set(stored.values())):
        is_ignored = any(part in name for part in ignored)
        if source.specs[name].dtype.is_floating_point and not is_ignored:
            problems.append(f"{name} is not in the architecture")
    return problems


def _find_token_problems(
    folder: Path, config: dict[str, Any], source: TensorSource, notes: list[str]
) -> list[str]:
    """Examine vocabulary, special ids and chat template; add to the notes."""
    vocabulary = (config.get("text_config") or config).get("vocab_size")
    if vocabulary is None:
        return []
    problems = []
    rows = {spec.shape[0] for name, spec in source.specs.items() if is_embedding(name)}
    if rows - {vocabulary}:
        problems.append(
            f"config.json has vocab_size {vocabulary}, the embeddings have {sorted(rows)} rows"
        )
    for file in ("config.json", "generation_config.json"):
        values = parse_json((folder / file).read_text()) if (folder / file).is_file() else {}
        for key in _SPECIAL:
            ids = values.get(key)
            tokens = ids if isinstance(ids, list) else [ids]
            problems += [
                f"{file}: {key} {token} is outside the vocabulary of {vocabulary}"
                for token in tokens
                if token is not None and not -1 <= token < vocabulary
            ]
    if not has_tokenizer(folder):
        notes.append("there is no tokenizer: programs that serve it need one beside the weights")
        return problems
    return problems + _find_tokenizer_problems(folder, vocabulary, notes)


def _find_tokenizer_problems(folder: Path, vocabulary: int, notes: list[str]) -> list[str]:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        return [f"the tokenizer cannot be loaded ({str(error).splitlines()[0]})"]
    problems = []

    # Ids and rows of the embedding.
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if largest >= vocabulary:
        problems.append(
            f"the tokenizer knows token {largest}, the model has {vocabulary} rows: resize the"
            " embeddings in training"
        )
    elif largest + 1 < vocabulary:
        notes.append(
            f"{vocabulary - largest - 1} rows behind the tokenizer's {largest + 1} tokens are never"
            " used"
        )
    if task_of(find_architecture(folder)) not in (TEXT, TEXT_TO_TEXT):
        return problems
    if tokenizer.eos_token_id is None:
        notes.append(
            "the tokenizer names no end-of-text token: answers end only at their longest length"
        )
    if tokenizer.chat_template is None:
        notes.append(
            "there is no chat template: vLLM and llama.cpp can complete texts, and not chat"
        )
    else:
        problems += _find_template_problems(tokenizer)
    return problems


def _find_template_problems(tokenizer: Any) -> list[str]:
    try:
        refuse_powers(str(tokenizer.get_chat_template()))
        with bounded_template():
            text = tokenizer.apply_chat_template(
                [{"role": "user", "content": "Hello"}], tokenize=False, add_generation_prompt=True
            )
    except (*TEMPLATE_ERRORS, ConfigError) as error:
        return [
            f"the chat template fails on a question of a user ({describe_template_error(error)})"
        ]
    return [] if "Hello" in str(text) else ["the chat template leaves out what a user asks"]
