"""What serving programs stumble over: tensors that the architecture does not have, tokens without a
row, ids out of range.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llmtune.errors import ConfigError, ExportError
from llmtune.export.architecture import is_renamed
from llmtune.export.sources.tensor_source import TensorSource, find_name, is_embedding, some
from llmtune.export.writers.model_files import has_tokenizer
from llmtune.model.skeleton import build_skeleton, tied_aliases
from llmtune.storage.plain_json import parse_json
from llmtune.template_bounds import bounded_template, refuse_powers
from llmtune.template_errors import TEMPLATE_ERRORS, describe_template_error

_SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")


def check_export(folder: Path, source: TensorSource) -> list[str]:
    """Look over a model folder; what is worth knowing but stops nobody.

    Args:
        folder: ``config.json``, tokenizer, generation settings.
        source: The tensors that lie, or are going to lie, beside them.

    Raises:
        ExportError: A program that loads it would refuse it, or compute something else; all of it
            is named.
    """
    if not (folder / "config.json").is_file():
        raise ExportError(
            f"{folder.name}: no config.json, so that nothing can load the weights; give base= its"
            " model folder"
        )
    config: dict[str, Any] = parse_json((folder / "config.json").read_text())
    problems = find_tensor_mismatches(folder, source)
    token_problems, notes = _check_tokens(folder, config, source)
    problems += token_problems
    if problems:
        raise ExportError(
            f"what was to be published cannot be served: {len(problems)} problems:"
            f" {some(problems, 6)}; nothing was published"
        )
    return notes


def find_tensor_mismatches(folder: Path, source: TensorSource) -> list[str]:
    """Tensors that the architecture lacks, wants, or has in another shape; none where files have
    other names.
    """
    if is_renamed(folder):
        return []
    model = build_skeleton(folder)
    aliases = tied_aliases(model)
    wanted = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    stored = {name: find_name(name, source.specs) for name in wanted}
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    problems = []
    for name in sorted(parameters):
        found = stored[name]
        if found is None:
            if not any(stored.get(other) for other in aliases.get(name, ())):
                problems.append(f"{name} is missing")
        elif source.specs[found].shape != tuple(wanted[name].shape):
            problems.append(
                f"{name} is {source.specs[found].shape}, config.json makes it"
                f" {tuple(wanted[name].shape)}"
            )
    ignored = tuple(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())
    unknown = sorted(source.specs.keys() - set(filter(None, stored.values())))
    # Buffers that older versions stored, such as rotary frequencies and position numbers, are
    # passed over when loading.
    unknown = [
        name
        for name in unknown
        if source.specs[name].dtype.is_floating_point and "inv_freq" not in name
    ]
    unknown = [name for name in unknown if not any(part in name for part in ignored)]
    return problems + [f"{name} is not in the architecture" for name in unknown]


def _check_tokens(
    folder: Path, config: dict[str, Any], source: TensorSource
) -> tuple[list[str], list[str]]:
    """Vocabulary, special ids, chat template: what is wrong, and what is only noted."""
    vocabulary = (config.get("text_config") or config).get("vocab_size")
    if vocabulary is None:
        return [], []
    problems, notes = [], []
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
            outside = [
                token for token in tokens if token is not None and not -1 <= token < vocabulary
            ]
            problems += [
                f"{file}: {key} {token} is outside the vocabulary of {vocabulary}"
                for token in outside
            ]
    if not has_tokenizer(folder):
        notes.append("there is no tokenizer: programs that serve it need one beside the weights")
        return problems, notes
    return problems + _check_tokenizer(folder, vocabulary, notes), notes


def _check_tokenizer(folder: Path, vocabulary: int, notes: list[str]) -> list[str]:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        return [f"the tokenizer cannot be loaded ({str(error).splitlines()[0]})"]
    problems = []
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
    if tokenizer.eos_token_id is None:
        notes.append(
            "the tokenizer names no end-of-text token: answers end only at their longest length"
        )
    if tokenizer.chat_template is None:
        notes.append(
            "there is no chat template: vLLM and llama.cpp can complete texts, and not chat"
        )
    else:
        problems += _check_template(tokenizer)
    return problems


def _check_template(tokenizer: Any) -> list[str]:
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
